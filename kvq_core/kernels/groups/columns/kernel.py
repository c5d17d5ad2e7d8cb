"""Queries as columns: one program, its producer and its two consumers.

Scores are K q^T [keys, heads], sums V^T P [columns, heads]: keys and values are the left operands, which Hopper's dots
take from registers too. So codes stay codes in shared memory, half as large and written by copies alone, and a consumer
decodes them in registers while tensor cores multiply. Queries and probabilities are the right operands, in shared
memory. Of up to 16 heads a dot has 16 columns, where rows would be 64.

Consumers take tiles in turns. Up to 16 heads, each has sums of its own, and both are added up at the end. Sums of more
do not fit: consumers share out the columns, and each adds the values of all tiles, with the probabilities that the
other has published.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvq_core.kernels.groups.columns.consumer import consume
from kvq_core.kernels.groups.columns.producer import produce
from kvq_core.kernels.groups.columns.shared import RANK, ROPE, make_barriers, make_buffers
from kvq_core.kernels.groups.line import KEYS, LAZY, find_part
from kvq_core.kernels.groups.tiles import Pool

REGISTERS = gl.constexpr(232)  # of a consumer's thread, of the 512 that three groups share


@gluon.jit(do_not_specialize=["num_q_tokens", "num_seqs", "num_pages", "max_pages", "q_stride_token", "q_stride_head"])
def attend_mla_columns(
    q_ptr,  # [num_q_tokens, num_heads, 576] bfloat16 or float16
    pages_ptr,  # uint8 [num_pages, 1, record_bytes]
    k_scale_ptr,  # float32 [], per-tensor modes
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
    """One part of the keys of all sequences, for S.rows heads of their query. Launch with four warps: eight join."""
    gl.static_assert(S.queries == 1 and S.rows <= 64)
    gl.static_assert(S.tile == 2 * KEYS or (S.tile == KEYS and S.rows <= 16))
    gl.static_assert(S.records.v.head_dim == RANK and S.records.k.head_dim == ROPE)
    gl.static_assert(S.records.page_size % KEYS == 0)
    gl.static_assert(S.records.v.code_bytes == 1 and S.v_operand == "float16" and S.p_shift + LAZY < 16)
    block, program, line = find_part(num_q_tokens, num_seqs, max_pages, seq_lens_ptr, cu_seqlens_q_ptr, S)
    bufs = make_buffers(S)
    barriers = make_barriers(S)
    queries = (q_ptr, q_stride_token, q_stride_head)
    pool = Pool(pages_ptr, page_table_ptr, num_pages, max_pages)
    result = (partial_ptr, program, block, k_scale_ptr)
    gl.warp_specialize(
        [
            (produce, (bufs, barriers, line, pool, S)),
            (consume, (bufs, barriers, line, queries, result, 0, S)),
            (consume, (bufs, barriers, line, queries, result, 1, S)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )
