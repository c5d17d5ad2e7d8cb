"""Scales out of checkpoints as tools write them, and what a damaged or incomplete checkpoint is told."""

from __future__ import annotations

import builtins
import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from kvq_core import load_kv_scales

LLM_COMPRESSOR = "model.layers.{}.self_attn.{}_scale"
MODEL_OPT = "model.layers.{0}.self_attn.{1}_proj.{1}_scale"
QUARK = "model.layers.{}.self_attn.{}_proj.output_scale"
VLLM = "model.language_model.layers.{}.self_attn.attn.{}_scale"
GPT2 = "transformer.h.{}.attn.{}_scale"
OTHERS = {  # what stands beside the scales of a cache and is none
    "model.layers.0.self_attn.k_proj.weight_scale": np.ones((8, 1), np.float32),
    "model.layers.0.self_attn.q_scale": np.float32(3),
    "model.layers.0.self_attn.q_proj.output_scale": np.ones(1, np.float32),
    "model.layers.0.mlp.experts.5.down_proj.input_scale": np.ones(1, np.float32),
    "model.embed_tokens.weight": np.ones((64, 8), ml_dtypes.bfloat16),
}


def scalars(names: str, num_layers: int = 2, dtype="float32", shape=()) -> dict[str, np.ndarray]:
    """K of layer l has 0.5 + l, V has 0.25 + l: exact in every dtype."""
    values = {names.format(layer, side): layer + half for layer in range(num_layers) for side, half in _HALVES}
    return {name: np.full(shape, value).astype(dtype) for name, value in values.items()}


_HALVES = (("k", 0.5), ("v", 0.25))
EXPECTED = {0: (0.5, 0.25), 1: (1.5, 1.25)}


def write(folder, tensors, name: str = "model.safetensors"):
    save_file({name: np.asarray(x) for name, x in tensors.items()}, folder / name)
    return folder


