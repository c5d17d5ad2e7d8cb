"""The benchmark without a GPU: what it reports is right, and it refuses to report wrong results."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

import bench.__main__ as program
from bench import cases, gate, plots, quotes, report, tables
from bench.rows import FLASHINFER, JAX, TORCH, Bar, Row, Timing
from tests import backends

SMALL = cases.uniform(2, 1024, "small", num_q_heads=4, num_kv_heads=2, head_dim=32)
MODES_OF = {TORCH: cases.MODES, FLASHINFER: (cases.BF16, cases.FP8_TENSOR)}
EAGER = backends.IN_PROCESS[0]


def _row(section, case, impl, mode, us, bar=None):
    timing = Timing(us, us * 0.99, us * 1.01)
    num_bytes = case.num_bytes(mode)
    return Row(
        section, case.name, impl, mode, timing, case.shape(), num_bytes, case.num_flops, case.held_against(mode), bar
    )


def _synthetic_report():
    """Every call takes 5 us and what its bytes need at 4 TB/s; quantized ones 8 us more."""
    rows = [
        _row(section, case, impl, mode, 5 + 8 * (mode != cases.BF16) + case.num_bytes(mode) / 4e6)
        for section, case in cases.select(("decode", "sweep"), quick=False).decodes
        for impl, modes in MODES_OF.items()
        for mode in modes
    ]
    names = ("device", "driver", "python", *report.PACKAGES)
    return report.Report(dict.fromkeys(names, "1.0"), 4.2, 780.0, tuple(rows))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "results" / "synthetic.json"
    report.save(_synthetic_report(), path)
    return path


def test_json_restores_the_report(saved):
    assert report.load(saved) == _synthetic_report()


def test_json_holds_shapes_spread_and_derived_figures(saved):
    row = json.loads(saved.read_text())["rows"][0]
    assert row["timing"][1] < row["timing"][0] < row["timing"][2]
    assert row["shape"] | {"batch": 64, "context": 8192, "head_dim": 128, "page_size": 16} == row["shape"]
    assert row["num_bytes"] == 64 * 8192 * 8 * 2 * (128 + 4)
    assert row["percent_of_copy"] == pytest.approx(100 * row["num_bytes"] / row["timing"][0] * 1e-6 / 4.2)
    assert row["ratio"] == pytest.approx((13 + row["num_bytes"] / 4e6) / (5 + 64 * 8192 * 8 * 2 * 256 / 4e6))


def test_plots_are_small_pictures(saved):
    paths = plots.draw(report.load(saved), saved.with_suffix(""))
    assert [path.name for path in paths] == [f"synthetic-{name}.png" for name in ("bandwidth", "speedup", "roofline")]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 150 * 1024


def test_break_even_is_where_the_speed_up_stays_above_one():
    assert plots.break_even([(1024, 0.5), (4096, 1.5), (8192, 1.8)]) == pytest.approx(2048)
    assert plots.break_even([(1024, 1.2), (2048, 0.9), (4096, 1.1)]) == pytest.approx(2048 * 2**0.5)
    assert plots.break_even([(1024, 1.2), (2048, 1.4)]) == 1024
    assert plots.break_even([(1024, 0.8), (2048, 0.9)]) is None


def test_speedup_is_over_the_peer_where_it_ran():
    yardstick, series = plots.speedups(_synthetic_report())
    assert yardstick == FLASHINFER
    assert [context for context, _ in series[TORCH, cases.INT8]] == [1024 * 2**i for i in range(8)]
    without = dataclasses.replace(
        _synthetic_report(), rows=tuple(row for row in _synthetic_report().rows if row.impl == TORCH)
    )
    assert plots.speedups(without)[0] == TORCH


def test_table_says_which_bars_are_met():
    case = cases.DECODE[0]
    peer = dataclasses.replace(_row("decode", case, FLASHINFER, cases.BF16, 500.0), versus=None)
    met = _row("decode", case, TORCH, cases.INT8, 260.0, Bar("ratio", 0.55))
    missed = _row("decode", case, TORCH, cases.FP8, 300.0, Bar("ratio", 0.55))
    unknown = dataclasses.replace(met, impl=JAX, versus=(case.name, TORCH, "float16"))
    slow = dataclasses.replace(met, case="append", bar=Bar("TB/s", 5.0), versus=None)
    result = dataclasses.replace(_synthetic_report(), rows=(met, missed, unknown, peer, slow))
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(report.table(result))
    lines = [line for line in capture.get().splitlines() if "<=" in line or ">=" in line]
    assert [line.split()[-1] for line in lines] == ["met", "missed", "?", "missed"]


def test_missed_bars_are_listed_and_no_others():
    case = cases.DECODE[0]
    peer = dataclasses.replace(_row("decode", case, FLASHINFER, cases.BF16, 500.0), versus=None)
    met = _row("decode", case, TORCH, cases.INT8, 260.0, Bar("ratio", 0.55))
    missed = _row("decode", case, TORCH, cases.FP8, 300.0, Bar("ratio", 0.55))
    slow = dataclasses.replace(met, case="append", bar=Bar("TB/s", 4.26), versus=None)
    run = dataclasses.replace(_synthetic_report(), rows=(peer, met, missed, slow))
    assert quotes.missed_bars(run).splitlines()[2:] == [
        "| 64x8k | kvq torch | fp8_per_token_head | 0.600 of the time of FlashInfer bfloat16 | at most 0.55 |",
        "| append | kvq torch | int8_per_token_head | 4.259 TB/s | at least 4.26 |",
    ]


def test_a_quote_finds_its_words_and_puts_its_numbers_there():
    text = "16x8k takes 70.1 us.\n- 64x8k takes 300\n  us (+) from int8, 1e3.\n"
    assert quotes.put(text, "takes 268.4 us (+) from int8") == text.replace("300", "268.4")
    assert quotes.without(text, ("takes 1 us (+) from int8",)) == "16x8k takes 70.1 us.\n- 64x8k , 1e3.\n"


@pytest.mark.parametrize(("quote", "places"), [("takes 5 us", 2), ("takes 5 ms", 0)])
def test_a_quote_whose_words_are_not_in_one_place_is_refused(quote, places):
    with pytest.raises(ValueError, match=f"expected one place .*; found {places}"):
        quotes.put("int8 takes 1 us, fp8 takes 2 us", quote)


@pytest.mark.parametrize("mode", cases.MODES)
def test_gate_passes_a_right_backend(mode):
    gate.check_small(EAGER, SMALL, mode)
    gate.check_small(EAGER, dataclasses.replace(SMALL, queries=4, window=100), mode)


class _Wrong:
    """A backend that is right but for one operation."""

    def __init__(self, operation, spoil):
        self.name, self.takes_strides, self._operation, self._spoil = "wrong", True, operation, spoil

    def __getattr__(self, name):
        right = getattr(EAGER, name)
        return (lambda *args: self._spoil(right(*args))) if name == self._operation else right


def _flip_a_bit(pages):
    pages[0, 0, 0] ^= 1
    return pages


@pytest.mark.parametrize(
    ("operation", "spoil"),
    [
        ("append", _flip_a_bit),
        ("attention", lambda got: got._replace(out=(got.out.astype(np.float32) * 1.02).astype(got.out.dtype))),
        ("attention", lambda got: got._replace(lse=got.lse + np.float32(1e-3))),
    ],
)
def test_gate_refuses_a_wrong_backend(operation, spoil):
    with pytest.raises(gate.RedGateError, match="wrong, small, 2x1k small"):
        gate.check_small(_Wrong(operation, spoil), SMALL, cases.INT8)


def test_full_size_gate_takes_one_head_of_one_sequence():
    inputs, got = _full_size_results()
    for seq, head in gate.sampled(SMALL):
        rows, heads, columns = gate.head_slices(SMALL, seq, head)
        right, wrong = (inputs.pages[inputs.page_table[seq, columns], h : h + 1] for h in (head, 1 - head))
        part = type(got)(*(x[rows, heads] for x in got))
        gate.check_full(SMALL, cases.INT8, seq, inputs.q[rows, heads], right, part)
        with pytest.raises(gate.RedGateError, match=f"full size, 2x1k small .* sequence {seq}"):
            gate.check_full(SMALL, cases.INT8, seq, inputs.q[rows, heads], wrong, part)


def _full_size_results():
    case = gate.AttentionCase("full", SMALL.layout(cases.INT8), tuple((1, n) for n in SMALL.seq_lens), spare_columns=0)
    inputs = case.inputs()
    return inputs, EAGER.attention(case.layout, inputs, case.options())


def test_error_above_what_is_allowed_and_nan_are_refused():
    gate.check_close("x", 0.1, 0.1)
    for error in (0.11, float("nan")):
        with pytest.raises(gate.RedGateError, match="x: relative error"):
            gate.check_close("x", error, 0.1)


def test_red_gate_leaves_no_report(monkeypatch, tmp_path, capsys):
    def refuse(*_):
        raise gate.RedGateError("byte 7")

    monkeypatch.setattr(program.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(program, "run", refuse)
    out = tmp_path / "results.json"
    assert program.main(["--out", str(out)]) == program.RED_GATE
    assert "byte 7" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_failed_jax_process_is_a_red_gate(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stdout="")
    monkeypatch.setattr(program.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(gate.RedGateError, match="JAX"):
        program._measure_jax(quick=True)


def test_command_line_selects_sections():
    assert {section for section, _ in cases.select(("decode", "variants"), False).decodes} == {"decode", "variants"}
    quick = cases.select(cases.SECTIONS, quick=True)
    assert all(getattr(quick, field.name) for field in dataclasses.fields(quick))
    with pytest.raises(SystemExit):
        program.main(["--only", "nothing"])


def test_page_tables_hold_every_page_once():
    for _, case in cases.select(("decode",), quick=False).decodes:
        table = tables.page_table(case)
        used = [row[:count] for row, count in zip(table, case.pages_of, strict=True)]
        assert np.array_equal(np.sort(np.concatenate(used)), np.arange(case.num_pages))
        assert table.shape[1] == max(case.pages_of) * case.table_factor
        assert (table >= 0).sum() == case.num_pages


def test_slots_of_an_append_are_unique_and_in_the_pool():
    for case in cases.APPEND:
        slots, num_pages = tables.slot_mapping(case)
        assert len(np.unique(slots)) == case.num_tokens
        assert 0 <= slots.min() <= slots.max() < num_pages * case.page_size


def test_help_needs_no_gpu():
    done = subprocess.run([sys.executable, "-m", "bench", "--help"], capture_output=True, text=True, check=True)
    assert "--quick" in done.stdout
