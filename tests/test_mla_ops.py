"""What holds for the MLA ops of both packages besides their results: schemas, compilers, refusals."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import kvq_jax
import kvq_torch
from kvq_core import CacheLayout, MLALayout
from kvq_torch import KVCache, _mla_library, append_mla_, gather_mla, mla_attention

LAYOUT = MLALayout("int8_per_token_head", page_size=4, kv_lora_rank=32, rope_dim=16)
KV_LAYOUT = CacheLayout("int8_per_token_head", page_size=4, num_kv_heads=1, head_dim=32)
NUM_PAGES, WIDTH = 8, 48
PAGE_TABLE = torch.tensor([[3, 1, 0], [2, 5, 4]], dtype=torch.int32)
SEQ_LENS = torch.tensor([9, 5], dtype=torch.int32)
CU_SEQLENS_Q = torch.tensor([0, 3, 4], dtype=torch.int32)
SLOTS = torch.tensor([7, 0, -1, 12, 40], dtype=torch.int64)


def values(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows(num_tokens):
    return values(num_tokens, 32, seed=1), values(num_tokens, 16, seed=2)


def filled_cache(layout=LAYOUT):
    cache = KVCache(layout, NUM_PAGES, k_scale=0.5)
    append_mla_(cache, *rows(NUM_PAGES * 4), torch.arange(NUM_PAGES * 4))
    return cache


def op_calls():
    cache = filled_cache()
    where = (cache.pages, cache.k_scale)
    fused = values(len(SLOTS), WIDTH)
    q = values(5, 3, WIDTH)
    ends = (cache.fingerprint, None)
    return {
        "append": (_mla_library.append_mla_op, (*where, *rows(len(SLOTS)), SLOTS, *ends)),
        "append_fused": (_mla_library.append_mla_op, (*where, fused[:, :32], fused[:, 32:], SLOTS.int(), *ends)),
        "gather": (_mla_library.gather_mla_op, (*where, PAGE_TABLE, SEQ_LENS, *ends)),
        "decode": (
            _mla_library.mla_attention_op,
            (q[:2], *where, PAGE_TABLE, SEQ_LENS, None, None, 0.2, True, *ends),
        ),
        "prefill": (
            _mla_library.mla_attention_op,
            (q, *where, PAGE_TABLE, SEQ_LENS, CU_SEQLENS_Q, 3, 0.2, False, *ends),
        ),
    }


@pytest.mark.parametrize("name", ["append", "append_fused", "gather", "decode", "prefill"])
def test_op_schema_fake_kernel_and_autograd_agree_with_the_implementation(name):
    op, args = op_calls()[name]
    torch.library.opcheck(op, args)


def step(cache, kv_c, k_pe, slots, q):
    append_mla_(cache, kv_c, k_pe, slots)
    latent, rope = gather_mla(cache, PAGE_TABLE, SEQ_LENS)
    decoded = mla_attention(q[:2], cache, PAGE_TABLE, SEQ_LENS, sm_scale=0.2)
    options = {"cu_seqlens_q": CU_SEQLENS_Q, "max_seqlen_q": 3, "sm_scale": 0.2, "return_lse": True}
    return latent, rope, decoded, *mla_attention(q, cache, PAGE_TABLE, SEQ_LENS, **options)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_step_without_graph_breaks_equals_the_eager_one(dynamic):
    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    expected_cache, cache = filled_cache(), filled_cache()
    for num_tokens in (5, 3):
        inputs = (*rows(num_tokens), SLOTS[:num_tokens], values(5, 3, WIDTH))
        for expected, got in zip(step(expected_cache, *inputs), compiled(cache, *inputs), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
        assert torch.equal(cache.pages, expected_cache.pages)


def test_append_mla_compiles_once_for_all_token_counts():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    append = torch.compile(append_mla_, backend=counter, fullgraph=True, dynamic=True)
    cache = KVCache(LAYOUT, NUM_PAGES)
    for num_tokens in (3, 5, 7):
        append(cache, *rows(num_tokens), torch.arange(num_tokens))
    assert counter.frame_count == 1


def append(**changes):
    kv_c, k_pe = rows(5)
    kwargs = {"kv_c": kv_c, "k_pe": k_pe, "slot_mapping": SLOTS} | changes
    append_mla_(filled_cache(), **kwargs)


def attend(layout=LAYOUT, **changes):
    kwargs = {"q": values(2, 3, WIDTH), "sm_scale": 0.2, "page_table": PAGE_TABLE, "seq_lens": SEQ_LENS} | changes
    cache = KVCache(layout, NUM_PAGES)
    mla_attention(kwargs.pop("q"), cache, **kwargs)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "kv_c to be a torch.Tensor; got list", lambda: append(kv_c=[1.0])),
        (TypeError, "kv_c of dtype .*; got int32", lambda: append(kv_c=torch.zeros(5, 32, dtype=torch.int32))),
        (
            ValueError,
            r"kv_c of shape \[num_tokens, kv_lora_rank=32\]; got \[5, 31\]",
            lambda: append(kv_c=values(5, 31)),
        ),
        (
            ValueError,
            r"k_pe of shape \[num_tokens, rope_dim=16\]; got \[5, 1, 16\]",
            lambda: append(k_pe=values(5, 1, 16)),
        ),
        (ValueError, "as many tokens in k_pe as in kv_c, 5; got 4", lambda: append(k_pe=values(4, 16))),
        (ValueError, "kv_c with a contiguous last axis", lambda: append(kv_c=values(32, 5).T)),
        (ValueError, "slot_mapping of shape", lambda: append(slot_mapping=SLOTS[:2])),
        (ValueError, "one of .*; got 'cudnn'", lambda: append(impl="cudnn")),
        (ValueError, r"kv_lora_rank \+ rope_dim=48\]; got \[2, 3, 32\]", lambda: attend(q=values(2, 3, 32))),
        (ValueError, "at least one head", lambda: attend(q=values(2, 0, WIDTH))),
        (ValueError, "one query per sequence, 2", lambda: attend(q=values(5, 3, WIDTH))),
        (ValueError, "max_seqlen_q .*; got 0", lambda: attend(max_seqlen_q=0)),
        (TypeError, "sm_scale to be a Python number; got None", lambda: attend(sm_scale=None)),
        (TypeError, "sm_scale .* Python number; got tensor", lambda: attend(sm_scale=torch.tensor(1.0))),
        (ValueError, "sm_scale to be finite; got nan", lambda: attend(sm_scale=float("nan"))),
        (TypeError, "causal to be True or False; got 1", lambda: attend(causal=1)),
        (TypeError, "page_table of dtype int32", lambda: attend(page_table=PAGE_TABLE.long())),
        (TypeError, "a cache with a MLALayout; got one with a CacheLayout", lambda: attend(layout=KV_LAYOUT)),
        (TypeError, "a cache with a CacheLayout; got one with a MLALayout", lambda: kv_ops()[0]()),
        (TypeError, "a cache with a CacheLayout; got one with a MLALayout", lambda: kv_ops()[1]()),
        (TypeError, "a cache with a CacheLayout; got one with a MLALayout", lambda: kv_ops()[2]()),
    ],
)
def test_torch_op_refuses(error, message, call):
    with pytest.raises(error, match=message):
        call()


def kv_ops():
    """The ops of KV caches on an MLA cache."""
    cache, k = filled_cache(), values(5, 1, 32)
    return (
        lambda: kvq_torch.append_kv_(cache, k, k, SLOTS),
        lambda: kvq_torch.gather_kv(cache, PAGE_TABLE, SEQ_LENS),
        lambda: kvq_torch.paged_attention(k[:2], cache, PAGE_TABLE, SEQ_LENS),
    )


def test_copy_pages_takes_both_kinds_of_caches():
    cache = filled_cache()
    kvq_torch.copy_pages_(cache, torch.tensor([1]), torch.tensor([6]))
    assert torch.equal(cache.pages[6], cache.pages[1])


def jax_attend(layout=LAYOUT, **changes):
    cache = kvq_jax.KVCache.create(layout, NUM_PAGES)
    table, lens = PAGE_TABLE.numpy(), SEQ_LENS.numpy()
    return kvq_jax.mla_attention(jnp.zeros((2, 3, WIDTH)), cache, table, lens, **{"sm_scale": 0.2} | changes)


def jax_append(**changes):
    kv_c, k_pe = (x.numpy() for x in rows(5))
    cache = kvq_jax.KVCache.create(LAYOUT, NUM_PAGES)
    kvq_jax.append_mla(cache, **{"kv_c": kv_c, "k_pe": k_pe, "slot_mapping": np.arange(5, dtype=np.int32)} | changes)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "kv_c to be a JAX or numpy array; got list", lambda: jax_append(kv_c=[1.0])),
        (ValueError, "k_pe of shape", lambda: jax_append(k_pe=np.zeros((5, 17), np.float32))),
        (TypeError, "sm_scale to be a Python number; got None", lambda: jax_attend(sm_scale=None)),
        (TypeError, "causal", lambda: jax_attend(causal=None)),
        (TypeError, "a cache with a MLALayout; got one with a CacheLayout", lambda: jax_attend(layout=KV_LAYOUT)),
        (NotImplementedError, "'pallas' is not supported yet", lambda: jax_attend(impl="pallas")),
        (
            TypeError,
            "a cache with a CacheLayout; got one with a MLALayout",
            lambda: kvq_jax.gather_kv(kvq_jax.KVCache.create(LAYOUT, 2), PAGE_TABLE.numpy(), SEQ_LENS.numpy()),
        ),
    ],
)
def test_jax_function_refuses(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_refused_append_writes_nothing():
    cache = filled_cache()
    before = cache.pages.clone()
    with pytest.raises(ValueError, match="as many tokens"):
        append_mla_(cache, values(3, 32), values(2, 16), torch.arange(3))
    assert torch.equal(cache.pages, before)


def test_one_scale_serves_both_parts_and_v_scale_none():
    """What vLLM does in its fp8 MLA caches."""
    layout = MLALayout("fp8_e4m3", page_size=4, kv_lora_rank=32, rope_dim=16)
    pools = []
    for v_scale in (1.0, 7.0):
        cache = KVCache(layout, 2, k_scale=0.25, v_scale=v_scale)
        append_mla_(cache, *rows(8), torch.arange(8))
        pools.append(cache.pages)
        for got, want in zip(gather_mla(cache, PAGE_TABLE[:1, 2:], SEQ_LENS[1:]), rows(4), strict=True):
            torch.testing.assert_close(got[0, :4], want, rtol=0.07, atol=0.25 * 2**-9)
    assert torch.equal(*pools)
