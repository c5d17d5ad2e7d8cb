"""The kernel: which part of the line of tiles a program takes, and its three groups of warps."""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvq_core.kernels.groups.consumer import consume
from kvq_core.kernels.groups.producer import produce
from kvq_core.kernels.groups.shared import (
    HALF,
    KEYS,
    LAZY,
    ROPE,
    ROWS,
    Lengths,
    Line,
    keys_of_sequences,
    make_barriers,
    make_buffers,
)
from kvq_core.kernels.segments import SEQS, part_start


@gluon.jit(do_not_specialize=["num_q_tokens", "num_seqs", "num_pages", "max_pages", "q_stride_token", "q_stride_head"])
def attend_mla_groups(
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
    """One part of the keys of all sequences, for 64 heads of their one query. Launch with four warps: eight join."""
    gl.static_assert(S.rows == ROWS and S.queries == 1 and S.tile == 2 * KEYS)
    gl.static_assert(S.records.v.head_dim == 2 * HALF and S.records.k.head_dim == ROPE)
    gl.static_assert(S.records.page_size % KEYS == 0)
    gl.static_assert(S.v_operand != "float16" or S.p_shift + LAZY < 16)
    pid = gl.program_id(0)
    block = pid % S.row_blocks
    program = (pid // S.row_blocks).to(gl.int64)
    if S.overlap:
        tl.extra.cuda.gdc_launch_dependents()
    lengths = Lengths(seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, max_pages * S.records.page_size, num_q_tokens)
    total = _total_tiles(lengths, S)
    tile = part_start(program, total, S)
    last_tile = part_start(program + 1, total, S)
    seq, first_tile = _find_sequence(tile, lengths, S)
    line = Line(seq, first_tile, tile, last_tile, lengths)

    bufs = make_buffers(S)
    barriers = make_barriers(S)
    queries = (q_ptr, q_stride_token, q_stride_head, block, k_scale_ptr)
    pool = (pages_ptr, page_table_ptr, num_pages, max_pages)
    result = (partial_ptr, program, block, k_scale_ptr)
    REGISTERS: gl.constexpr = 208 if S.records.v.code_bytes == 1 else 224  # of the 512 that three groups share
    gl.warp_specialize(
        [
            (produce, (bufs, barriers, line, queries, pool, S)),
            (consume, (bufs, barriers, line, result, 0, S)),
            (consume, (bufs, barriers, line, result, 1, S)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )


@gluon.jit
def _tiles_of_sequences(first_seq, lengths, S: gl.constexpr):
    seq = first_seq + gl.arange(0, SEQS, layout=gl.BlockedLayout([1], [32], [4], [0]))
    start, end = keys_of_sequences(seq, lengths, S)
    return gl.cdiv(end - start, S.tile).to(gl.int64)


@gluon.jit
def _total_tiles(lengths, S: gl.constexpr):
    """`kvq_core.kernels.segments.total_tiles`, with layouts."""
    total = (lengths.num_seqs * 0).to(gl.int64)
    for first_seq in range(0, lengths.num_seqs, SEQS):
        total += gl.sum(_tiles_of_sequences(first_seq, lengths, S), 0)
    return total


@gluon.jit
def _find_sequence(tile, lengths, S: gl.constexpr):
    """`kvq_core.kernels.segments.find_sequence`, with layouts."""
    line = tile * 0
    seq = lengths.num_seqs * 0
    first_tile = tile * 0
    for first_seq in range(0, lengths.num_seqs, SEQS):
        tiles = _tiles_of_sequences(first_seq, lengths, S)
        before = line + gl.associative_scan(tiles, 0, _add) <= tile
        seq += gl.sum(before.to(gl.int32), 0)
        first_tile += gl.sum(gl.where(before, tiles, 0), 0)
        line += gl.sum(tiles, 0)
    return seq, first_tile


@gluon.jit
def _add(a, b):
    return a + b
