"""What the framework-neutral core must know of torch tensors and devices."""

from __future__ import annotations

import functools

import torch

from kvq_core.arguments import ArraySpec
from kvq_core.plan import DeviceFacts

_INTERPRETER_SMS = 4  # small, so that tests on a CPU reach the split and the unsplit paths


def dtype_name(dtype: torch.dtype) -> str:
    """The numpy-style name of ``dtype``, e.g. ``"bfloat16"``. Not cached: it is fast, and dynamo traces it."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype with the numpy-style ``name``."""
    return getattr(torch, name)


def array_spec(tensor: torch.Tensor) -> ArraySpec:
    """Dtype name, shape and strides of ``tensor``."""
    return ArraySpec(dtype_name(tensor.dtype), tuple(tensor.shape), tensor.stride())


def optional_spec(tensor: torch.Tensor | None) -> ArraySpec | None:
    """`array_spec`, where None stays None."""
    return None if tensor is None else array_spec(tensor)


def known_spec(tensor: torch.Tensor) -> ArraySpec:
    """`array_spec` in half the time, for tensors that nothing traces: the sizes of others may be symbols."""
    return _spec(tensor.dtype, tensor.shape, tensor.stride())


@functools.lru_cache(maxsize=4096)
def _spec(dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> ArraySpec:
    return ArraySpec(dtype_name(dtype), tuple(shape), strides)


@functools.cache
def device_facts(device: torch.device) -> DeviceFacts:
    """What a launch plan depends on; a CPU stands for Triton's interpreter."""
    if device.type == "cpu":
        return DeviceFacts("interpreter", 0, _INTERPRETER_SMS)
    properties = torch.cuda.get_device_properties(device)
    backend = "hip" if torch.version.hip else "cuda"
    return DeviceFacts(backend, properties.major * 10 + properties.minor, properties.multi_processor_count)
