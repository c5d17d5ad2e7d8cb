"""FlashInfer: paged decode on tensor cores and paged FA3 prefill. Its plan is made outside of what is timed."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from bench import pools, tables
from bench.cases import BF16, FP8_TENSOR, MLA, DecodeCase, MLACase, uniform

WORKSPACE_BYTES = 2**30  # 32 query heads over one KV head ask for more than 256 MiB
TOLERANCE = {
    BF16: 1e-2,
    FP8_TENSOR: 1e-1,
}  # relative, against kvq's bfloat16 on the same values: is it the same problem
_DTYPES = {BF16: torch.bfloat16, FP8_TENSOR: torch.float8_e4m3fn}


def is_installed() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


def compile_in_background(
    decodes: Iterable[DecodeCase], prefill_head_dims: Iterable[int], has_append: bool, has_mla: bool
) -> list[Future]:
    """Start FlashInfer's compilations, 40 to 130 s each, side by side; wait for the futures before timing."""
    modules = {(mode, case.head_dim) for case in decodes for mode in case.peers}
    pool = ThreadPoolExecutor(max_workers=8)
    futures = [pool.submit(_compile_prefill, head_dim) for head_dim in prefill_head_dims]
    futures += [pool.submit(_compile_decode, *module) for module in sorted(modules)]
    if has_append:
        futures.append(pool.submit(_compile_append))
    if has_mla:
        futures.append(pool.submit(_compile_mla))
    pool.shutdown(wait=False)
    return futures


def decode_calls(case: DecodeCase, mode: str, qs: list[torch.Tensor]) -> list[Callable[[], torch.Tensor]]:
    """One call for every q, each on a pool of its own."""
    import flashinfer

    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(), "NHD", use_tensor_cores=True)
    wrapper.plan(
        *_page_lists(case),
        case.num_q_heads,
        case.num_kv_heads,
        case.head_dim,
        case.page_size,
        q_data_type=torch.bfloat16,
        kv_data_type=_DTYPES[mode],
    )
    pools_ = [pools.flashinfer_pool(case, mode, seed) for seed in range(len(qs))]
    return [
        functools.partial(wrapper.run, q, pool, out=torch.empty_like(q)) for q, pool in zip(qs, pools_, strict=True)
    ]


def step(case: DecodeCase, q: torch.Tensor) -> Callable[[], None]:
    """One step of decoding in bfloat16: the last token of each sequence is appended, then attended over."""
    append, (attend,) = _append_call(case), decode_calls(case, BF16, [q])

    def append_and_attend() -> None:
        append()
        attend()

    return append_and_attend


def mla_call(case: MLACase, q: torch.Tensor) -> Callable[[], torch.Tensor]:
    """MLA decoding in bfloat16."""
    import flashinfer

    layout, decode = case.layout(BF16), case.as_decode()
    starts, ids, _ = _page_lists(decode)
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(_workspace(), backend="auto")
    wrapper.plan(
        torch.arange(case.batch + 1, dtype=torch.int32, device="cuda"),
        starts,
        ids,
        torch.full((case.batch,), case.context, dtype=torch.int32, device="cuda"),
        case.num_heads,
        layout.kv_lora_rank,
        layout.rope_dim,
        case.page_size,
        False,
        case.sm_scale,
        torch.bfloat16,
        torch.bfloat16,
    )
    q_nope, q_pe = (part.contiguous() for part in q.split([layout.kv_lora_rank, layout.rope_dim], dim=-1))
    return functools.partial(wrapper.run, q_nope, q_pe, *pools.flashinfer_mla_pools(case), return_lse=False)


def prefill_calls(case: DecodeCase, qs: list[torch.Tensor]) -> list[Callable[[], torch.Tensor]]:
    """Causal prefill of one sequence in bfloat16 through FA3."""
    import flashinfer

    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD", backend="fa3")
    wrapper.plan(
        torch.tensor([0, case.queries], dtype=torch.int32, device="cuda"),
        *_page_lists(case),
        case.num_q_heads,
        case.num_kv_heads,
        case.head_dim,
        case.page_size,
        causal=True,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    pools_ = [pools.flashinfer_pool(case, BF16, seed) for seed in range(len(qs))]
    return [functools.partial(wrapper.run, q, pool) for q, pool in zip(qs, pools_, strict=True)]


def _append_call(case: DecodeCase) -> Callable[[], None]:
    import flashinfer

    starts, ids, last = _page_lists(case)
    sequences = torch.arange(len(case.seq_lens), dtype=torch.int32, device="cuda")
    positions = torch.tensor(case.seq_lens, dtype=torch.int32, device="cuda") - 1
    rows, pool = pools.new_rows(case), pools.flashinfer_pool(case, BF16, 0)
    return functools.partial(flashinfer.append_paged_kv_cache, *rows, sequences, positions, pool, ids, starts, last)


def _page_lists(case: DecodeCase) -> list[torch.Tensor]:
    """The page table as FlashInfer takes it: starts, ids one sequence after the other, tokens of the last pages."""
    table = tables.page_table(case)
    ids = np.concatenate([row[:count] for row, count in zip(table, case.pages_of, strict=True)])
    last = [(seq_len - 1) % case.page_size + 1 for seq_len in case.seq_lens]
    lists = np.cumsum([0, *case.pages_of]), ids, np.array(last)
    return [torch.from_numpy(x.astype(np.int32)).cuda() for x in lists]


def _workspace() -> torch.Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")


def _compile_decode(mode: str, head_dim: int) -> None:
    case = uniform(1, 1024, head_dim=head_dim)
    decode_calls(case, mode, [pools.queries(case, 0)])[0]()


def _compile_append() -> None:
    _append_call(uniform(1, 1024))()


def _compile_prefill(head_dim: int) -> None:
    case = DecodeCase("", (1024,), head_dim=head_dim, queries=1024)
    prefill_calls(case, [pools.queries(case, 0)])[0]()


def _compile_mla() -> None:
    case = dataclasses.replace(MLA[0], batch=1, context=1024)
    q = torch.zeros((1, case.num_heads, case.layout(BF16).head_dim), dtype=torch.bfloat16, device="cuda")
    mla_call(case, q)()
