"""What a launch plan is: all that a kernel launch needs but the arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

from kvq_core.arguments import ArraySpec, axis_stride
from kvq_core.layout import CacheLayout
from kvq_core.specs import PoolStrides, RecordSpec, record_spec

# Wraps the planning functions: equal calls get the same plan.
cached = functools.lru_cache(maxsize=4096)


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; 99 elsewhere since sm_86.
_SHARED_KIB = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}


@dataclass(frozen=True)
class DeviceFacts:
    """What a plan depends on: ``backend`` "cuda", "hip" or "interpreter", ``arch`` (90 for sm_90), multiprocessors."""

    backend: str
    arch: int
    num_sms: int

    @property
    def caps(self) -> str:
        """Which codecs run: see `kvq_core.kernels.codec`."""
        if self.backend != "cuda":
            return "portable"
        return "ptx_fp8" if self.arch >= 89 else "ptx"

    @property
    def has_pdl(self) -> bool:
        """Whether there is programmatic dependent launch: a kernel starts while the one before it ends."""
        return self.backend == "cuda" and self.arch >= 90

    @property
    def has_group_dots(self) -> bool:
        """Whether groups of four warps have dots of their own (wgmma). The interpreter shows the same path."""
        return self.has_task_groups or self.backend == "interpreter"

    @property
    def has_task_groups(self) -> bool:
        """Whether groups of four warps can have tasks of their own, with dots (wgmma) and registers to match."""
        return self.backend == "cuda" and self.arch == 90

    @property
    def shared_bytes(self) -> int:
        """The most shared memory of a program."""
        if self.backend == "interpreter":
            return 2**30
        return 1024 * (64 if self.backend == "hip" else _SHARED_KIB.get(self.arch, 99))


class Output(NamedTuple):
    """An output of a launch: a new buffer, or (``alias``) the array input of that index, updated in place."""

    shape: tuple[int, ...]
    dtype: str
    alias: int | None = None


@dataclass(frozen=True, eq=False)
class LaunchPlan:
    """One launch of ``kvq_core.kernels.<kernel>``: arrays, ``scalars``, outputs, then ``constexprs`` by name.

    Plans are cached, so a plan hashes by identity, and a launcher can keep what it compiled for one.
    """

    kernel: str
    grid: tuple[int, int, int]
    scalars: tuple[int, ...]
    outputs: tuple[Output, ...]
    constexprs: tuple[tuple[str, Hashable], ...]
    num_warps: int
    num_stages: int = 1
    enable_fp_fusion: bool = False
    launch_pdl: bool = False  # start before the launch in front of it has ended: the kernel waits where it must


def pool_spec(layout: CacheLayout, pages: ArraySpec, device: DeviceFacts, least_dim: int = 16) -> RecordSpec:
    """The records of ``pages`` as kernels see them."""
    slot_stride = axis_stride(pages, layout.axes.index("page_size")) if layout.has_rows else None
    strides = PoolStrides(axis_stride(pages, 0), axis_stride(pages, layout.head_axis), slot_stride)
    return record_spec(layout, pages.shape[layout.head_axis], strides, device.caps, least_dim)


def stride_align(x: ArraySpec) -> int:
    """The power of two, up to 16, that divides both outer strides: how far loads may be vectorized."""
    return math.gcd(16, *x.strides[:2])
