"""The demo on short windows: what it reports is right, and a wrong byte is not passed over."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers

from tests import demo
from tests.model.train import bits_of_text
from tests.model_attention import FOLDER, Recorder, bits_per_byte

WINDOW_BYTES = 256


@pytest.fixture(scope="module")
def work():
    return demo.prepare(WINDOW_BYTES)


def _measure(work, mode):
    advances = []
    figures = demo.measure(work, mode, lambda: advances.append(mode))
    assert len(advances) == demo.STEPS_PER_MODE
    return figures


def _run_main(folder, mode):
    """The exit status and the JSON of a run over one mode."""
    out = folder / "build" / "demo.json"
    status = demo.main(["--modes", mode, "--window-bytes", str(WINDOW_BYTES), "--out", str(out)])
    return status, json.loads(out.read_text())


def test_score_without_a_cache_is_that_of_the_stock_model(work):
    stock = transformers.LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    scores = [bits_of_text(stock, bytes(window.tolist())) for window in work.windows]
    bits, predicted = map(sum, zip(*scores, strict=True))
    assert work.bits_per_byte == pytest.approx(bits / predicted, abs=1e-5)


def test_every_layer_is_recorded_and_ends_in_a_partial_page(work):
    assert len(work.layers) == work.model.config.num_hidden_layers
    assert all(layer.k.shape == (len(work.windows) * (WINDOW_BYTES - 1), 2, 64) for layer in work.layers)
    assert (WINDOW_BYTES - 1) % demo.PAGE_SIZE
    slots = work.placement.slot_mapping
    assert len(np.unique(slots)) == slots.size
    assert not np.array_equal(slots, np.sort(slots))


def test_float32_cache_changes_nothing(work):
    """Stored bit for bit, so only the order of float32 sums differs: some ulps (6e-8)."""
    figures = _measure(work, "float32")
    assert figures.identical
    assert figures.bytes_per_token == 6 * 2 * (64 + 64) * 4
    assert figures.attention_relative_error < 1e-6
    assert abs(figures.bits_per_byte_delta) < 1e-5


def test_error_of_int8_is_that_of_rounding_rows_to_127_steps(work):
    """float32 arithmetic adds 1e-6 to what rounding costs (1e-2), so two computations of it agree to some 1e-3."""
    figures = _measure(work, "int8_per_token_head")
    rounded = _attend_in_float64(work, *([_round_rows(x) for x in (layer.k, layer.v)] for layer in work.layers))
    exact = np.stack([layer.exact for layer in work.layers])
    expected = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert figures.identical
    assert figures.bytes_per_token == 6 * 2 * (64 + 64 + 4 + 4)
    assert figures.attention_relative_error == pytest.approx(expected, rel=1e-2)
    assert 0 < abs(figures.bits_per_byte_delta) < 0.02  # wrong pages cost whole bits: see the next test


def _round_rows(x):
    scales = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.rint(x / scales) * scales


def _attend_in_float64(work, *keys_and_values):
    recorder = Recorder(len(work.windows))
    for layer_index, (layer, (k, v)) in enumerate(zip(work.layers, keys_and_values, strict=True)):
        recorder(layer_index, layer.q, k, v, layer.sm_scale)
    return np.stack([layer.exact for layer in recorder.layers])


def test_model_reads_the_cache_and_not_its_own_keys(work):
    placement = dataclasses.replace(work.placement, page_table=work.placement.page_table[:, ::-1].copy())
    other_sequence = demo.TorchPool(work.layout("int8_per_token_head"), placement)
    assert bits_per_byte(work.model, work.windows, demo.through(other_sequence)) > work.bits_per_byte + 1


def test_main_writes_one_object_per_mode(tmp_path):
    mode = "int8_per_token_head/fp8_per_token_head"
    status, rows = _run_main(tmp_path, mode)
    assert status == 0
    (row,) = rows
    assert {key: type(value) for key, value in row.items()} == {
        "mode": str,
        "bytes_per_token": float,
        "sha256_numpy": str,
        "sha256_torch": str,
        "sha256_jax": str,
        "identical": bool,
        "attention_relative_error": float,
        "bits_per_byte": float,
        "bits_per_byte_delta": float,
    }
    assert row["mode"] == mode
    assert row["identical"]
    assert len(bytes.fromhex(row["sha256_numpy"])) == 32
    assert row["sha256_numpy"] == row["sha256_torch"] == row["sha256_jax"]


@pytest.mark.parametrize("pool", [demo.TorchPool, demo.JaxPool])
def test_one_wrong_bit_is_an_exit_status_of_1(tmp_path, monkeypatch, capsys, pool):
    true_pages = pool.pages

    def corrupted_pages(self):
        pages = true_pages(self).copy()
        pages[-1, 0, 0] ^= 1
        return pages

    monkeypatch.setattr(pool, "pages", corrupted_pages)
    status, (row,) = _run_main(tmp_path, "int8_per_token_head")
    assert status == 1
    assert row["identical"] is False
    assert "NO" in capsys.readouterr().out
