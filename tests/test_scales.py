"""Per-tensor scales: derived from values, the same in both frameworks, and changed without compiling anything anew."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st

import kvq_jax
import kvq_torch
from kvq_core import codec, kv_scales_from_absmax
from kvq_core.modes import KVQuantMode
from tests import backends, cases
from tests import inputs as make

E4M3, E5M2 = "fp8_e4m3", "fp8_e5m2"


def rows(name: str, num_tokens: int = 40, exponent: float = 0.0, dtype: str = "float32") -> np.ndarray:
    return make.random_rows(make.generator(name), (num_tokens, 2, 64), dtype, (exponent, exponent))


def read_back(x: np.ndarray, mode: KVQuantMode, scale: float) -> np.ndarray:
    return codec.decode_rows(codec.encode_rows(x, mode, scale)[0], mode, scale)


def error(got: np.ndarray, x: np.ndarray) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - x) / np.linalg.norm(x.astype(np.float64)))


@pytest.mark.parametrize(
    ("kv_cache_dtype", "margin", "expected"),
    [
        (E4M3, 1.0, (448.0 / 448, 3.0 / 448)),
        ("fp8", 2.0, (2.0, 6.0 / 448)),
        (E5M2, 1.0, (448.0 / 57344, 3.0 / 57344)),
        (f"{E4M3}/{E5M2}", 1.5, (1.5, 4.5 / 57344)),
        (f"{E4M3}/int8_per_token_head", 1, (1.0, 1.0)),
        (f"bfloat16/{E4M3}", 1, (1.0, 3.0 / 448)),
    ],
)
def test_scale_is_absmax_times_margin_over_the_largest_code(kv_cache_dtype, margin, expected):
    scales = kv_scales_from_absmax(kv_cache_dtype, 448.0, 3.0, margin=margin)
    assert scales == tuple(float(np.float32(scale)) for scale in expected)


def test_zeros_and_what_is_nearly_zero_get_1_and_the_largest_stay_within_range():
    assert kv_scales_from_absmax(E4M3, 0.0, 1e-38) == (1.0, 1.0)
    for mode, absmax in ((E4M3, float(np.finfo(np.float32).max)), (E5M2, 1e-24)):
        for scale in kv_scales_from_absmax(mode, absmax, absmax):
            assert 9e-31 < scale < 1.1e30


@given(st.floats(2.0**-60, 2.0**60, width=32), st.sampled_from([E4M3, E5M2]), st.sampled_from([1.0, 1.1, 2.0]))
def test_the_largest_value_seen_does_not_saturate(absmax, name, margin):
    """Up to the last rounding, one float32 ulp, which a code of three bits does not show."""
    mode = KVQuantMode(name)
    scale, _ = kv_scales_from_absmax(name, absmax, 1.0, margin=margin)
    x = np.float32([[absmax, -absmax]])
    np.testing.assert_allclose(read_back(x, mode, scale), x, rtol=2**-4 if name == E4M3 else 2**-3)
    assert absmax / scale <= mode.qmax * (1 + 2**-23)


@pytest.mark.parametrize(("name", "octaves"), [(E4M3, 13), (E5M2, 28)])
def test_the_default_margin_rounds_no_value_differently_but_the_smallest(name, octaves):
    """What the default is justified with: a power of two moves exponents."""
    rng, mode = make.generator(f"margin-{name}"), KVQuantMode(name)
    x = (rng.choice([-1.0, 1.0], (100, 64)) * 2.0 ** rng.uniform(-octaves, 0, (100, 64))).astype(np.float32)
    absmax = float(np.abs(x).max())
    x = x[np.abs(x).min(axis=1) >= absmax * 2.0**-octaves]
    (doubled, _), (exact, _) = (
        kv_scales_from_absmax(name, absmax, 1.0, **options) for options in ({}, {"margin": 1.0})
    )
    assert doubled == 2 * exact
    np.testing.assert_array_equal(read_back(x, mode, doubled), read_back(x, mode, exact))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("int8_per_token_head", 1.0, 1.0, 2.0), ValueError, "fp8_e4m3 or fp8_e5m2 .* got 'int8_per_token_head'"),
        (("bfloat16/fp8_per_token_head", 1.0, 1.0, 2.0), ValueError, "no per-tensor scale to calibrate"),
        (("fp9", 1.0, 1.0, 2.0), ValueError, "expected a KV cache mode"),
        ((E4M3, 1.0, 1.0, 0.0), ValueError, "margin to be finite and above 0; got 0.0"),
        ((E4M3, 1.0, 1.0, math.inf), ValueError, "margin to be finite and above 0; got inf"),
        ((E4M3, 1.0, 1.0, math.nan), ValueError, "margin to be finite and above 0; got nan"),
        ((E4M3, 1.0, 1.0, "2"), TypeError, r"margin to be a number; got '2' \(str\)"),
        ((E4M3, 1.0, 1.0, True), TypeError, r"margin to be a number; got True"),
        ((E4M3, math.nan, 1.0, 2.0), ValueError, "finite K; got values whose largest magnitude is nan"),
        ((E4M3, 1.0, math.inf, 2.0), ValueError, "finite V; got values whose largest magnitude is inf"),
        ((E4M3, 1.0, -1.0, 2.0), ValueError, "V to be observed at least once"),
    ],
)
def test_rule_refuses(arguments, error, message):
    *absmax, margin = arguments
    with pytest.raises(error, match=message):
        kv_scales_from_absmax(*absmax, margin=margin)


class TorchCalibrator:
    name = "torch"

    def __init__(self, kv_cache_dtype: str = E4M3, **options) -> None:
        self.calibrator = kvq_torch.ScaleCalibrator(kv_cache_dtype, **options)

    def observe(self, k, v) -> None:
        self.calibrator.observe(*(backends.to_torch(x, "cpu") for x in (k, v)))

    def scales(self):
        return self.calibrator.scales()


class JaxCalibrator:
    name = "jax"

    def __init__(self, kv_cache_dtype: str = E4M3, **options) -> None:
        self.calibrator = kvq_jax.ScaleCalibrator.create(kv_cache_dtype, **options)

    def observe(self, k, v) -> None:
        self.calibrator = self.calibrator.observe(k, v)

    def scales(self):
        return self.calibrator.scales()


on_calibrators = pytest.mark.parametrize("make_calibrator", [TorchCalibrator, JaxCalibrator], ids=["torch", "jax"])


@on_calibrators
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_calibrator_follows_the_largest_magnitude_of_all_batches(make_calibrator, dtype):
    calibrator = make_calibrator(f"{E4M3}/{E5M2}", margin=1.25)
    k, v = [], []
    for batch, exponent in enumerate((0.0, 2.0, -3.0)):
        k.append(rows(f"k-{batch}", 7 + batch, exponent, dtype))
        v.append(rows(f"v-{batch}", 7 + batch, -exponent, dtype))
        calibrator.observe(k[-1], v[-1])
        absmax = (max(float(np.abs(x).max()) for x in side) for side in (k, v))
        assert calibrator.scales() == kv_scales_from_absmax(f"{E4M3}/{E5M2}", *absmax, margin=1.25)


@on_calibrators
def test_the_largest_magnitude_may_be_negative_and_of_any_shape(make_calibrator):
    calibrator = make_calibrator(margin=1.0)
    calibrator.observe(np.float32([[[1.0, -448.0]]]), np.array(-44.8, np.float32))
    assert calibrator.scales() == (1.0, float(np.float32(float(np.float32(44.8)) / 448)))


@on_calibrators
def test_empty_batches_count_as_nothing_and_zeros_as_zeros(make_calibrator):
    calibrator, empty, zeros = make_calibrator(), np.zeros((0, 2, 64), np.float32), np.zeros((1, 2, 64), np.float32)
    with pytest.raises(ValueError, match="K to be observed at least once"):
        calibrator.scales()
    calibrator.observe(empty, empty)
    with pytest.raises(ValueError, match="K to be observed at least once"):
        calibrator.scales()
    calibrator.observe(zeros, zeros)
    assert calibrator.scales() == (1.0, 1.0)


@on_calibrators
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_nonfinite_value_is_never_forgotten(make_calibrator, value):
    calibrator = make_calibrator()
    bad = rows("bad")
    bad[3, 1, 5] = value
    for v in (rows("before"), bad, rows("after", exponent=3.0)):
        calibrator.observe(rows("k"), v)
    with pytest.raises(ValueError, match=r"finite V; got values whose largest magnitude is (nan|inf)"):
        calibrator.scales()


@on_calibrators
def test_calibrator_refuses(make_calibrator):
    with pytest.raises(ValueError, match="no per-tensor scale"):
        make_calibrator("int8_per_token_head")
    with pytest.raises(ValueError, match="margin"):
        make_calibrator(margin=-1.0)
    calibrator = make_calibrator()
    with pytest.raises(TypeError, match="v of dtype bfloat16 or float16 or float32; got int32"):
        calibrator.observe(rows("k"), np.ones(3, np.int32))
    with pytest.raises(ValueError, match="K to be observed at least once"):
        calibrator.scales()  # the call that was refused left nothing behind


def test_torch_calibrator_refuses_other_devices_and_arrays():
    calibrator = kvq_torch.ScaleCalibrator(E4M3)
    with pytest.raises(ValueError, match=r"device of the calibrator, 'cpu'; got 'meta'. Make it with device='meta'"):
        calibrator.observe(torch.ones(3), torch.ones(3, device="meta"))
    with pytest.raises(TypeError, match=r"k to be a torch.Tensor; got ndarray"):
        calibrator.observe(np.ones(3, np.float32), torch.ones(3))  # pyright: ignore[reportArgumentType]


def test_jax_calibrator_is_a_carry_of_jit_and_scan():
    k, v = (jnp.stack([jnp.asarray(rows(f"{side}-{i}", exponent=i)) for i in range(3)]) for side in "kv")
    calibrator = kvq_jax.ScaleCalibrator.create(E4M3)
    scan = jax.jit(lambda start: jax.lax.scan(lambda state, kv: (state.observe(*kv), None), start, (k, v))[0])
    assert scan(calibrator).scales() == calibrator.observe(k, v).scales()


@pytest.mark.parametrize("backend", [backends.NUMPY, *backends.IN_PROCESS], ids=lambda backend: backend.name)
@pytest.mark.parametrize(("mode", "exponent"), [(E4M3, -4), (E4M3, 4), (E5M2, -6), (E5M2, 6)])
def test_calibrated_cache_holds_values_of_any_size_and_one_of_scale_1_does_not(backend, mode, exponent):
    """Rows of the amplitude that was calibrated for, but not those seen: off by half a step of their codes at most."""
    calibrator = JaxCalibrator(mode) if "jax" in backend.name else TorchCalibrator(mode)
    calibrator.observe(rows("seen-k", 400, exponent), rows("seen-v", 400, exponent))
    k, v = rows("unseen-k", exponent=exponent), rows("unseen-v", exponent=exponent)
    calibrated, plain = (_round_trip(backend, mode, k, v, scales) for scales in (calibrator.scales(), (1.0, 1.0)))
    for got, uncalibrated, x in zip(calibrated, plain, (k, v), strict=True):
        assert error(got, x) <= (2**-4 if mode == E4M3 else 2**-3)
        assert error(uncalibrated, x) > 4 * error(got, x)


def _round_trip(backend, mode, k, v, scales):
    layout = cases.layout_of(mode)
    num_pages = -(-len(k) // layout.page_size)
    pages = make.poisoned_pool(layout, num_pages)
    pages = backend.append(layout, pages, k, v, np.arange(len(k)), scales)
    table = np.arange(num_pages, dtype=np.int32)[None]
    values = backend.gather(layout, pages, table, np.array([len(k)], np.int32), "float32", scales)
    return tuple(x[0, : len(k)] for x in values)


LAYOUT = cases.layout_of(f"{E4M3}/{E5M2}", page=8)
TABLE, LENS, SLOTS = np.array([[0]], np.int32), np.array([6], np.int32), np.arange(6)
SCALES = ((1.0, 1.0), (0.37, 1.7), (1e-3, 1e3))


def _step_inputs() -> list[np.ndarray]:
    return [rows("step-k", 6), rows("step-v", 6), rows("step-q", 1)]


def test_a_new_scale_compiles_nothing_in_torch():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(cache, k, v, slots, table, lens, q):
        kvq_torch.append_kv_(cache, k, v, slots)
        return *kvq_torch.gather_kv(cache, table, lens), kvq_torch.paged_attention(q, cache, table, lens)

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    k, v, q = map(torch.from_numpy, _step_inputs())
    inputs = (k, v, *map(torch.from_numpy, (SLOTS, TABLE, LENS)), q)
    cache = kvq_torch.KVCache(LAYOUT, 1)
    for scales in SCALES:
        new = kvq_torch.KVCache(LAYOUT, 1, k_scale=scales[0], v_scale=scales[1])
        cache.k_scale.fill_(scales[0])
        cache.v_scale.fill_(scales[1])
        for same in (cache, new):
            got = compiled(same, *inputs)
            for x, want in zip(got, step(new, *inputs), strict=True):
                assert torch.equal(x, want)
    assert counter.frame_count == 1


def test_a_new_scale_traces_nothing_in_jax():
    traces = []

    @jax.jit
    def step(cache, k, v, q):
        traces.append(cache)
        cache = kvq_jax.append_kv(cache, k, v, SLOTS)
        return *kvq_jax.gather_kv(cache, TABLE, LENS), kvq_jax.paged_attention(q, cache, TABLE, LENS)

    inputs, results = _step_inputs(), []
    cache = kvq_jax.KVCache.create(LAYOUT, 1)
    for k_scale, v_scale in SCALES:
        results.append(step(kvq_jax.KVCache.create(LAYOUT, 1, k_scale=k_scale, v_scale=v_scale), *inputs))
        replaced = dataclasses.replace(cache, k_scale=jnp.float32(k_scale), v_scale=jnp.float32(v_scale))
        for got, want in zip(step(replaced, *inputs), results[-1], strict=True):
            assert (got == want).all()
    assert len(traces) == 1
    assert not (results[0][0] == results[1][0]).all()  # or the scale would not have counted


@pytest.mark.gpu
def test_cuda_graph_replay_follows_changed_scales_and_calibration():
    k, v, q = (torch.from_numpy(x).cuda() for x in _step_inputs())
    slots, table, lens = (torch.from_numpy(x).cuda() for x in (SLOTS, TABLE, LENS))
    cache = kvq_torch.KVCache(LAYOUT, 1, device="cuda")
    calibrator = kvq_torch.ScaleCalibrator(LAYOUT.kv_cache_dtype, device="cuda")

    def step():
        calibrator.observe(k, v)
        kvq_torch.append_kv_(cache, k, v, slots)
        return *kvq_torch.gather_kv(cache, table, lens), kvq_torch.paged_attention(q, cache, table, lens)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # refuses to capture whatever synchronises
        captured = step()
    k.mul_(3)
    for scale in (cache.k_scale, cache.v_scale):
        scale.fill_(0.37)
    graph.replay()
    replayed = [x.clone() for x in captured]
    for got, want in zip(replayed, step(), strict=True):
        assert torch.equal(got, want)
    absmax = (float(x.abs().max()) for x in (k, v))
    assert calibrator.scales() == kv_scales_from_absmax(LAYOUT.kv_cache_dtype, *absmax)
