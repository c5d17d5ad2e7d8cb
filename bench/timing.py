"""Device time, host time and the ceilings of the machine, in PyTorch."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.rows import Timing

SAMPLES = 11
SAMPLE_US = 4000.0  # the least length of one sample: many times what an event can resolve
LEAST_CALLS = 8  # in a graph
COLD_BYTES = 256 * 2**20  # buffer sets that are rotated over have this many bytes, four times the L2 of an H200
COPY_BYTES = 2**30
MATMUL_SIZE = 8192

Call = Callable[[], Any]


def device_time(calls: Sequence[Call]) -> Timing:
    """The device time of one call; each of ``calls`` works on buffers of its own.

    A CUDA graph of all calls in turn, several rounds if they are few, is replayed between two events. What the host
    does is not in it; the gaps between the kernels of a graph are.
    """
    for call in calls[:2]:
        call()
    rounds = math.ceil(LEAST_CALLS / len(calls))
    graph = _capture(list(calls) * rounds)
    replays = max(1, math.ceil(SAMPLE_US / _replay_us(graph, 1)))
    count = replays * rounds * len(calls)
    return Timing.of([_replay_us(graph, replays) / count for _ in range(SAMPLES)])


def host_time(call: Call, calls: int = 100) -> Timing:
    """The time the host takes for one call while the device keeps up, in a queue that never fills."""
    samples = []
    for _ in range(SAMPLES + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return Timing.of(samples[1:])


def copy_tb_per_s() -> float:
    """Bandwidth of a device-to-device copy, bytes read plus bytes written: the faster of the driver's and a kernel's.

    Without a graph: in one, the driver's copies reached 2.8 TB/s on an H200.
    """
    x, y = (torch.randn(COPY_BYTES // 4, device="cuda") for _ in range(2))
    copies = functools.partial(y.copy_, x), functools.partial(torch.neg, x, out=y)
    return max(2 * COPY_BYTES / _queue_us(copy) for copy in copies) * 1e-6


def matmul_tflop_per_s() -> float:
    """Rate of a large bfloat16 matrix product on random values."""
    x, y = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * MATMUL_SIZE**3 / _queue_us(lambda: x @ y) * 1e-6


def _capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _queue_us(call: Call, calls: int = 20) -> float:
    """The median device time of a call that takes the device far longer than its launch takes the host."""
    return statistics.median(_elapsed_us(call, calls) / calls for _ in range(SAMPLES))


def _replay_us(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    return _elapsed_us(graph.replay, replays)


def _elapsed_us(call: Call, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3