def write_shards(folder, *shards):
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, tensors in zip(files, shards, strict=True):
        write(folder, tensors, file)
    weight_map = {name: file for file, tensors in zip(files, shards, strict=True) for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("names", [LLM_COMPRESSOR, MODEL_OPT, QUARK, VLLM, GPT2])
def test_scales_are_found_under_the_names_that_tools_write(tmp_path, names):
    assert load_kv_scales(write(tmp_path, scalars(names) | OTHERS)) == EXPECTED


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_scalars_of_any_float_dtype_are_read(tmp_path, dtype, shape):
    scales = load_kv_scales(write(tmp_path, scalars(LLM_COMPRESSOR, dtype=np.dtype(dtype), shape=shape)))
    assert scales == EXPECTED
    assert all(type(scale) is float for pair in scales.values() for scale in pair)


def test_kv_scale_serves_both_sides(tmp_path):
    tensors = {f"model.layers.{layer}.self_attn.kv_scale": np.float32(layer + 1) for layer in range(2)}
    assert load_kv_scales(write(tmp_path, tensors)) == {0: (1.0, 1.0), 1: (2.0, 2.0)}


def test_shards_are_read_through_their_index(tmp_path):
    tensors = list(scalars(LLM_COMPRESSOR, num_layers=12).items())
    write(tmp_path, {"model.layers.0.self_attn.k_scale": np.float32(9)}, "consolidated.safetensors")  # of no shard
    write_shards(tmp_path, dict(tensors[:7]), OTHERS, dict(tensors[7:]))
    expected = {layer: (layer + 0.5, layer + 0.25) for layer in range(12)}
    assert load_kv_scales(tmp_path) == expected
    assert list(load_kv_scales(tmp_path)) == list(range(12))
    assert load_kv_scales(tmp_path / "model.safetensors.index.json") == expected


def test_a_file_of_any_name_is_read_alone(tmp_path):
    write(tmp_path, scalars(LLM_COMPRESSOR), "scales.safetensors")
    assert load_kv_scales(tmp_path / "scales.safetensors") == EXPECTED
    assert load_kv_scales(str(tmp_path / "scales.safetensors")) == EXPECTED


def test_layers_selects_and_prefix_tells_models_apart(tmp_path):
    tensors = scalars(LLM_COMPRESSOR) | scalars("vision_tower.layers.{}.self_attn.{}_scale", 5)
    write(tmp_path, tensors)
    assert load_kv_scales(tmp_path, prefix="model.") == EXPECTED
    assert load_kv_scales(tmp_path, prefix="model.", layers=[1]) == {1: EXPECTED[1]}
    assert len(load_kv_scales(tmp_path, prefix="vision_tower.")) == 5


def broken(name: str, value) -> dict[str, np.ndarray]:
    return scalars(LLM_COMPRESSOR) | {name: np.asarray(value)}


K0, V1 = LLM_COMPRESSOR.format(0, "k"), LLM_COMPRESSOR.format(1, "v")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (broken(K0, np.float32(np.nan)), f"finite and positive number .* for '{K0}' in 'model.safetensors'; got nan"),
        (broken(K0, np.float32(np.inf)), "finite and positive .* got inf. Calibrate anew"),
        (broken(V1, np.float32(0)), f"finite and positive .* for '{V1}' .* got 0.0"),
        (broken(V1, np.float32(-1)), "finite and positive .* got -1.0"),
        (broken(V1, np.float32(1e-40)), "at least 1.17.*e-38.* got 9.9"),
        (broken(K0, np.ones(8, np.float32)), r"a scalar, shape \[\] or \[1\], .* got F32\[8\]. One scale per layer"),
        (broken(K0, np.ones((1, 1), np.float32)), r"a scalar, .* got F32\[1, 1\]"),
        (broken(K0, np.ones(0, np.float32)), r"a scalar, .* got F32\[0\]"),
        (broken(K0, np.float64(1)), r"of dtype F32, BF16, F16 .* got F64\[\]"),
        (broken(K0, np.array(1, ml_dtypes.float8_e4m3fn)), r"of dtype F32, BF16, F16 .* got F8_E4M3\[\]"),
        (
            broken(MODEL_OPT.format(0, "k"), np.float32(0.5)),
            "one k_scale for layer 0; got '.*' in '.*' and '.*' in '.*'. Remove one",
        ),
        (broken("model.layers.1.self_attn.kv_scale", np.float32(1)), "one (k|v)_scale for layer 1; got"),
        (broken("decoder.layers.1.self_attn.k_scale", np.float32(1)), "one k_scale for layer 1; .* pass the prefix"),
        (broken("model.self_attn.k_scale", np.float32(1)), "one number, that of the layer, .* got 0"),
        (
            broken("blocks.1.layers.0.k_scale", np.float32(1)),
            "one number, that of the layer, .* got 2. Pass the prefix",
        ),
        ({K0: np.float32(1), V1: np.float32(1)}, "got no v_scale of layer 0, k_scale of layer 1. Derive them"),
        (OTHERS, "got no scale at all. Derive them with ScaleCalibrator"),
    ],
)
def test_a_bad_scale_is_named(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        load_kv_scales(write(tmp_path, tensors))


def test_a_layer_without_scales_is_named(tmp_path):
    write(tmp_path, scalars(LLM_COMPRESSOR))
    with pytest.raises(ValueError, match=r"got no k_scale of layer 2, v_scale of layer 2. Derive"):
        load_kv_scales(tmp_path, layers=range(3))
    with pytest.raises(ValueError, match=r"v_scale of layer 3 and 2 more. Derive"):
        load_kv_scales(tmp_path, layers=range(5))


def test_one_scale_in_two_shards_is_refused_though_the_index_names_one(tmp_path):
    write_shards(tmp_path, scalars(LLM_COMPRESSOR), {K0: np.float32(0.5)})
    got = f"'{K0}' in 'model-00001-of-00002.safetensors' and '{K0}' in 'model-00002-of-00002.safetensors'"
    with pytest.raises(ValueError, match=re.escape(got)):
        load_kv_scales(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model.safetensors.index.json, .*does not exist. Download"):
        load_kv_scales(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_kv_scales("some-org/some-model")
    write_shards(tmp_path, scalars(LLM_COMPRESSOR), OTHERS)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        load_kv_scales(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"model-00002-of-00002.*' to be a safetensors file; .* Git LFS"):
        load_kv_scales(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="to be the index of a checkpoint"):
        load_kv_scales(tmp_path)


def test_no_tensor_but_the_scales_is_read(tmp_path, monkeypatch):
    read = []

    class Recorder:
        def __init__(self, file, framework):
            self._file = safe_open(file, framework=framework)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            return self._file.__exit__(*args)

        def __getattr__(self, name):
            return getattr(self._file, name)

        def get_tensor(self, name):
            read.append(name)
            return self._file.get_tensor(name)

    monkeypatch.setattr("safetensors.safe_open", Recorder)
    assert load_kv_scales(write_shards(tmp_path, scalars(LLM_COMPRESSOR), OTHERS)) == EXPECTED
    assert sorted(read) == sorted(scalars(LLM_COMPRESSOR))


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    write(tmp_path, scalars(LLM_COMPRESSOR))
    real = builtins.__import__

    def without_safetensors(name, *args, **kwargs):
        if name == "safetensors":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_safetensors)
    with pytest.raises(ImportError, match=r"pip install 'kvq\[hf\]'"):
        load_kv_scales(tmp_path)
