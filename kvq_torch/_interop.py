"""What the framework-neutral core must know of torch tensors and devices."""

from __future__ import annotations

import functools
from typing import Any

import torch

from kvq_core.arguments import ArraySpec, AttentionCall
from kvq_core.plan import DeviceFacts
from kvq_core.plan.launch import cached

ArrayKeys = tuple[tuple[torch.dtype, torch.Size, tuple[int, ...]] | None, ...]
CallKey = tuple[ArrayKeys, tuple[float | None, ...]]  # an `AttentionCall`, as caches look it up
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


def array_keys(*tensors: torch.Tensor | None) -> ArrayKeys:
    """What `array_spec` is made of, for caches. Not for tensors that are traced: the sizes of those may be symbols."""
    return tuple([None if x is None else (x.dtype, x.shape, x.stride()) for x in tensors])  # a generator is slow


def keyed_specs(keys: ArrayKeys) -> list[Any]:
    """The `optional_spec` of each tensor that ``keys`` are the `array_keys` of."""
    return [None if key is None else ArraySpec(dtype_name(key[0]), tuple(key[1]), key[2]) for key in keys]


@cached
def keyed_call(key: CallKey) -> AttentionCall:
    """The call with these arrays and numbers, in the order of the fields."""
    arrays, numbers = key
    return AttentionCall(*keyed_specs(arrays), *numbers)


@functools.cache
def device_facts(device: torch.device) -> DeviceFacts:
    """What a launch plan depends on; a CPU stands for Triton's interpreter."""
    if device.type == "cpu":
        return DeviceFacts("interpreter", 0, _INTERPRETER_SMS)
    properties = torch.cuda.get_device_properties(device)
    backend = "hip" if torch.version.hip else "cuda"
    return DeviceFacts(backend, properties.major * 10 + properties.minor, properties.multi_processor_count)
