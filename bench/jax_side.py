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
from bench import gate, tables
from bench.cases import AppendCase, DecodeCase, select
from bench.rows import JAX, TORCH, Bar, Row, Timing
from tests import backends
from tests.compare import Attention

SAMPLES = 9
SAMPLE_US = 60_000.0
SHORT, LONG = 4, 20  # calls in one program
COLD_BYTES = 256 * 2**20
CHUNK_TOKENS = 2**17
CHECKED_TOKENS = 2048
_, BACKEND, _ = backends.ON_GPU
BAR = Bar("ratio", 1.03)
FAILURE = 1


def device_time(short: Callable[[], object], long: Callable[[], object]) -> Timing:
    """Time of one call, from programs that make `SHORT` and `LONG` calls.

    A program is dispatched many times without waiting, so the host runs ahead and the wall time of the queue is the
    device's. The difference of the two takes out what a program costs once, however many calls it makes.
    """
    for program in (short, long):
        jax.block_until_ready(program())
    repeats = max(4, math.ceil(SAMPLE_US / (_queue_us(long, 2) / 2)))
    differences = [_queue_us(long, repeats) - _queue_us(short, repeats) for _ in range(SAMPLES)]
    return Timing.of([difference / repeats / (LONG - SHORT) for difference in differences])


def measure_decode(case: DecodeCase) -> Iterator[Row]:
    """Rows of ``case``, one a mode.

    Raises:
        RedGateError: a result is wrong.
    """
    num_sets = case.num_sets(COLD_BYTES)
    table, seq_lens = jnp.asarray(tables.page_table(case)), jnp.asarray(case.seq_lens, jnp.int32)
    shape = len(case.seq_lens), case.num_q_heads, case.head_dim
    qs = [jax.random.normal(jax.random.key(call), shape, jnp.bfloat16) for call in range(LONG)]
    for mode in case.modes:
        gate.check_small(BACKEND, case, mode)
        caches = [_filled_cache(case, mode, seed) for seed in range(num_sets)]
        _check(case, mode, qs[0], caches[0], table, seq_lens)
        programs = [functools.partial(_attend_in_turn, qs[:calls], caches, table, seq_lens) for calls in (SHORT, LONG)]
        yield Row(
            "decode",
            case.name,
            JAX,
            mode,
            device_time(*programs),
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
    slots, num_pages = tables.slot_mapping(case)
    slots = [jnp.array(slots, jnp.int32) for _ in range(LONG)]
    shape = case.num_tokens, case.num_kv_heads, case.head_dim
    rows = [
        tuple(jax.random.normal(jax.random.key(2 * seed + side), shape, jnp.bfloat16) for side in range(2))
        for seed in range(num_sets)
    ]
    for mode in case.modes:
        caches = [kvq_jax.KVCache.create(case.layout(mode), num_pages) for _ in range(num_sets)]
        caches = _append_in_turn(caches, rows, slots)
        _check_append(case, mode, rows[0], slots[0], caches[0])
        timing = device_time(*_append_programs(caches, rows, slots))
        bound = (case.name, TORCH, mode)
        yield Row("append", case.name, JAX, mode, timing, case.shape(), case.num_bytes(mode), versus=bound, bar=BAR)


@jax.jit
def _attend_in_turn(qs, caches, table, seq_lens) -> list[jax.Array]:
    """Every q is another, so that no two calls are the same to XLA."""
    return [kvq_jax.paged_attention(q, cache, table, seq_lens) for q, cache in zip(qs, itertools.cycle(caches))]


@functools.partial(jax.jit, donate_argnums=0)
def _append_in_turn(caches, rows, slots) -> list[kvq_jax.KVCache]:
    """Slots are an array for each call, or XLA would look for duplicates in them once for all calls."""
    caches = list(caches)
    for call, slot_mapping in enumerate(slots):
        i = call % len(caches)
        k, v = rows[i]
        caches[i] = kvq_jax.append_kv(caches[i], k, v, slot_mapping)
    return caches


def _append_programs(caches, rows, slots) -> list[Callable[[], object]]:
    """`_append_in_turn` of `SHORT` and `LONG` calls on its own last results, since it consumes what it is given."""

    def program(calls: int) -> object:
        nonlocal caches
        caches = _append_in_turn(caches, rows, slots[:calls])
        return caches

    return [functools.partial(program, calls) for calls in (SHORT, LONG)]


@functools.partial(jax.jit, donate_argnums=0)
def _append(cache, k, v, slots) -> kvq_jax.KVCache:
    return kvq_jax.append_kv(cache, k, v, slots)


def _filled_cache(case: DecodeCase, mode: str, seed: int) -> kvq_jax.KVCache:
    cache = kvq_jax.KVCache.create(case.layout(mode), case.num_pages)
    key = jax.random.key(100 + seed)
    num_slots = case.num_pages * case.page_size
    for start in range(0, num_slots, CHUNK_TOKENS):
        shape = min(CHUNK_TOKENS, num_slots - start), case.num_kv_heads, case.head_dim
        k, v = (jax.random.normal(jax.random.fold_in(key, start + side), shape, jnp.bfloat16) for side in (0, 1))
        cache = _append(cache, k, v, jnp.arange(start, start + shape[0], dtype=jnp.int32))
    return cache


def _check(case: DecodeCase, mode: str, q, cache, table, seq_lens) -> None:
    out, lse = kvq_jax.paged_attention(q, cache, table, seq_lens, return_lse=True)
    for seq, head in gate.sampled(case):
        rows, heads, columns = gate.head_slices(case, seq, head)
        pages = np.asarray(cache.pages[table[seq, columns], head : head + 1])
        got = Attention(np.asarray(out[rows, heads]), np.asarray(lse[rows, heads]))
        gate.check_full(case, mode, seq, np.asarray(q[rows, heads]), pages, got)


def _check_append(case: AppendCase, mode: str, kv, slots, cache: kvq_jax.KVCache) -> None:
    """The first tokens, whose pages are full; numpy would take minutes for all."""
    page_ids = slots[: CHECKED_TOKENS : case.page_size] // case.page_size
    k, v = (np.asarray(x[:CHECKED_TOKENS]) for x in kv)
    gate.check_append(case, mode, k, v, np.asarray(cache.pages[page_ids]))


def _queue_us(program: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    results = [program() for _ in range(repeats)][-1]
    jax.block_until_ready(results)
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
