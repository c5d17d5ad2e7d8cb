"""What the frameworks promise on a GPU: graphs that replay, compilers that see no break, caches updated in place."""

from __future__ import annotations

import shutil

import pytest
import torch

from kvq_torch import KVCache, _library, append_kv_, paged_attention
from tests import pools

pytestmark = pytest.mark.gpu

LAYOUT = pools.layout_of("int8_per_token_head")
NUM_PAGES = 64
SEQ_LENS = ([100, 333, 5], [1, 12, 400])  # before and after the change that graphs must notice


def step(cache: KVCache, inputs: dict[str, torch.Tensor], **queries) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of an engine: append the new tokens, then attend."""
    append_kv_(cache, inputs["k"], inputs["v"], inputs["slots"])
    return paged_attention(inputs["q"], cache, inputs["page_table"], inputs["seq_lens"], return_lse=True, **queries)


def step_inputs(num_queries: int, seq_lens: list[int], seed: int) -> dict[str, torch.Tensor]:
    """Inputs whose new tokens are the last ``num_queries`` of the first sequence, and one of the others."""
    counts = [min(num_queries, seq_lens[0]), 1, 1]
    num_tokens = num_queries + 2
    page_table = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    page_table = page_table.view(1, NUM_PAGES).expand(3, NUM_PAGES).contiguous().cuda()
    page_table = page_table.roll(seed).contiguous()
    k, v, _ = pools.tokens(num_tokens, seed=seed)
    slots = torch.randperm(NUM_PAGES * pools.PAGE_SIZE, generator=torch.Generator().manual_seed(seed))[:num_tokens]
    return {
        "k": k,
        "v": v,
        "slots": slots.cuda(),
        "q": pools.values(num_tokens if num_queries > 1 else 3, pools.NUM_Q_HEADS, pools.HEAD_DIM, seed=seed + 5),
        "page_table": page_table,
        "seq_lens": pools.indices(seq_lens),
        "cu_seqlens_q": pools.cu_seqlens(counts),
    }


def filled_cache() -> KVCache:
    cache = KVCache(LAYOUT, NUM_PAGES, device="cuda")
    append_kv_(cache, *pools.tokens(NUM_PAGES * pools.PAGE_SIZE, seed=11))
    return cache


def queries_of(inputs: dict[str, torch.Tensor], num_queries: int) -> dict:
    if num_queries == 1:
        return {}
    return {"cu_seqlens_q": inputs["cu_seqlens_q"], "max_seqlen_q": num_queries}


@pytest.mark.parametrize("num_queries", [1, 8, 90])
def test_a_cuda_graph_replays_with_other_lengths_tables_and_slots(num_queries):
    """Split decode, split decode of several queries, and prefill."""
    inputs = step_inputs(num_queries, SEQ_LENS[0], seed=1)
    queries = queries_of(inputs, num_queries)
    cache = filled_cache()
    step(cache, inputs, **queries)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(cache, inputs, **queries)

    for seed, seq_lens in enumerate(SEQ_LENS, start=1):
        new = step_inputs(num_queries, seq_lens, seed)
        for name, tensor in new.items():
            inputs[name].copy_(tensor)
        eager_cache = KVCache(LAYOUT, pages=cache.pages.clone())
        graph.replay()
        expected = step(eager_cache, new, **queries_of(new, num_queries))
        assert torch.equal(cache.pages, eager_cache.pages)
        for got, want in zip(results, expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.skipif(shutil.which("cc") is None and shutil.which("gcc") is None, reason="inductor needs a C compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_a_step_compiled_by_inductor_without_graph_breaks_equals_the_eager_one():
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True)
    cache, eager_cache = filled_cache(), filled_cache()
    address = cache.pages.data_ptr()
    for seed, seq_lens in enumerate(SEQ_LENS, start=1):
        inputs = step_inputs(1, seq_lens, seed)
        for got, want in zip(compiled(cache, inputs), step(eager_cache, inputs), strict=True):
            assert torch.equal(got, want)
        assert torch.equal(cache.pages, eager_cache.pages)
    assert cache.pages.data_ptr() == address


@pytest.mark.filterwarnings("ignore")  # of torch's own checks
@pytest.mark.parametrize("name", ["append", "gather", "copy", "attend"])
def test_ops_on_cuda_tensors_pass_opcheck(name):
    cache, inputs = filled_cache(), step_inputs(1, SEQ_LENS[0], seed=1)
    scales = cache.k_scale, cache.v_scale
    table = inputs["page_table"], inputs["seq_lens"]
    static = (None, None, None, None, True, None, None, None, None, cache.fingerprint, "triton")
    op, arguments = {
        "append": (
            _library.append_kv_op,
            (cache.pages, *scales, inputs["k"], inputs["v"], inputs["slots"], cache.fingerprint, "triton"),
        ),
        "gather": (_library.gather_kv_op, (cache.pages, *scales, *table, torch.bfloat16, cache.fingerprint, "triton")),
        "copy": (_library.copy_pages_op, (cache.pages, pools.indices([0, 1]), pools.indices([2, 3]), "triton")),
        "attend": (_library.paged_attention_op, (inputs["q"], cache.pages, *scales, *table, *static)),
    }[name]
    torch.library.opcheck(op, arguments)


def test_jax_appends_to_a_donated_cache_in_place():
    import jax

    import kvq_jax

    append = jax.jit(kvq_jax.append_kv, donate_argnums=0)
    cache = kvq_jax.KVCache.create(LAYOUT, NUM_PAGES)
    for num_tokens in (3, 300):  # without and with a claim of slots
        k, v, slots = jax_tokens(num_tokens)
        before, address = cache.pages, cache.pages.unsafe_buffer_pointer()
        cache = append(cache, k, v, slots)
        assert cache.pages.unsafe_buffer_pointer() == address
        assert before.is_deleted()
        eager = kvq_jax.append_kv(kvq_jax.KVCache.create(LAYOUT, NUM_PAGES), k, v, slots)
        written = slots // pools.PAGE_SIZE
        assert (cache.pages[written] == eager.pages[written]).all()


def test_jax_appends_and_copies_in_place_in_a_scan():
    import jax
    import jax.numpy as jnp

    import kvq_jax

    def run(cache, k, v, slots):
        def body(cache, token):
            cache = kvq_jax.append_kv(cache, *token)
            return kvq_jax.copy_pages(cache, jnp.array([0]), jnp.array([NUM_PAGES - 1])), None

        return jax.lax.scan(body, cache, (k, v, slots))[0]

    k, v, slots = jax_tokens(24)
    cache = kvq_jax.KVCache.create(LAYOUT, NUM_PAGES)
    expected = kvq_jax.append_kv(cache, k, v, slots).pages
    address = cache.pages.unsafe_buffer_pointer()
    steps = (k[:, None], v[:, None], slots[:, None])
    cache = jax.jit(run, donate_argnums=0)(cache, *steps)
    assert cache.pages.unsafe_buffer_pointer() == address
    assert (cache.pages[:2] == expected[:2]).all()
    assert (cache.pages[-1] == cache.pages[0]).all()


def jax_tokens(num_tokens: int) -> tuple:
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), 2)
    k, v = (jax.random.normal(key, (num_tokens, pools.NUM_KV_HEADS, pools.HEAD_DIM), jnp.bfloat16) for key in keys)
    return k, v, jnp.arange(num_tokens, dtype=jnp.int32)
