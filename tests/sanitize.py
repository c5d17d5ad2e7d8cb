"""Calls with values that no one checked, on a GPU: ``python -m tests.sanitize``, best under compute-sanitizer.

Slots, page ids, lengths and offsets of queries are drawn from what a bug upstream could hand over. Exits with status 0
if no access faulted and the sequences that were in order came out finite.
"""

from __future__ import annotations

import itertools

import torch

from kvq_torch import append_kv_, copy_pages_, gather_kv, paged_attention
from tests import pools

FAR = 2**31 - 1
SEQ_LENS = [40, 0, -5, FAR, -(2**31), 4096, 33, 47]
CU_SEQLENS = (
    [0, 1, 2, 3, 4, 5, 6, 7, 8],
    [0, 3, 3, 8, 2, -4, 8, FAR, 9],  # neither increasing nor in range
    [-(2**31), 0, FAR, -1, 5, FAR, -7, 2, FAR],
)


def main() -> None:
    """Run every call for every mode, and wait for the GPU to report."""
    for mode, windows in (("int8_per_token_head", (None, 5)), ("fp8_per_token_head", (None,)), ("bfloat16", (None,))):
        hostile_calls(mode, windows)
        torch.cuda.synchronize()
        print(f"{mode}: no fault")


def hostile_calls(mode: str, windows: tuple[int | None, ...]) -> None:
    """Append, copy, gather, decode and prefill."""
    num_pages = 9
    cache = pools.poisoned_cache(pools.layout_of(mode), num_pages)
    capacity = num_pages * pools.PAGE_SIZE
    new = pools.tokens(capacity, seed=1)
    append_kv_(cache, *new)
    slots = new.slots.clone()
    outside = [-1, capacity, FAR, -(2**31), 2**31, 2**40, -(2**40), 2**63 - 1, -(2**63)]
    slots[::2] = pools.indices(list(itertools.islice(itertools.cycle(outside), len(slots[::2]))), torch.int64)
    append_kv_(cache, *new._replace(slots=slots))
    append_kv_(cache, *pools.tokens(300, seed=1)[:2], torch.full((300,), FAR, dtype=torch.int32, device="cuda"))
    copy_pages_(cache, pools.indices([0, FAR, -1, num_pages]), pools.indices([-(2**31), 1, 2, num_pages - 1]))

    page_table = pools.indices([[0, 1, 2], [3, 4, 5], [6, FAR, -1], [7, -(2**31), num_pages]] * 2)
    seq_lens = pools.indices(SEQ_LENS)
    gather_kv(cache, page_table, seq_lens)
    q = pools.values(len(SEQ_LENS), pools.NUM_Q_HEADS, pools.HEAD_DIM, seed=7)
    for window in windows:
        out = paged_attention(q, cache, page_table, seq_lens, window=window)
        assert out[0].isfinite().all()
        for cu_seqlens_q, max_seqlen_q in itertools.product(CU_SEQLENS, (2, 100)):
            queries = {"cu_seqlens_q": pools.indices(cu_seqlens_q), "max_seqlen_q": max_seqlen_q}
            paged_attention(q, cache, page_table, seq_lens, window=window, **queries)


if __name__ == "__main__":
    main()
