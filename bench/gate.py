"""Correctness before speed: nothing is reported of a program whose results are wrong.

The rules and their yardsticks are those of the tests: bytes equal to the reference, attention by DESIGN.md section 4.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np

from bench.cases import AppendCase as AppendBenchCase
from bench.cases import DecodeCase
from kvq_core import reference
from tests import backends
from tests.case_types import AppendCase, AttentionCase, AttentionInputs
from tests.compare import Attention, assert_no_worse_than_naive, assert_same_bytes
from tests.naive import naive_attention


class RedGateError(Exception):
    """A result that is wrong."""


def check_small(backend: backends.TorchBackend | backends.JaxBackend, case: DecodeCase, mode: str) -> None:
    """The layout, heads and options of ``case`` on short sequences: bytes and attention against the reference.

    Raises:
        RedGateError: they differ.
    """
    layout, name = case.layout(mode), f"{case.name} {mode}"
    append = AppendCase(f"gate {name}", layout)
    seqs = ((case.queries, 150), (case.queries, 37 + case.queries))
    group = case.num_q_heads // case.num_kv_heads
    attention = AttentionCase(
        f"gate {name}",
        layout,
        seqs,
        group=group,
        ragged=case.queries > 1,
        max_seqlen_q=case.queries if case.queries > 1 else None,
        window=None if case.window is None else min(case.window, 40),
        k_exponents=(-2, 0),
        v_exponents=(-4, 4),
    )
    with _gate(f"{backend.name}, small, {name}"):
        got, want = (b.append(layout, *append.inputs(), (1.0, 1.0)) for b in (backend, backends.NUMPY))
        assert_same_bytes(got, want, layout)
        inputs = attention.inputs()
        _check_attention(attention, inputs, backend.attention(layout, inputs, attention.options()))


def check_full(case: DecodeCase, mode: str, seq: int, q: np.ndarray, pages: np.ndarray, got: Attention) -> None:
    """One KV head of sequence ``seq`` of a full-size call.

    Args:
        case: the case that ran.
        mode: how K and V are stored.
        seq: index of the sequence.
        q: ``[queries, group, head_dim]``, the queries of that head.
        pages: uint8 ``[pages of the sequence, 1, record_bytes]``, that head of its pages, in order.
        got: the results for q.

    Raises:
        RedGateError: they are wrong.
    """
    layout, seq_len = case.layout(mode).shard(case.num_kv_heads), case.seq_lens[seq]
    sizes = {"group": q.shape[1], "ragged": True, "max_seqlen_q": case.queries, "window": case.window}
    attention = AttentionCase(f"{case.name} {mode}", layout, ((case.queries, seq_len),), **sizes)
    inputs = AttentionInputs(
        q=q,
        pages=pages,
        page_table=np.arange(len(pages), dtype=np.int32)[None],
        seq_lens=np.array([seq_len], np.int32),
        cu_seqlens_q=np.array([0, case.queries], np.int32),
        sinks=None,
        alibi_slopes=None,
        k_scale=1.0,
        v_scale=1.0,
    )
    with _gate(f"full size, {case.name} {mode}, sequence {seq}"):
        _check_attention(attention, inputs, got)


def check_append(case: AppendBenchCase, mode: str, k: np.ndarray, v: np.ndarray, pages: np.ndarray) -> None:
    """Pages ``[n, num_kv_heads, record_bytes]`` that hold the tokens of k and v, in order, of a full-size call.

    Raises:
        RedGateError: a byte differs from the reference.
    """
    layout = case.layout(mode)
    want = np.zeros_like(pages)
    reference.append_kv(layout, want, k, v, np.arange(len(k)))
    with _gate(f"full size, {case.name} {mode}"):
        assert_same_bytes(pages, want, layout)


def check_close(what: str, error: float, allowed: float) -> None:
    """Refuse a relative error above ``allowed``, NaN included.

    Raises:
        RedGateError: it is.
    """
    with _gate(what):
        assert error <= allowed, f"relative error {error:.3e}, allowed {allowed:.3e}"


def sampled(case: DecodeCase) -> list[tuple[int, int]]:
    """(sequence, KV head) of which `check_full` looks at the results: the first and the last."""
    return [(0, 0), (len(case.seq_lens) - 1, case.num_kv_heads - 1)]


def head_slices(case: DecodeCase, seq: int, head: int) -> tuple[slice, slice, slice]:
    """Rows of q, query heads, and columns of the page table of one KV head of one sequence."""
    group = case.num_q_heads // case.num_kv_heads
    rows = slice(seq * case.queries, (seq + 1) * case.queries)
    return rows, slice(head * group, (head + 1) * group), slice(0, case.pages_of[seq])


def _check_attention(case: AttentionCase, inputs: AttentionInputs, got: Attention) -> None:
    exact = backends.NUMPY.attention(case.layout, inputs, case.options())
    assert_no_worse_than_naive(got, exact, Attention(*naive_attention(case, inputs)))


@contextlib.contextmanager
def _gate(what: str) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        raise RedGateError(f"{what}: {error}") from error
