"""What holds for the torch ops besides their results: schemas, compilers, wrapping, refusals."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode

from kvq_core import CacheLayout, reference
from kvq_torch import KVCache, _library, append_kv_, copy_pages_, gather_kv, paged_attention

LAYOUT = CacheLayout("int8_per_token_head/fp8_e4m3", page_size=4, num_kv_heads=2, head_dim=16, head_dim_v=32)
NUM_PAGES = 6
PAGE_TABLE = torch.tensor([[0, 2], [3, 1]], dtype=torch.int32)
SEQ_LENS = torch.tensor([5, 7], dtype=torch.int32)
CU_SEQLENS_Q = torch.tensor([0, 3, 4], dtype=torch.int32)
SLOTS = torch.tensor([0, 1, 9, -1, 5])


needs_compiled_triton = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the refusal is about CPU tensors without the interpreter"
)


def _values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _kv(num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return _values(num_tokens, 2, 16, seed=1, dtype=dtype), _values(num_tokens, 2, 32, seed=2, dtype=dtype)


def _filled_cache(**kwargs) -> KVCache:
    cache = KVCache(LAYOUT, NUM_PAGES, v_scale=0.5, **kwargs)
    append_kv_(cache, *_kv(NUM_PAGES * LAYOUT.page_size), torch.arange(NUM_PAGES * LAYOUT.page_size))
    return cache


def _op_calls() -> dict:
    cache = _filled_cache()
    scales = cache.k_scale, cache.v_scale
    k, v = _kv(len(SLOTS), torch.bfloat16)
    q = _values(4, 4, 16)
    per_head = _values(4)
    static = (None, None, None, True, None, None, None, None, cache.fingerprint, None)
    sparse = (2, 4, 0.3, False, 3, 10.0, per_head, per_head.abs(), cache.fingerprint, "eager")
    transposed_k = k.transpose(0, 1).contiguous().transpose(0, 1)
    transposed_q = _values(4, 4, 16).transpose(0, 1)
    return {
        "append": (_library.append_kv_op, (cache.pages, *scales, k, v, SLOTS, cache.fingerprint, None)),
        "append_strided": (
            _library.append_kv_op,
            (_strided_pool(cache.pages), *scales, transposed_k, v, SLOTS.int(), cache.fingerprint, "eager"),
        ),
        "gather": (
            _library.gather_kv_op,
            (cache.pages, *scales, PAGE_TABLE, SEQ_LENS, torch.bfloat16, cache.fingerprint, None),
        ),
        "copy": (_library.copy_pages_op, (cache.pages, torch.tensor([0, 9]), torch.tensor([4, 5]), None)),
        "decode": (_library.paged_attention_op, (q[:2], cache.pages, *scales, PAGE_TABLE, SEQ_LENS, None, *static)),
        "prefill": (
            _library.paged_attention_op,
            (transposed_q, cache.pages, *scales, PAGE_TABLE, SEQ_LENS, CU_SEQLENS_Q, *sparse),
        ),
    }


def _strided_pool(pages: torch.Tensor) -> torch.Tensor:
    """A copy of ``pages`` in a tensor shared with another layer, 0xFF all over the other."""
    pool = torch.full((pages.shape[0], 2, *pages.shape[1:]), 0xFF, dtype=torch.uint8)
    pool[:, 0] = pages
    return pool[:, 0]


@pytest.mark.parametrize("name", ["append", "append_strided", "gather", "copy", "decode", "prefill"])
def test_op_schema_fake_kernel_and_autograd_agree_with_the_implementation(name):
    op, args = _op_calls()[name]
    torch.library.opcheck(op, args)


def _step(cache, k, v, slots, q):
    append_kv_(cache, k, v, slots)
    copy_pages_(cache, torch.tensor([0]), torch.tensor([5]))
    dense_k, dense_v = gather_kv(cache, PAGE_TABLE, SEQ_LENS)
    decoded = paged_attention(q[:2], cache, PAGE_TABLE, SEQ_LENS, window=3)
    out, lse = paged_attention(
        q, cache, PAGE_TABLE, SEQ_LENS, cu_seqlens_q=CU_SEQLENS_Q, max_seqlen_q=3, return_lse=True
    )
    return dense_k, dense_v, decoded, out, lse


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_step_without_graph_breaks_equals_the_eager_one(dynamic):
    torch.compiler.reset()
    compiled = torch.compile(_step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    expected_cache, cache = _filled_cache(), _filled_cache()
    for num_tokens in (5, 3):
        inputs = (*_kv(num_tokens, torch.bfloat16), SLOTS[:num_tokens], _values(4, 4, 16))
        for expected, got in zip(_step(expected_cache, *inputs), compiled(cache, *inputs), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
        assert torch.equal(cache.pages, expected_cache.pages)


def test_compiled_step_compiles_once_for_all_token_counts():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    append = torch.compile(append_kv_, backend=counter, fullgraph=True, dynamic=True)
    cache = KVCache(LAYOUT, NUM_PAGES)
    for num_tokens in (3, 5, 7):
        append(cache, *_kv(num_tokens), torch.arange(num_tokens))
    assert counter.frame_count == 1


def test_eager_ops_never_read_a_value_back_to_the_host():
    """Fake tensors have no values: whatever asks for one raises."""
    mode = FakeTensorMode()
    for op, args in _op_calls().values():
        operands = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args[:-1]]
        with mode:
            results = getattr(_library, f"_{op._opname}")(*operands, "eager")
        if op is _library.paged_attention_op:
            assert results[0].shape == (*operands[0].shape[:2], LAYOUT.head_dim_v)


def test_gradients_do_not_disturb_a_call():
    cache = _filled_cache()
    q = _values(2, 4, 16)
    expected = paged_attention(q, cache, PAGE_TABLE, SEQ_LENS)
    assert torch.equal(paged_attention(q.requires_grad_(), cache, PAGE_TABLE, SEQ_LENS).detach(), expected)


def test_allocated_cache_is_zero_and_describes_itself():
    cache = KVCache(LAYOUT, 3, k_scale=torch.tensor([0.25], dtype=torch.float64), v_scale=2)
    assert cache.pages.shape == LAYOUT.shape(3)
    assert cache.pages.dtype == torch.uint8
    assert not cache.pages.any()
    assert cache.num_pages == 3
    assert cache.layout is LAYOUT
    for scale, value in ((cache.k_scale, 0.25), (cache.v_scale, 2.0)):
        assert scale.shape == ()
        assert scale.dtype == torch.float32
        assert scale == value
    assert LAYOUT.fingerprint() in repr(cache)


def test_a_float32_scale_tensor_is_shared_not_copied():
    scale = torch.ones(())
    cache = KVCache(LAYOUT, 1, k_scale=scale)
    scale.fill_(3.0)
    assert cache.k_scale == 3.0


def test_wrapped_strided_pool_is_written_in_place_and_nothing_beside_it():
    cache = _filled_cache()
    pool = torch.full((NUM_PAGES, 2, *LAYOUT.shape(1)[1:]), 0xFF, dtype=torch.uint8)
    pool[:, 0] = 0
    wrapped = KVCache(LAYOUT, pages=pool[:, 0], v_scale=0.5)
    append_kv_(wrapped, *_kv(NUM_PAGES * LAYOUT.page_size), torch.arange(NUM_PAGES * LAYOUT.page_size))
    assert torch.equal(pool[:, 0], cache.pages)
    assert (pool[:, 1] == 0xFF).all()
    q = _values(2, 4, 16)
    args = (PAGE_TABLE, SEQ_LENS)
    assert torch.equal(paged_attention(q, wrapped, *args), paged_attention(q, cache, *args))
    for got, expected in zip(gather_kv(wrapped, *args), gather_kv(cache, *args), strict=True):
        assert torch.equal(got, expected)
    copy_pages_(wrapped, torch.tensor([1]), torch.tensor([4]))
    assert torch.equal(pool[4, 0], pool[1, 0])
    assert (pool[:, 1] == 0xFF).all()


ROWS = dataclasses.replace(LAYOUT, scale_placement="row", compute_dtype=None)
# One tensor of all layers, slots before heads: [layers, pages, slots, heads, row], the rows 68 bytes.
LAYERS = (3, NUM_PAGES, ROWS.page_size, ROWS.num_kv_heads, ROWS.row_bytes)


@pytest.mark.parametrize("wrap", [lambda f: f, functools.partial(torch.compile, backend="aot_eager", fullgraph=True)])
def test_wrapped_row_container_is_written_in_place_and_nothing_beside_it(wrap):
    layers = torch.full(LAYERS, 0xFF, dtype=torch.uint8)
    cache = KVCache(ROWS, pages=layers[1].transpose(1, 2), v_scale=0.5)
    k, v = _kv(NUM_PAGES * ROWS.page_size)

    def step(slots):
        append_kv_(cache, k, v, slots)
        return gather_kv(cache, PAGE_TABLE, SEQ_LENS)

    read = wrap(step)(torch.arange(NUM_PAGES * ROWS.page_size))
    for got, expected in zip(read, gather_kv(_filled_cache(), PAGE_TABLE, SEQ_LENS), strict=True):
        assert torch.equal(got, expected)
    for layer in (0, 2):
        assert (layers[layer] == 0xFF).all()
    slots_first = dataclasses.replace(ROWS, row_order="NHD", compute_dtype=None)
    for got, expected in zip(
        gather_kv(KVCache(slots_first, pages=layers[1], v_scale=0.5), PAGE_TABLE, SEQ_LENS), read, strict=True
    ):
        assert torch.equal(got, expected)


def test_a_row_container_starts_at_a_multiple_of_what_its_strides_are():
    buffer = torch.zeros(6 + ROWS.page_bytes, dtype=torch.uint8)
    assert KVCache(ROWS, pages=buffer[4:-2].view(ROWS.shape(1))).num_pages == 1
    with pytest.raises(ValueError, match="start at a multiple of 4 bytes"):
        KVCache(ROWS, pages=buffer[2:-4].view(ROWS.shape(1)))


def test_wrapped_shard_of_the_kv_heads_works_alone():
    cache = KVCache(LAYOUT, pages=torch.zeros(NUM_PAGES, 1, LAYOUT.record_bytes, dtype=torch.uint8), v_scale=0.5)
    k, v = _kv(NUM_PAGES * LAYOUT.page_size)
    append_kv_(cache, k[:, :1], v[:, :1], torch.arange(NUM_PAGES * LAYOUT.page_size))
    assert torch.equal(cache.pages, _filled_cache().pages[:, :1])


@pytest.mark.parametrize("slots", [[-1, 24, 2**31 - 1, -(2**31)], [3, -1, 24, 3], [0, 0, 0, 0]])
def test_dropped_and_duplicate_slots_leave_one_token_whole_or_nothing(slots):
    cache = KVCache(LAYOUT, NUM_PAGES)
    cache.pages.fill_(0xFF)
    k, v = _kv(len(slots))
    append_kv_(cache, k, v, torch.tensor(slots))
    kept = sorted({slot for slot in slots if 0 <= slot < NUM_PAGES * LAYOUT.page_size})
    candidates = [[token for token, other in enumerate(slots) if other == slot] for slot in kept]
    possible = [np.full(LAYOUT.shape(NUM_PAGES), 0xFF, np.uint8) for _ in range(max(map(len, candidates), default=1))]
    for choice, pages in enumerate(possible):
        tokens = [c[choice] for c in candidates]
        if tokens:
            reference.append_kv(LAYOUT, pages, k[tokens].numpy(), v[tokens].numpy(), np.array(kept))
    assert any(np.array_equal(cache.pages.numpy(), pages) for pages in possible)


def test_long_prefill_in_chunks_equals_one_pass(monkeypatch):
    cache = _filled_cache()
    args = (_values(4, 4, 16), cache, PAGE_TABLE, SEQ_LENS)
    whole = paged_attention(*args, cu_seqlens_q=CU_SEQLENS_Q, sinks=_values(4), alibi_slopes=_values(4), impl="eager")
    monkeypatch.setattr("kvq_torch._eager_attention._CHUNK_BYTES", 64)
    chunked = paged_attention(*args, cu_seqlens_q=CU_SEQLENS_Q, sinks=_values(4), alibi_slopes=_values(4), impl="eager")
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-6)


def test_nonfinite_v_reaches_only_the_queries_that_see_it():
    layout = CacheLayout("float32", page_size=4, num_kv_heads=1, head_dim=16)
    cache = KVCache(layout, 1)
    v = torch.zeros(4, 1, 16)
    v[2, 0, 0], v[2, 0, 1], v[2, 0, 2] = torch.nan, torch.inf, -torch.inf
    append_kv_(cache, torch.zeros(4, 1, 16), v, torch.arange(4))
    table, lens, cu = (torch.tensor(x, dtype=torch.int32) for x in ([[0]], [4], [0, 4]))
    out = paged_attention(torch.zeros(4, 1, 16), cache, table, lens, cu_seqlens_q=cu, window=1)
    expected = torch.zeros(4, 1, 16)
    expected[2, 0, :3] = v[2, 0, :3]
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


POOL = torch.zeros(NUM_PAGES, 2, LAYOUT.record_bytes + 16, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "message", "kwargs"),
    [
        (ValueError, "exactly one of num_pages .* got neither", {}),
        (ValueError, "exactly one of num_pages .* got both", {"num_pages": 1, "pages": POOL}),
        (ValueError, "num_pages to be an integer from 1", {"num_pages": 0}),
        (TypeError, "integer", {"num_pages": 2.5}),
        (TypeError, "torch.Tensor; got ndarray", {"pages": POOL.numpy()}),
        (TypeError, "pages of dtype uint8; got int8", {"pages": POOL.to(torch.int8)}),
        (ValueError, "record_bytes=", {"pages": POOL}),
        (ValueError, "contiguous records", {"pages": POOL[:, :, : LAYOUT.record_bytes]}),
        (
            ValueError,
            "page stride",
            {"pages": torch.zeros(1, *LAYOUT.shape(1)[1:], dtype=torch.uint8).expand(3, -1, -1)},
        ),
        (
            ValueError,
            "multiple of 16 bytes",
            {"pages": POOL.flatten()[1 : 1 + LAYOUT.page_bytes].view(LAYOUT.shape(1))},
        ),
        (ValueError, "on device 'meta'", {"pages": torch.zeros(LAYOUT.shape(1), dtype=torch.uint8), "device": "meta"}),
        (ValueError, "k_scale to be a number or a tensor of one", {"num_pages": 1, "k_scale": torch.ones(2)}),
    ],
)
def test_cache_refuses(error, message, kwargs):
    with pytest.raises(error, match=message):
        KVCache(LAYOUT, **kwargs)


def _attend(**kwargs):
    return paged_attention(_values(2, 4, 16), _filled_cache(), PAGE_TABLE, SEQ_LENS, **kwargs)


def _gather(dtype):
    return gather_kv(_filled_cache(), PAGE_TABLE, SEQ_LENS, dtype=dtype)


def _append(**kwargs):
    k, v = _kv(2)
    arguments: dict = {"k": k, "v": v, "slot_mapping": torch.arange(2)} | kwargs
    return append_kv_(_filled_cache(), **arguments)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "k to be a torch.Tensor; got ndarray", lambda: _append(k=np.zeros((2, 2, 16), np.float32))),
        (TypeError, "k of dtype .* got float64", lambda: _append(k=torch.zeros(2, 2, 16).double())),
        (ValueError, "k of shape .*num_kv_heads=2", lambda: _append(k=torch.zeros(2, 1, 16))),
        (
            ValueError,
            "slot_mapping on the device .*'meta'",
            lambda: _append(slot_mapping=torch.arange(2, device="meta")),
        ),
        (ValueError, "sinks on the device .*'meta'", lambda: _attend(sinks=torch.zeros(4, device="meta"))),
        (TypeError, "sinks to be None or a torch.Tensor", lambda: _attend(sinks=[0.0] * 4)),
        (TypeError, "window .* Python integer; got tensor", lambda: _attend(window=torch.tensor(3))),
        (TypeError, "window .* Python integer; got True", lambda: _attend(window=True)),
        (ValueError, "window to be None or an integer from 1; got 0", lambda: _attend(window=0)),
        (TypeError, "sm_scale .* Python number; got tensor", lambda: _attend(sm_scale=torch.tensor(1.0))),
        (ValueError, "softcap above 0", lambda: _attend(softcap=-1.0)),
        (TypeError, "causal to be True or False", lambda: _attend(causal=1)),
        (
            TypeError,
            "dtype to be a torch.dtype",
            lambda: _gather("float32"),
        ),
        (
            TypeError,
            "dtype of the result",
            lambda: _gather(torch.float64),
        ),
        (ValueError, "one of .*'triton'.*; got 'cudnn'", lambda: _attend(impl="cudnn")),
        (TypeError, "impl to be None or a string", lambda: _attend(impl=3)),
        (
            NotImplementedError,
            "'sdpa' is a way to attend",
            lambda: gather_kv(_filled_cache(), PAGE_TABLE, SEQ_LENS, impl="sdpa"),
        ),
        (ValueError, "impl='sdpa' got tensors on a CPU", lambda: _attend(impl="sdpa")),
    ],
)
def test_op_refuses(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_refused_append_writes_nothing():
    cache = _filled_cache()
    before = cache.pages.clone()
    k, v = _kv(2)
    with pytest.raises(ValueError):
        append_kv_(cache, k, v[:1], torch.arange(2))
    assert torch.equal(cache.pages, before)


@needs_compiled_triton
@pytest.mark.parametrize(
    "call",
    [
        lambda: _append(impl="triton"),
        lambda: _attend(impl="triton"),
        lambda: gather_kv(_filled_cache(), PAGE_TABLE, SEQ_LENS, impl="triton"),
        lambda: copy_pages_(_filled_cache(), torch.tensor([0]), torch.tensor([1]), impl="triton"),
    ],
)
def test_explicit_triton_on_a_cpu_is_refused_and_never_becomes_eager(call):
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        call()


def test_explicit_impl_runs_that_implementation_and_none_runs_eager_on_a_cpu(monkeypatch):
    calls = []
    monkeypatch.setattr(_library._eager, "copy_pages_", lambda *args: calls.append("eager"))
    copy = functools.partial(copy_pages_, _filled_cache(), torch.tensor([0]), torch.tensor([1]))
    copy()
    copy(impl="eager")
    assert calls == ["eager", "eager"]


def _gpu_step(impl):
    """A cache, its inputs and a step on a GPU, run once so that kernels are compiled."""
    cache = KVCache(LAYOUT, NUM_PAGES, device="cuda")
    inputs = [x.cuda() for x in (*_kv(5), SLOTS, _values(2, 4, 16), PAGE_TABLE, SEQ_LENS, torch.tensor([0]))]

    def step():
        k, v, slots, q, page_table, seq_lens, src = inputs
        append_kv_(cache, k, v, slots, impl=impl)
        copy_pages_(cache, src, src + 5, impl=impl)
        gathered = gather_kv(cache, page_table, seq_lens, impl=impl)
        return *gathered, paged_attention(q, cache, page_table, seq_lens, impl=impl)

    step()
    return cache, inputs, step


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_ops_never_synchronise_with_the_gpu(impl):
    _, _, step = _gpu_step(impl)
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode calls itself a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_cuda_graph_replay_follows_changed_slots_tables_and_lengths(impl):
    cache, inputs, step = _gpu_step(impl)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    cache.pages.zero_()
    for x, changed in zip(
        inputs[2:6], (SLOTS.flip(0), _values(2, 4, 16, seed=7), PAGE_TABLE.flip(0), SEQ_LENS - 2), strict=True
    ):
        x.copy_(changed)
    graph.replay()
    replayed = [x.clone() for x in (cache.pages, *outputs)]
    cache.pages.zero_()
    for got, expected in zip(replayed, (cache.pages, *step()), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_bytes_written_by_a_gpu_equal_those_written_by_a_cpu():
    expected = _filled_cache()
    k, v = _kv(NUM_PAGES * LAYOUT.page_size)
    slots = torch.arange(NUM_PAGES * LAYOUT.page_size)
    for impl in ("eager", "triton"):
        cache = KVCache(LAYOUT, NUM_PAGES, device="cuda", v_scale=0.5)
        append_kv_(cache, k.cuda(), v.cuda(), slots.cuda(), impl=impl)
        assert torch.equal(cache.pages.cpu(), expected.pages)
