"""Random layouts, options and lengths: the bytes of the reference, and attention within the rule."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvq_core.mla import MLA_MODES
from tests import backends, cases, mla_cases
from tests import inputs as make
from tests.case_types import AppendCase, AttentionCase, GatherCase
from tests.compare import Attention, assert_no_worse_than_naive, assert_same_bytes, with_one_nan
from tests.inputs import root
from tests.naive import naive_attention, naive_merge

EXAMPLES = {
    "torch-eager": 100,
    "jax-xla": 12,
    "torch-interpreter": 8,
    "jax-interpreter": 3,
    "torch-triton": 6,
    "jax-triton": 6,
}


@st.composite
def layouts(draw):
    modes = st.sampled_from(cases.MODES)
    dims = st.integers(1, 8).map(lambda n: 16 * n)
    return cases.layout_of(
        f"{draw(modes)}/{draw(modes)}",
        draw(st.integers(1, 20)),
        draw(st.integers(1, 3)),
        draw(dims),
        draw(dims),
        draw(st.sampled_from((None, None, *cases.ROW_ORDERS))),
    )


@st.composite
def append_cases(draw):
    return AppendCase(
        f"property-{draw(st.integers(0, 2**32))}",
        draw(layouts()),
        *(draw(st.sampled_from(cases.DTYPES)) for _ in "kv"),
        num_tokens=draw(st.none() | st.integers(0, 40)),
        slots=draw(st.sampled_from(["shuffled", "dropped", "none"])),
        slot_dtype=draw(st.sampled_from(["int32", "int64"])),
        k_scale=draw(st.floats(1e-3, 1e3)),
        v_scale=draw(st.floats(1e-3, 1e3)),
    )


@st.composite
def sequences(draw, most: int):
    """Queries, at most so many, and keys of some sequences; a single query often, as in a batch that also decodes."""
    lengths = draw(st.lists(st.integers(0, 60), min_size=1, max_size=4))
    counts = (draw(st.integers(0, most) | st.just(1)) for _ in lengths)
    return tuple((min(count, length), length) for count, length in zip(counts, lengths, strict=True))


@st.composite
def attention_cases(draw):
    kind = draw(st.sampled_from(["decode", "few", "ragged"]))
    ragged = kind != "decode"
    seqs = draw(sequences(8 if kind == "few" else 40))
    most = max(1, *(count for count, _ in seqs), 1)
    if not ragged:
        seqs = tuple((1, length) for _, length in seqs)
    return AttentionCase(
        f"property-{draw(st.integers(0, 2**32))}",
        draw(layouts()),
        seqs,
        group=draw(st.integers(1, 5)),
        ragged=ragged,
        q_dtype=draw(st.sampled_from(["bfloat16", "float16"])),
        padding_rows=draw(st.integers(0, 2)) if ragged else 0,
        max_seqlen_q=draw(st.integers(most, 16) if kind == "few" else st.none() | st.integers(most, most + 3)),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 70)),
        softcap=draw(st.none() | st.floats(1, 50)),
        sinks=draw(st.booleans()),
        alibi=draw(st.booleans()),
        v_exponents=draw(st.sampled_from([(0, 0), (-2, 2), (-4, -4), (2, 2)])),
        spare_columns=draw(st.integers(0, 3)),
        k_scale=draw(st.floats(0.1, 10)),
        v_scale=draw(st.floats(0.1, 10)),
    )


@st.composite
def mla_attention_cases(draw):
    ragged = draw(st.booleans())
    lengths = draw(st.lists(st.integers(0, 60), min_size=1, max_size=4))
    dims = st.integers(1, 5).map(lambda n: 16 * n)
    layout = mla_cases.layout_of(draw(st.sampled_from(MLA_MODES)), draw(st.integers(1, 20)), draw(dims), draw(dims))
    return mla_cases.attention(
        f"property-{draw(st.integers(0, 2**32))}",
        layout,
        draw(st.integers(1, 70)),
        seqs=tuple((draw(st.integers(0, min(length, 9))) if ragged else 1, length) for length in lengths),
        ragged=ragged,
        q_dtype=draw(st.sampled_from(["bfloat16", "float16"])),
        padding_rows=draw(st.integers(0, 2)) if ragged else 0,
        max_seqlen_q=draw(st.none() | st.just(9)),
        causal=draw(st.booleans()),
        k_exponents=draw(st.sampled_from([(0, 0), (-2, 2), (-4, -4), (2, 2)])),
        sm_scale=draw(st.sampled_from([0.15, 1e-3])),
        spare_columns=draw(st.integers(0, 3)),
    )


@st.composite
def gather_cases(draw):
    return GatherCase(
        f"property-{draw(st.integers(0, 2**32))}",
        draw(layouts()),
        tuple(draw(st.lists(st.integers(0, 60), max_size=4))),
        dtype=draw(st.sampled_from(cases.DTYPES)),
        spare_columns=draw(st.integers(0, 3)),
        k_scale=draw(st.floats(1e-3, 1e3)),
        v_scale=draw(st.floats(1e-3, 1e3)),
    )


@st.composite
def states(draw):
    """Parts of attention, among them some that saw no key, and values and log-sum-exps that are not finite."""
    rng = make.generator(f"states-{draw(st.integers(0, 2**32))}")
    sizes = (draw(st.integers(0, 5)), draw(st.integers(1, 3)))
    dtype, num_parts = draw(st.sampled_from(cases.DTYPES)), draw(st.integers(1, 5))
    spread, specials = draw(st.sampled_from([0.0, 1.0, 30.0, 1000.0])), draw(st.booleans())
    outs, lses = [], []
    for _ in range(num_parts):
        out = make.random_rows(rng, (*sizes, 16), dtype, (-4, 4))
        lse = (rng.standard_normal(sizes) * spread).astype(np.float32)
        lse[rng.random(sizes) < 0.3] = -np.inf
        out[(lse == -np.inf) & (rng.random(sizes) < 0.5)] = np.nan
        if specials:
            out[rng.random(out.shape) < 0.02] = rng.choice([np.nan, np.inf, -np.inf])
            lse[rng.random(sizes) < 0.1] = rng.choice([np.nan, np.inf])
        outs.append(out)
        lses.append(lse)
    return outs, lses


def examples_of(backend, test) -> None:
    """Run a property as often as ``backend`` can afford: XLA and Triton compile each, the interpreter crawls."""
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    settings(max_examples=EXAMPLES.get(backend.name, 20), suppress_health_check=checks)(test)()


@backends.parametrize_backends
def test_any_rows_into_any_layout_make_the_bytes_of_the_reference(backend):
    @given(append_cases())
    def appends(case):
        args = (case.layout, *case.inputs(), (case.k_scale, case.v_scale))
        got, want = (root(b.append(*args)) for b in (backend, backends.NUMPY))
        assert_same_bytes(got, want, case.layout)

    examples_of(backend, appends)


@backends.parametrize_backends
def test_any_rows_of_any_layout_are_read_as_by_the_reference(backend):
    @given(gather_cases())
    def gathers(case):
        args = (case.layout, *case.inputs(), case.dtype, (case.k_scale, case.v_scale))
        for got, want in zip(backend.gather(*args), backends.NUMPY.gather(*args), strict=True):
            assert_same_bytes(with_one_nan(got), with_one_nan(want))

    examples_of(backend, gathers)


@backends.parametrize_backends
def test_any_options_over_any_layout_attend_no_worse_than_naive(backend):
    @given(attention_cases())
    def attends(case):
        inputs = case.inputs()
        got, exact = (b.attention(case.layout, inputs, case.options()) for b in (backend, backends.NUMPY))
        assert_no_worse_than_naive(got, exact, Attention(*naive_attention(case, inputs)))

    examples_of(backend, attends)


@backends.parametrize_backends
def test_any_queries_over_any_mla_layout_attend_no_worse_than_naive(backend):
    @given(mla_attention_cases())
    def attends(case):
        inputs = case.inputs()
        got, exact = (b.attention(case.layout, inputs, case.options()) for b in (backend, backends.NUMPY))
        assert_no_worse_than_naive(got, exact, Attention(*naive_attention(case, inputs)))

    examples_of(backend, attends)


@backends.parametrize_backends
def test_any_states_merge_no_worse_than_naive(backend):
    @given(states())
    def merges(parts):
        got, exact = (b.merge_states(*parts) for b in (backend, backends.NUMPY))
        assert_no_worse_than_naive(got, exact, Attention(*naive_merge(*parts)))

    examples_of(backend, merges)
