"""What holds for merge_states besides its accuracy: forms of its arguments, compilers, limits, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import torch._dynamo.testing

import kvq_jax
import kvq_torch
from kvq_core import reference
from tests import backends, cases
from tests import inputs as make
from tests.compare import assert_same_bytes

IN_PROCESS = pytest.mark.parametrize("backend", backends.IN_PROCESS, ids=lambda backend: backend.name)
SHAPE = (3, 5, 4, 16)  # parts, queries, heads, columns


def states(dtype: str = "bfloat16", shape: tuple[int, ...] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    rng = make.generator(f"merge-states-{dtype}-{shape}")
    lses = rng.standard_normal(shape[:-1]).astype(np.float32) * 3
    return make.random_rows(rng, shape, dtype, (-1, 1)), lses


@pytest.mark.parametrize("case", cases.MERGE_CASES, ids=lambda case: case.name)
def test_reference_of_the_parts_merges_into_the_reference_of_the_whole(case):
    """In float64, so that only the definition is left to differ."""
    parts = [backends.NUMPY.attention(case.layout, *part) for part in case.parts()]
    got = reference.merge_states([part.out for part in parts], [part.lse for part in parts])
    want = backends.NUMPY.attention(case.layout, case.whole.inputs(), case.whole.options())
    for merged, whole in zip(got, want, strict=True):
        np.testing.assert_allclose(merged, whole, rtol=1e-12, atol=1e-12 * np.nanmax(np.abs(want.out), initial=0))


@IN_PROCESS
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_one_part_merges_into_itself(backend, dtype):
    outs, lses = states(dtype)
    got = backend.merge_states(outs[:1], lses[:1])
    assert_same_bytes(got.out, outs[0])
    assert_same_bytes(got.lse, lses[0])


def test_stacked_parts_strided_parts_and_a_sequence_of_parts_are_the_same():
    outs, lses = states()
    for merge, convert in ((kvq_torch.merge_states, _to_torch), (kvq_jax.merge_states, jnp.asarray)):
        stacked = merge(convert(outs), convert(lses))
        for got, want in zip(merge([convert(x) for x in outs], tuple(convert(x) for x in lses)), stacked, strict=True):
            assert (got == want).all()
    transposed = _to_torch(outs.swapaxes(1, 2).copy()).transpose(1, 2)
    for got, want in zip(
        kvq_torch.merge_states(transposed, _to_torch(lses)),
        kvq_torch.merge_states(_to_torch(outs), _to_torch(lses)),
        strict=True,
    ):
        assert torch.equal(got, want)


def _to_torch(x: np.ndarray) -> torch.Tensor:
    return backends.to_torch(x, "cpu")


@pytest.mark.parametrize("backend", [backends.NUMPY, *backends.IN_PROCESS], ids=lambda backend: backend.name)
class TestLimits:
    """Two parts of one query, one head and 16 columns."""

    def merge(self, backend, values, lses):
        outs = [np.full((1, 1, 16), value, np.float32) for value in values]
        out, lse = backend.merge_states(outs, [np.full((1, 1), lse, np.float32) for lse in lses])
        assert np.array_equal(out, np.broadcast_to(out[..., :1], out.shape), equal_nan=True)
        return float(out[0, 0, 0]), float(lse[0, 0])

    def test_a_part_that_saw_no_key_is_left_out_whatever_its_values(self, backend):
        for garbage in (0.0, 7.0, np.nan, np.inf):
            assert self.merge(backend, (garbage, 2.0), (-np.inf, 5.0)) == (2.0, 5.0)

    def test_parts_that_saw_no_key_merge_into_one_that_did_not(self, backend):
        assert self.merge(backend, (np.nan, 3.0), (-np.inf, -np.inf)) == (0.0, -np.inf)

    @pytest.mark.parametrize("lse", [np.nan, np.inf])
    @pytest.mark.parametrize("other", [0.0, -np.inf, np.inf, np.nan])
    def test_an_lse_of_nan_or_infinity_makes_the_result_nan(self, backend, lse, other):
        for values in ((1.0, 2.0), (np.inf, np.inf)):
            for lses in ((lse, other), (other, lse)):
                assert np.isnan(self.merge(backend, values, lses)).all()

    def test_nonfinite_values_reach_the_result_however_small_their_share(self, backend):
        assert self.merge(backend, (np.inf, 2.0), (-500.0, 500.0)) == (np.inf, 500.0)
        assert self.merge(backend, (-np.inf, 2.0), (0.0, 0.0))[0] == -np.inf
        assert np.isnan(self.merge(backend, (np.inf, -np.inf), (0.0, 0.0))[0])
        assert np.isnan(self.merge(backend, (np.nan, 2.0), (-500.0, 500.0))[0])

    def test_shares_neither_overflow_nor_vanish(self, backend):
        largest = float(np.finfo(np.float32).max)
        for lse in (-1e30, -1e4, 0.0, 1e4, 1e30):
            assert self.merge(backend, (4.0, 4.0), (lse, lse))[0] == 4.0
            assert self.merge(backend, (largest, 0.0), (lse, lse))[0] == pytest.approx(largest / 2, rel=1e-6)


@pytest.mark.parametrize("as_parts", [False, True])
def test_compiled_merge_equals_the_eager_one_and_compiles_once(as_parts):
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(kvq_torch.merge_states, backend=counter, fullgraph=True, dynamic=True)
    for num_queries in (5, 7, 9):
        outs, lses = map(_to_torch, states(shape=(3, num_queries, 4, 16)))
        args = (list(outs), list(lses)) if as_parts else (outs, lses)
        for got, want in zip(compiled(*args), kvq_torch.merge_states(*args), strict=True):
            assert torch.equal(got, want)
    assert counter.frame_count == 1


def test_jitted_merge_equals_the_eager_one():
    outs, lses = states()
    for args in ((outs, lses), (list(outs), list(lses))):
        for got, want in zip(jax.jit(kvq_jax.merge_states)(*args), kvq_jax.merge_states(*args), strict=True):
            assert_same_bytes(np.asarray(got), np.asarray(want))


def test_merge_changes_none_of_its_arguments():
    outs, lses = map(_to_torch, states("float32"))
    lses[0] = -torch.inf
    before = outs.clone(), lses.clone()
    kvq_torch.merge_states(outs, lses)
    assert torch.equal(outs, before[0])
    assert torch.equal(lses, before[1])


@pytest.mark.gpu
def test_merge_is_captured_by_a_cuda_graph_and_never_synchronises():
    outs, lses = (_to_torch(x).cuda() for x in states())
    kvq_torch.merge_states(outs, lses)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # refuses to capture whatever synchronises
        captured = kvq_torch.merge_states(outs, lses)
    outs.neg_()
    lses[0] = -torch.inf
    graph.replay()
    for got, want in zip(captured, kvq_torch.merge_states(outs, lses), strict=True):
        assert torch.equal(got, want)


BFLOAT16 = ml_dtypes.bfloat16
OUT, LSE = np.zeros((5, 4, 16), BFLOAT16), np.zeros((5, 4), np.float32)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ([], [], ValueError, "one part or more"),
        (OUT[:0, None], LSE[:0, None], ValueError, "one part or more"),
        ([OUT, OUT], [LSE], ValueError, "as many in lses as in outs; got 2 in outs and 1 in lses"),
        ([OUT, OUT], LSE, ValueError, "got 2 in outs and 5 in lses"),
        (OUT, LSE, ValueError, r"outs\[0\] of shape \[num_q_tokens, num_q_heads, head_dim_v\]; got \[4, 16\]"),
        ([OUT, OUT[:, :2]], [LSE, LSE], ValueError, r"outs\[1\] of shape .*num_q_heads=4, .*; got \[5, 2, 16\]"),
        ([OUT, OUT], [LSE, LSE[:3]], ValueError, r"lses\[1\] of shape \[num_q_tokens=5, num_q_heads=4\]; got \[3, 4\]"),
        ([OUT], [LSE[..., None]], ValueError, r"lses\[0\] of shape"),
        ([OUT, OUT.astype("float32")], [LSE, LSE], TypeError, r"outs\[1\] of dtype bfloat16; got float32"),
        ([OUT.astype("int8")], [LSE], TypeError, r"outs\[0\] of dtype bfloat16 or float16 or float32; got int8"),
        ([OUT], [LSE.astype(BFLOAT16)], TypeError, r"lses\[0\] of dtype float32; got bfloat16"),
        ("abc", [LSE], TypeError, "outs"),
        (OUT[None], 3.0, TypeError, "lses to be .* a sequence of them; got float"),
    ],
)
def test_merge_refuses(outs, lses, error, message):
    for merge, convert in ((kvq_torch.merge_states, _to_torch), (kvq_jax.merge_states, jnp.asarray)):
        arguments = [
            convert(x) if isinstance(x, np.ndarray) else [convert(part) for part in x] if isinstance(x, list) else x
            for x in (outs, lses)
        ]
        with pytest.raises(error, match=message):
            merge(*arguments)


def test_torch_merge_refuses_parts_of_several_devices():
    out, lse = _to_torch(OUT), _to_torch(LSE)
    with pytest.raises(ValueError, match=r"outs\[1\] on the device of outs\[0\], 'cpu'; got 'meta'. Gather"):
        kvq_torch.merge_states([out, out.to("meta")], [lse, lse])
    with pytest.raises(ValueError, match=r"lses\[0\] on the device of outs\[0\]"):
        kvq_torch.merge_states([out, out], [lse.to("meta"), lse])
