"""The line of tiles of `kvq_core.kernels.segments`, with layouts: a program's part of it, and the way along."""

from typing import Any, NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvq_core.kernels.segments import SEQS, keys_of, part_start, queries_of

KEYS = gl.constexpr(64)  # of a tile of one consumer; S.tile is a multiple
LAZY = gl.constexpr(8)  # a maximum is raised once a score is 2^LAZY times as probable: older sums are rarely scaled
# All sequences in every warp: warps need not wait for each other.
_SEQUENCES = gl.constexpr(gl.BlockedLayout([SEQS.value // 32], [32], [4], [0]))


class Lengths(NamedTuple):
    """Keys and queries of all sequences."""

    seq_lens_ptr: Any
    cu_seqlens_q_ptr: Any
    num_seqs: Any
    capacity: Any  # keys that a row of the page table has room for
    num_q_tokens: Any


class Line(NamedTuple):
    """What is left of a program's part, from a sequence on."""

    seq: Any
    first_tile: Any  # of ``seq``
    tile: Any
    last_tile: Any  # of the part, exclusive
    lengths: Any


@gluon.jit
def find_part(num_q_tokens, num_seqs, max_pages, seq_lens_ptr, cu_seqlens_q_ptr, S: gl.constexpr):
    """What a program is for: its block of heads, its number among the programs of that block, its part of the line.

    `merge_segments`, which waits for its end, may be launched from here on.
    """
    pid = gl.program_id(0)
    block = pid % S.row_blocks
    program = (pid // S.row_blocks).to(gl.int64)
    if S.overlap:
        tl.extra.cuda.gdc_launch_dependents()
    lengths = Lengths(seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, max_pages * S.records.page_size, num_q_tokens)
    return block, program, _find_line(program, lengths, S)


@gluon.jit
def _find_line(program, lengths, S: gl.constexpr):
    """The part of a program: `part_start` and `find_sequence` of `kvq_core.kernels.segments`.

    Tiles of SEQS sequences are counted in 32 bits: plans see to it that tables have no room for more.
    """
    first_tiles = _tiles_of_sequences(0, lengths, S)  # most often of all
    total = gl.sum(first_tiles, 0).to(gl.int64)
    for first_seq in range(SEQS, lengths.num_seqs, SEQS):
        total += gl.sum(_tiles_of_sequences(first_seq, lengths, S), 0)
    tile = part_start(program, total, S)
    seq, first_tile, passed = _skip_sequences(tile, tile * 0, first_tiles)
    for first_seq in range(SEQS, lengths.num_seqs, SEQS):
        seqs, tiles, passed = _skip_sequences(tile, passed, _tiles_of_sequences(first_seq, lengths, S))
        seq += seqs
        first_tile += tiles
    return Line(seq, first_tile, tile, part_start(program + 1, total, S), lengths)


@gluon.jit
def _tiles_of_sequences(first_seq, lengths, S: gl.constexpr):
    seq = first_seq + gl.arange(0, SEQS, layout=_SEQUENCES)
    start, end = _keys_of_sequences(seq, lengths, S)
    return gl.cdiv(end - start, S.tile)


@gluon.jit
def _skip_sequences(tile, passed, tiles):
    """Of sequences after ``passed`` tiles, those that end up to ``tile``: their number, their tiles; tiles passed."""
    is_before = passed + gl.associative_scan(tiles, 0, _add) <= tile
    skipped = gl.sum(gl.where(is_before, tiles, 0), 0)
    return gl.sum(is_before.to(gl.int32), 0), skipped.to(gl.int64), passed + gl.sum(tiles, 0)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _keys_of_sequences(seq, lengths, S: gl.constexpr):
    """`kvq_core.kernels.segments.keys_of`."""
    exists = seq < lengths.num_seqs
    return keys_of(seq, exists, lengths.seq_lens_ptr, lengths.cu_seqlens_q_ptr, lengths.capacity, S)


@gluon.jit
def keys_of_segment(line, S: gl.constexpr):
    """The keys of the part that are of the sequence at hand: first, end, and the end of the sequence's."""
    _, seq_end = _keys_of_sequences(line.seq, line.lengths, S)
    start = ((line.tile - line.first_tile) * S.tile).to(gl.int32)
    end = gl.minimum((line.last_tile - line.first_tile) * S.tile, seq_end.to(gl.int64)).to(gl.int32)
    return start, end, seq_end


@gluon.jit
def next_segment(line, seq_end, S: gl.constexpr):
    """The line from the first tile of the next sequence."""
    tile = line.first_tile + gl.cdiv(seq_end, S.tile)
    return Line(line.seq + 1, tile, tile, line.last_tile, line.lengths)


@gluon.jit
def token_of_query(line, head, S: gl.constexpr):
    """Token of the query of the sequence at hand, and which heads of it exist."""
    lengths = line.lengths
    token, num_queries = queries_of(line.seq, line.seq < lengths.num_seqs, lengths.cu_seqlens_q_ptr, S)
    exists = (num_queries > 0) & (token >= 0) & (token < lengths.num_q_tokens)
    return token, (head < S.group) & exists


@gluon.jit
def load_queries(queries, line, head, FIRST: gl.constexpr, COLUMNS: gl.constexpr, L: gl.constexpr, S: gl.constexpr):
    """q [heads, COLUMNS] of the sequence at hand, from column ``FIRST`` on; 0 for heads that do not exist."""
    q_ptr, stride_token, stride_head = queries
    token, exists = token_of_query(line, head, S)
    rows = q_ptr + token.to(gl.int64) * (stride_token.to(gl.int64) * S.q_align)
    rows = rows + head.to(gl.int64) * (stride_head.to(gl.int64) * S.q_align)
    column = FIRST + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, L))
    return gl.load(rows[:, None] + column[None, :], mask=exists[:, None], other=0.0)
