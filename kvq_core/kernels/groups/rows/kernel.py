"""Queries as rows: one program, its producer and its two consumers.

Consumer 0 takes the even tiles: scores, softmax, probabilities; consumer 1 the odd ones. Each adds up its half of the
output's columns, over all tiles in their order: its own tile with probabilities from registers, the other's with those
that the other published in shared memory, next to the maximum of the rows so far and what that scales older sums by.

While one consumer is at its exponentials, the other keeps the tensor cores busy. A stage of shared memory belongs to
the tiles of one consumer. Its halves, the columns below 256 and those above, are filled and freed one by one: consumer
0 is the last that reads the lower half, consumer 1 the upper. That two groups share out the columns and alternate tiles
is the "seesaw" schedule of FlashMLA.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvq_core.kernels.groups.line import KEYS, find_part
from kvq_core.kernels.groups.rows.consumer import consume
from kvq_core.kernels.groups.rows.producer import produce
from kvq_core.kernels.groups.rows.shared import HALF, ROPE, ROWS, make_barriers, make_buffers
from kvq_core.kernels.groups.tiles import Pool

REGISTERS = gl.constexpr(224)  # of a consumer's thread, of the 512 that three groups share


@gluon.jit(do_not_specialize=["num_q_tokens", "num_seqs", "num_pages", "max_pages", "q_stride_token", "q_stride_head"])
def attend_mla_rows(
    q_ptr,  # [num_q_tokens, num_heads, 576] bfloat16
    pages_ptr,  # uint8 [num_pages, 1, record_bytes]
    k_scale_ptr,  # float32 [], not read
    page_table_ptr,  # int32 [num_seqs, max_pages]
    seq_lens_ptr,  # int32 [num_seqs]
    cu_seqlens_q_ptr,  # int32 [num_seqs + 1] if S.has_cu_seqlens
    num_q_tokens,
    num_seqs,
    num_pages,
    max_pages,
    q_stride_token,  # elements / S.q_align
    q_stride_head,
    partial_ptr,  # out float32 [num_segments, 1, S.part_stride]: see decode.partial_lse
    S: gl.constexpr,
):
    """One part of the keys of all sequences, for 64 heads of their one query. Launch with four warps: eight join."""
    gl.static_assert(S.rows == ROWS and S.queries == 1 and S.tile == 2 * KEYS)
    gl.static_assert(S.records.v.head_dim == 2 * HALF and S.records.k.head_dim == ROPE)
    gl.static_assert(S.records.page_size % KEYS == 0)
    gl.static_assert(S.records.v.mode == "bfloat16" and S.v_operand == "bfloat16")
    block, program, line = find_part(num_q_tokens, num_seqs, max_pages, seq_lens_ptr, cu_seqlens_q_ptr, S)
    bufs = make_buffers()
    barriers = make_barriers()
    queries = (q_ptr, q_stride_token, q_stride_head)
    pool = Pool(pages_ptr, page_table_ptr, num_pages, max_pages)
    result = (partial_ptr, program, block)
    gl.warp_specialize(
        [
            (produce, (bufs, barriers, line, queries, block, pool, S)),
            (consume, (bufs, barriers, line, result, 0, S)),
            (consume, (bufs, barriers, line, result, 1, S)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )
