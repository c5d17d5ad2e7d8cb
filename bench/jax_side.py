"""The JAX half of the benchmark, a process of its own: `python -m bench.jax_side`. Prints one row a line, as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

import kvq_jax
from bench import gate
from bench.append import APPEND_MODES, slot_mapping
from bench.cases import AppendCase, DecodeCase, select
from bench.rows import JAX, TORCH, Bar, Row, Timing
from tests import backends
from tests.compare import Attention

SAMPLES = 9
SAMPLE_US = 60_000.0
CALLS = 8  # in one program
COLD_BYTES = 256 * 2**20
CHUNK_TOKENS = 2**17
_, BACKEND, _ = backends.ON_GPU
BAR = Bar("ratio", 1.03)
FAILURE = 1


def device_time(program: Callable[[], object], calls: int) -> Timing:
    """Time of one of the ``calls`` that ``program`` makes.

    A program is dispatched many times without waiting, so that the host runs ahead and the device never idles: the wall
    time of the queue is the device's, as long as a program takes the device longer than its dispatch takes the host.
    """
    jax.block_until_ready(program())
    estimate = _queue_us(program, 2) / 2
    repeats = max(4, math.ceil(SAMPLE_US / estimate))
    _queue_us(program, repeats)
    return Timing.of([_queue_us(program, repeats) / repeats / calls for _ in range(SAMPLES)])


def measure_decode(case: DecodeCase) -> Iterator[Row]:
    """Rows of ``case``, one a mode.

    Raises:
        RedGateError: a result is wrong.
    """
    num_sets = case.num_sets(COLD_BYTES)
    table, seq_lens = jnp.asarray(_page_table(case)), jnp.asarray(case.seq_lens, jnp.int32)
    shape = len(case.seq_lens), case.num_q_heads, case.head_dim
    qs = [jax.random.normal(jax.random.key(call), shape, jnp.bfloat16) for call in range(max(CALLS, num_sets))]
    for mode in case.modes:
        gate.check_small(BACKEND, case, mode)
        caches = [_filled_cache(case, mode, seed) for seed in range(num_sets)]
        _check(case, mode, qs[0], caches[0], table, seq_lens)
        program = functools.partial(_attend_in_turn, qs, caches, table, seq_lens)
        yield Row(
            "decode",
            case.name,
            JAX,
            mode,
            device_time(program, len(qs)),
            case.shape(),
            case.num_bytes(mode),
            case.num_flops,
            (case.name, TORCH, mode),
            BAR,
        )


def measure_append(case: AppendCase) -> Iterator[Row]:
    """Rows of ``case``, one a mode; in place, for the caches are donated.

    Raises:
        RedGateError: a byte is wrong.
    """
    num_sets = case.num_sets(COLD_BYTES)
    slots, num_pages = slot_mapping(case)
    shape = case.num_tokens, case.num_kv_heads, case.head_dim
    rows = [
        tuple(jax.random.normal(jax.random.key(2 * seed + side), shape, jnp.bfloat16) for side in range(2))
        for seed in range(num_sets)
    ]
    for mode in APPEND_MODES:
        caches = [kvq_jax.KVCache.create(case.layout(mode), num_pages) for _ in range(num_sets)]
        state = {"caches": caches}

        def program(state: dict = state) -> object:
            state["caches"] = _append_in_turn(state["caches"], rows, jnp.asarray(slots, jnp.int32))
            return state["caches"]

        timing = device_time(program, max(CALLS, num_sets))
        bound = (case.name, TORCH, mode)
        yield Row("append", case.name, JAX, mode, timing, case.shape(), case.num_bytes(mode), versus=bound, bar=BAR)


@jax.jit
def _attend_in_turn(qs, caches, table, seq_lens) -> list[jax.Array]:
    """Every q is another, so that no two calls are the same to XLA."""
    return [kvq_jax.paged_attention(q, cache, table, seq_lens) for q, cache in zip(qs, itertools.cycle(caches))]


@functools.partial(jax.jit, donate_argnums=0)
def _append_in_turn(caches, rows, slots) -> list[kvq_jax.KVCache]:
    caches = list(caches)
    for call in range(max(CALLS, len(caches))):
        i = call % len(caches)
        caches[i] = kvq_jax.append_kv(caches[i], *rows[i], slots)
    return caches


@functools.partial(jax.jit, donate_argnums=0)
def _append(cache, k, v, slots) -> kvq_jax.KVCache:
    return kvq_jax.append_kv(cache, k, v, slots)


def _filled_cache(case: DecodeCase, mode: str, seed: int) -> kvq_jax.KVCache:
    cache = kvq_jax.KVCache.create(case.layout(mode), case.num_pages)
    key = jax.random.key(100 + seed)
    num_slots = case.num_pages * case.page_size
    for start in range(0, num_slots, CHUNK_TOKENS):
        shape = min(CHUNK_TOKENS, num_slots - start), case.num_kv_heads, case.head_dim
        k, v = (jax.random.normal(jax.random.fold_in(key, start + side), shape, jnp.bfloat16) for side in range(2))
        cache = _append(cache, k, v, jnp.arange(start, start + shape[0], dtype=jnp.int32))
    return cache


def _check(case: DecodeCase, mode: str, q, cache, table, seq_lens) -> None:
    out, lse = kvq_jax.paged_attention(q, cache, table, seq_lens, return_lse=True)
    for seq, head in gate.sampled(case):
        rows, heads, columns = gate.head_slices(case, seq, head)
        pages = np.asarray(cache.pages[table[seq, columns], head : head + 1])
        got = Attention(np.asarray(out[rows, heads]), np.asarray(lse[rows, heads]))
        gate.check_full(case, mode, seq, np.asarray(q[rows, heads]), pages, got)


def _queue_us(program: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        result = program()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) * 1e6


def main() -> int:
    """Measure, one row a line; exit status 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    selection = select(("jax",), parser.parse_args().quick)
    try:
        for case in selection.jax_decode:
            _print_rows(measure_decode(case))
        for case in selection.jax_append:
            _print_rows(measure_append(case))
    except gate.RedGateError as failure:
        print(failure, file=sys.stderr)
        return FAILURE
    return 0


def _print_rows(rows: Iterator[Row]) -> None:
    for row in rows:
        print(json.dumps(dataclasses.asdict(row)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
