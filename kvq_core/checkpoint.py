"""Per-tensor scales of K and V out of a Hugging Face checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SIDES_BY_SUFFIX = {
    ".k_scale": "k",  # compressed-tensors: self_attn.k_scale; ModelOpt: self_attn.k_proj.k_scale; vLLM: attn.k_scale
    ".v_scale": "v",
    ".kv_scale": "kv",  # AutoFP8
    ".k_proj.output_scale": "k",  # Quark, early compressed-tensors
    ".v_proj.output_scale": "v",
}
_DTYPES = ("F32", "BF16", "F16")
_SMALLEST = float(np.finfo(np.float32).tiny)


class _Scale(NamedTuple):
    value: float
    source: str  # the tensor and its file, for messages


def load_kv_scales(
    path: str | PathLike[str], *, layers: Iterable[int] | None = None, prefix: str = ""
) -> dict[int, tuple[float, float]]:
    """Read the scales that a checkpoint brings for the FP8 KV cache of each layer, ``x = code * scale``.

        scales = load_kv_scales(folder, layers=range(32))
        caches = [KVCache(layout, num_pages, k_scale=k, v_scale=v) for k, v in scales.values()]

    Only the headers of the files and the scales themselves are read. Scales are the tensors called ``*.k_scale``,
    ``*.v_scale``, ``*.kv_scale`` (for both), ``*.k_proj.output_scale`` or ``*.v_proj.output_scale``, as llm-compressor,
    ModelOpt, AutoFP8 and Quark write them (https://docs.vllm.ai/en/latest/features/quantization/quantized_kvcache/);
    the layer is the one number among the parts of the name. They belong to float8_e4m3fn and are returned as they are:
    the e4m3fnuz of older AMD GPUs, for which vLLM doubles them, is no mode of kvq.

    Args:
        path: a folder with ``model.safetensors`` or ``model.safetensors.index.json``, or one such file.
        layers: the layers that must have scales, e.g. ``range(num_layers)``; others are left out. None for those that
            have any.
        prefix: of the names to look at, e.g. ``"model.layers."`` where a vision tower has scales too.

    Returns:
        ``{layer: (k_scale, v_scale)}`` in the order of the layers.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: there is no such checkpoint, or one of its files is missing.
        ValueError: a file is not safetensors; there is no scale, none for K or V of a layer, or two for the same;
            a scale is no float32, bfloat16 or float16 scalar (shape ``[]`` or ``[1]``), or not finite and positive.
    """
    found: dict[tuple[int, str], _Scale] = {}
    for name, scale in _scales_in(_files(Path(path)), prefix):
        layer, sides = _layer(name), _sides(name)
        for side in sides:
            other = found.setdefault((layer, side), scale)
            if other is not scale:
                raise ValueError(
                    f"expected one {side}_scale for layer {layer}; got {other.source} and {scale.source}. Remove one, "
                    "or pass the prefix of the names to read"
                )
    wanted = sorted({layer for layer, _ in found} if layers is None else set(layers))
    missing = [f"{side}_scale of layer {layer}" for layer in wanted for side in "kv" if (layer, side) not in found]
    if missing or not found:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ValueError(
            f"expected a k_scale and a v_scale for each layer in {str(path)!r}; got no "
            f"{', '.join(missing[:4]) or 'scale at all'}{more}. Derive them with ScaleCalibrator, or leave them at 1.0"
        )
    return {layer: (found[layer, "k"].value, found[layer, "v"].value) for layer in wanted}


def _files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Like transformers, a folder's single file goes before its index."""
    if path.is_dir():
        path = next((path / name for name in (_SINGLE, _INDEX) if (path / name).exists()), path / _SINGLE)
    if not path.exists():
        raise FileNotFoundError(
            f"expected a folder with {_SINGLE} or {_INDEX}, or one such file; got {str(path)!r}, which does not exist. "
            "Download a model from the Hub first"
        )
    if path.suffix != ".json":
        return [path]
    index = json.loads(path.read_text())
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"expected {str(path)!r} to be the index of a checkpoint; got no weight_map in it")
    return [path.parent / file for file in sorted(set(weight_map.values()))]


def _scales_in(files: list[Path], prefix: str) -> Iterator[tuple[str, _Scale]]:
    """The names and values of all scales, in every file that has them."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("load_kv_scales needs safetensors: pip install 'kvq[hf]'") from error
    for file in files:
        try:
            with safe_open(file, framework="np") as tensors:
                for name in filter(_sides, tensors.keys()):
                    if name.startswith(prefix):
                        source = f"{name!r} in {file.name!r}"
                        yield name, _Scale(_read_scalar(tensors, name, source), source)
        except SafetensorError as error:
            raise ValueError(
                f"expected {str(file)!r} to be a safetensors file; got {error}. A Git LFS pointer has to be downloaded"
            ) from error


def _read_scalar(tensors, name: str, source: str) -> float:
    header = tensors.get_slice(name)
    if list(header.get_shape()) not in ([], [1]) or header.get_dtype() not in _DTYPES:
        raise ValueError(
            f"expected a scalar, shape [] or [1], of dtype {', '.join(_DTYPES)} for {source}; got "
            f"{header.get_dtype()}{header.get_shape()}. One scale per layer is supported, not one per head or channel"
        )
    value = float(tensors.get_tensor(name).reshape(()))
    if not _SMALLEST <= value < np.inf:
        raise ValueError(
            f"expected a finite and positive number (at least {_SMALLEST}) for {source}; got {value}. Calibrate anew"
        )
    return value


def _sides(name: str) -> str:
    """``"k"``, ``"v"``, ``"kv"``, or nothing if ``name`` is no scale of a KV cache."""
    return next((sides for suffix, sides in _SIDES_BY_SUFFIX.items() if name.endswith(suffix)), "")


def _layer(name: str) -> int:
    numbers = [part for part in name.split(".") if part.isdecimal()]
    if len(numbers) != 1:
        raise ValueError(
            f"expected one number, that of the layer, in the name of {name!r}; got {len(numbers)}. Pass the prefix of "
            "the names to read"
        )
    return int(numbers[0])
