"""Prefill through cuDNN (impl="sdpa", in JAX "cudnn"): right whatever the lengths are, or refused."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import torch

import kvq_jax
from kvq_core import CacheLayout
from kvq_torch import KVCache, _sdpa, append_kv_, paged_attention
from tests import backends
from tests.case_types import AttentionCase
from tests.compare import Attention, assert_no_worse_than_naive
from tests.naive import naive_attention

INT8 = CacheLayout("int8_per_token_head", page_size=16, num_kv_heads=2, head_dim=64)
ROWS = CacheLayout("int8_per_token_head", page_size=16, num_kv_heads=2, head_dim=64, scale_placement="row")
PER_TENSOR = CacheLayout("fp8_e4m3/fp8_e5m2", page_size=16, num_kv_heads=2, head_dim=64)


def _case(name: str, *seqs: tuple[int, int], layout: CacheLayout = INT8, **options) -> AttentionCase:
    return AttentionCase(f"sdpa-{name}", layout, seqs=seqs, ragged=True, max_seqlen_q=70, **options)


# (case, the length that the call prepares for)
CASES = [
    (_case("fresh", (70, 70), v_exponents=(-4, 4)), None),
    (_case("prefix", (70, 130), v_exponents=(-4, 4)), 130),
    (_case("prefix-unannounced", (70, 130)), None),
    (_case("prefix-shorter", (70, 100)), 130),
    (_case("prefix-longer", (70, 131)), 130),
    (_case("two", (70, 130), (70, 130)), 130),
    (_case("two-one-longer", (70, 130), (70, 150)), 130),
    (_case("two-fewer-queries", (60, 130), (70, 130), padding_rows=10), 130),
    (_case("one-padded", (60, 60), padding_rows=10), None),
    (_case("more-queries-than-keys", (70, 50)), None),
    (_case("sinks", (70, 70), sinks=True), None),
    (_case("sinks-prefix", (70, 130), sinks=True, group=5), 130),
    (_case("foreign", (70, 130), damage=("foreign",)), 130),
    (_case("foreign-fresh", (70, 70), damage=("negative",)), None),
    (_case("nan-k", (70, 70), damage=("nan_k",)), None),
    (_case("scale", (70, 130), sm_scale=0.37), 130),
    (_case("fused-q", (70, 130), strides="fused"), 130),
    (_case("transposed-q", (70, 130), strides="transposed"), 130),
    (_case("odd-q", (70, 130), strides="odd"), 130),
    (_case("shared-pages", (70, 70), (70, 70), shared_pages=2), None),
    (_case("padded-pages", (70, 130), pool="shared"), 130),
    (_case("rows", (70, 70), layout=ROWS), None),
    (_case("scales-per-tensor", (70, 70), layout=PER_TENSOR, k_scale=0.37, v_scale=1.7), None),
] + [
    (
        _case(
            f"{mode}-{dim}-{length}",
            (70, length),
            layout=CacheLayout(mode, page_size=page, num_kv_heads=1, head_dim=dim),
        ),
        max_seqlen_k,
    )
    for length, max_seqlen_k in ((100, 100), (70, None))
    for mode, dim, page in (
        ("bfloat16", 128, 16),
        ("fp8_per_token_head", 128, 5),
        ("fp8_e4m3", 80, 64),
        ("float32", 64, 16),
        ("int8_per_token_head/bfloat16", 256, 16),
    )
]
on_cases = pytest.mark.parametrize(("case", "max_seqlen_k"), CASES, ids=[case.name for case, _ in CASES])


@functools.cache
def _expected(case: AttentionCase):
    inputs = case.inputs()
    return backends.NUMPY.attention(case.layout, inputs, case.options()), Attention(*naive_attention(case, inputs))


def _assert_is_right(case: AttentionCase, max_seqlen_k: int | None, device: str) -> None:
    backend = backends.TorchBackend("torch-sdpa", "sdpa", device)
    got = backend.attention(case.layout, case.inputs(), {**case.options(), "max_seqlen_k": max_seqlen_k})
    assert_no_worse_than_naive(got, *_expected(case))


@pytest.mark.gpu
@on_cases
def test_library_prefill_is_no_worse_than_naive(case, max_seqlen_k):
    _assert_is_right(case, max_seqlen_k, "cuda")


@pytest.mark.interpreter
@on_cases
def test_what_surrounds_the_library_is_right_in_the_interpreter(case, max_seqlen_k, monkeypatch):
    """cuDNN needs a GPU: here plain torch stands in for its attention, and for nothing else."""
    monkeypatch.setattr(_sdpa, "dense_attention", _dense_attention)
    _assert_is_right(case, max_seqlen_k, "cpu")


def _dense_attention(q, k, v, *, is_causal, scale):
    group = q.shape[2] // k.shape[2]
    k, v = (x.float().repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q.float(), k) * scale
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    lse = scores.logsumexp(-1)
    p = (scores - lse[..., None]).exp()
    return torch.einsum("bhij,bjhd->bihd", p, v).to(q.dtype).contiguous(), lse.contiguous()


WHOLE_PROMPTS = [case for case, max_seqlen_k in CASES if max_seqlen_k is None and not case.sinks]
REFUSED_IN_JAX = {
    "sinks": {"sinks": np.zeros(4, np.float32)},
    "`return_lse`": {"return_lse": True},
    "`max_seqlen_k` above `max_seqlen_q`": {"max_seqlen_k": 130},
}
on_whole_prompts = pytest.mark.parametrize("case", WHOLE_PROMPTS, ids=[case.name for case in WHOLE_PROMPTS])


def _assert_jax_is_right(case: AttentionCase) -> None:
    inputs = case.inputs()
    scales = inputs.k_scale, inputs.v_scale
    cache = kvq_jax.KVCache.create(case.layout, pages=inputs.pages, k_scale=scales[0], v_scale=scales[1])
    call = functools.partial(kvq_jax.paged_attention, cu_seqlens_q=inputs.cu_seqlens_q, **case.options(), impl="cudnn")
    out = np.asarray(jax.jit(call)(inputs.q, cache, inputs.page_table, inputs.seq_lens))
    exact, naive = _expected(case)
    assert_no_worse_than_naive(Attention(out, exact.lse.astype(np.float32)), exact, naive)


@pytest.mark.gpu
@on_whole_prompts
def test_library_prefill_in_jax_is_no_worse_than_naive(case):
    _assert_jax_is_right(case)


@pytest.mark.interpreter
@on_whole_prompts
def test_what_surrounds_the_library_in_jax_is_right_in_the_interpreter(case, monkeypatch):
    monkeypatch.setattr(kvq_jax._cudnn, "dense_attention", _dense_attention_in_jax)
    _assert_jax_is_right(case)


def _dense_attention_in_jax(q, k, v, scale):
    return jax.nn.dot_product_attention(*(x.astype("float32") for x in (q, k, v)), scale=scale, is_causal=True).astype(
        q.dtype
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("options", [*REFUSED_IN_JAX.values(), {"window": 3}])
def test_what_the_library_in_jax_cannot_do_is_refused(options):
    case, _ = CASES[0]
    inputs = _case("wide", (70, 130)).inputs()
    cache = kvq_jax.KVCache.create(case.layout, pages=inputs.pages)
    call = functools.partial(kvq_jax.paged_attention, cu_seqlens_q=inputs.cu_seqlens_q, max_seqlen_q=70, impl="cudnn")
    with pytest.raises(NotImplementedError, match="impl='cudnn': expected"):
        call(inputs.q, cache, inputs.page_table, inputs.seq_lens, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [128, 256])
def test_none_takes_the_library_for_a_long_prefill(head_dim):
    layout = CacheLayout("int8_per_token_head", page_size=16, num_kv_heads=2, head_dim=head_dim)
    cache = KVCache(layout, 256, device="cuda")
    k, v, q = (torch.randn(4096, heads, head_dim, dtype=torch.bfloat16, device="cuda") for heads in (2, 2, 8))
    append_kv_(cache, k, v, torch.arange(4096, device="cuda"))
    table = torch.arange(256, dtype=torch.int32, device="cuda")[None]
    lengths = torch.tensor([4096], dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, 2048], dtype=torch.int32, device="cuda")
    call = functools.partial(paged_attention, cache=cache, page_table=table, seq_lens=lengths, cu_seqlens_q=starts)
    options = {"max_seqlen_q": 2048, "max_seqlen_k": 4096, "return_lse": True}
    results = {impl: call(q[:2048], **options, impl=impl) for impl in (None, "sdpa", "triton")}
    for default, library, own in zip(*results.values(), strict=True):
        assert torch.equal(default, library)
        torch.testing.assert_close(library.float(), own.float(), atol=2e-2, rtol=2e-2)
    assert not torch.equal(results["sdpa"][0], results["triton"][0])


@pytest.mark.gpu
def test_library_prefill_is_captured_in_a_cuda_graph_and_follows_new_lengths():
    case = _case("graph", (70, 130))
    inputs = case.inputs()
    q, pages, table, lengths = (backends.to_torch(x, "cuda") for x in inputs[:4])
    starts = torch.tensor([0, 70], dtype=torch.int32, device="cuda")
    cache = KVCache(case.layout, pages=pages)
    run = functools.partial(
        paged_attention, q, cache, table, lengths, cu_seqlens_q=starts, max_seqlen_q=70, max_seqlen_k=130, impl="sdpa"
    )
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for length in (130, 111, 130):
        lengths.fill_(length)
        graph.replay()
        expected = paged_attention(q, cache, table, lengths, cu_seqlens_q=starts, max_seqlen_q=70, impl="triton")
        torch.testing.assert_close(out.float(), expected.float(), atol=2e-2, rtol=2e-2)


REFUSED = {
    "window": ({"window": 9}, "window=None"),
    "softcap": ({"softcap": 3.0}, "softcap=None"),
    "slopes": ({"alibi_slopes": torch.ones(4)}, "alibi_slopes=None"),
    "not-causal": ({"causal": False}, "causal=True"),
    "ragged": ({"max_seqlen_q": 60}, "as many queries in every sequence"),
    "longer-than-the-table": ({"max_seqlen_k": 10_000}, "the capacity of the page table"),
    "fewer-keys-than-queries": ({"max_seqlen_k": 69}, "max_seqlen_k from max_seqlen_q"),
}


@pytest.mark.interpreter
@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_library_cannot_do_is_refused_with_what_it_needs(options, message):
    case, _ = CASES[1]
    inputs = case.inputs()._asdict()
    q, table, lengths, starts = (
        backends.to_torch(inputs[name], "cpu") for name in ("q", "page_table", "seq_lens", "cu_seqlens_q")
    )
    cache = KVCache(case.layout, pages=backends.to_torch(inputs["pages"], "cpu"))
    options = {"cu_seqlens_q": starts, "max_seqlen_q": 70, "max_seqlen_k": 130, **options}
    with pytest.raises(NotImplementedError, match=message):
        paged_attention(q, cache, table, lengths, **options, impl="sdpa")


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True])
def test_a_wrong_max_seqlen_k_is_refused(wrong):
    cache = KVCache(INT8, 2)
    q = torch.zeros(1, 2, 64)
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises((TypeError, ValueError), match="max_seqlen_k"):
        paged_attention(q, cache, table, lengths, max_seqlen_k=wrong)
