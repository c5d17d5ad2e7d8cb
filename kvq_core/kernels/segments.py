"""Which keys a program attends to, found on the device from the lengths.

The grid follows from shapes alone. The keys of all sequences, counted in tiles, form one line; program n of
``S.programs`` takes the n-th of equal parts of it, whatever the lengths are; programs past the last part do nothing. A
part can span sequences, and a sequence parts: what program n finds for sequence s is segment n + s. Walking along the
line, each new segment advances n or s, so no two segments share a number, and there are fewer than
``S.programs + num_seqs``.
"""

import triton
import triton.language as tl

SEQS = tl.constexpr(128)  # sequences looked at in a step


@triton.jit
def queries_of(seq, mask, cu_seqlens_q_ptr, S: tl.constexpr):
    """First query and number of queries of sequences ``seq``."""
    if S.has_cu_seqlens:
        first = tl.load(cu_seqlens_q_ptr + seq, mask=mask, other=0)
        count = tl.load(cu_seqlens_q_ptr + seq + 1, mask=mask, other=0) - first
    else:
        first = seq
        count = tl.where(mask, 1, 0)
    return first, count


@triton.jit
def keys_of(seq, mask, seq_lens_ptr, cu_seqlens_q_ptr, capacity, S: tl.constexpr):
    """The range of keys that some query of a sequence can see, its start rounded down to a tile."""
    _, num_queries = queries_of(seq, mask, cu_seqlens_q_ptr, S)
    seq_len = tl.load(seq_lens_ptr + seq, mask=mask, other=0)
    end = tl.where(num_queries > 0, tl.maximum(tl.minimum(seq_len, capacity), 0), 0)
    start = end * 0  # zeros_like: callers in Gluon would have to name a layout
    if S.window > 0:
        start = tl.maximum(seq_len - num_queries - S.window + 1, 0) // S.tile * S.tile
        start = tl.minimum(start, end)
    return start, end


@triton.jit
def _tiles_of_sequences(first_seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, capacity, S: tl.constexpr):
    """Number of tiles of SEQS sequences, 0 past the last one."""
    seq = first_seq + tl.arange(0, SEQS)
    start, end = keys_of(seq, seq < num_seqs, seq_lens_ptr, cu_seqlens_q_ptr, capacity, S)
    return seq, tl.cdiv(end - start, S.tile)


@triton.jit
def total_tiles(last_seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, capacity, S: tl.constexpr):
    """Tiles of all sequences, and of those before ``last_seq``."""
    total = tl.full([SEQS], 0, tl.int64)
    before = tl.full([SEQS], 0, tl.int64)
    for first_seq in range(0, num_seqs, SEQS):
        seq, tiles = _tiles_of_sequences(first_seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, capacity, S)
        total += tiles
        before += tl.where(seq < last_seq, tiles, 0)
    return tl.sum(total, axis=0), tl.sum(before, axis=0)


@triton.jit
def find_sequence(tile, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, capacity, S: tl.constexpr):
    """The sequence that ``tile`` of the line belongs to, and its first tile."""
    line = tile * 0
    seq = 0
    first_tile = tile * 0
    for first_seq in range(0, num_seqs, SEQS):
        _, tiles = _tiles_of_sequences(first_seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, capacity, S)
        tiles = tiles.to(tl.int64)
        before = line + tl.cumsum(tiles, axis=0) <= tile
        seq += tl.sum(before.to(tl.int32), axis=0)
        first_tile += tl.sum(tl.where(before, tiles, 0), axis=0)
        line += tl.sum(tiles, axis=0)
    return seq, first_tile


@triton.jit
def part_tiles(total, S: tl.constexpr):
    """Tiles of a part: as few as programs allow, rounded up by less than a 16th.

    So parts of long sequences of one round length begin where they do, and there no program has two segments.
    """
    tiles = tl.maximum(tl.cdiv(total, S.programs), 1)
    step = tl.where(tiles >= 32, 2, 1)
    step = tl.where(tiles >= 64, 4, step)
    step = tl.where(tiles >= 128, 8, step)
    return (tiles + step - 1) & -step


@triton.jit
def part_start(program, total, S: tl.constexpr):
    """First tile of a program's part of the line."""
    return tl.minimum(program * part_tiles(total, S), total)


@triton.jit
def part_of(tile, total, S: tl.constexpr):
    """The program whose part holds ``tile``."""
    return tile // part_tiles(total, S)


@triton.jit
def sequence_of_token(token, cu_seqlens_q_ptr, num_seqs, S: tl.constexpr):
    """Sequence of a query (num_seqs if the query is padding) and the query's index in it."""
    if S.has_cu_seqlens:
        seq = 0
        for first_seq in range(0, num_seqs, SEQS):
            other = first_seq + tl.arange(0, SEQS)
            ends = tl.load(cu_seqlens_q_ptr + other + 1, mask=other < num_seqs, other=0x7FFFFFFF)
            seq += tl.sum((ends <= token).to(tl.int32), axis=0)
        q_index = token - tl.load(cu_seqlens_q_ptr + seq)
    else:
        seq = token
        q_index = token - token
    return seq, q_index


@triton.jit
def find_query_tile(tile, cu_seqlens_q_ptr, num_seqs, S: tl.constexpr):
    """Sequence and first query of a tile of ``S.queries`` queries; past the last sequence come the padding queries.

    Sequence s owns the tiles from ``cu_seqlens_q[s] // S.queries + s``, at least as many as it needs.
    """
    seq = -1
    for first_seq in range(0, num_seqs + 1, SEQS):
        other = first_seq + tl.arange(0, SEQS)
        mask = other <= num_seqs
        first_tile = tl.load(cu_seqlens_q_ptr + other, mask=mask, other=0) // S.queries + other
        seq += tl.sum((mask & (first_tile <= tile)).to(tl.int32), axis=0)
    seq = tl.maximum(seq, 0)
    first_tile = tl.load(cu_seqlens_q_ptr + seq) // S.queries + seq
    return seq, (tile - first_tile) * S.queries
