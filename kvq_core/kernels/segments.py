"""Which keys a program attends to, found on the device from the lengths.

The grid follows from shapes alone. All keys of all sequences are cut into segments of one size, chosen so that about
``S.target_segments`` of them exist whatever the lengths are, and program number n takes segment number n. A sequence
has at least one segment, so there are at most ``num_seqs + target_segments``.
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
def keys_of(seq_len, num_queries, capacity, S: tl.constexpr):
    """The range of keys that some query of a sequence can see, its start rounded down to a tile."""
    end = tl.where(num_queries > 0, tl.maximum(tl.minimum(seq_len, capacity), 0), 0)
    start = tl.zeros_like(end)
    if S.window > 0:
        start = tl.maximum(seq_len - num_queries - S.window + 1, 0) // S.tile * S.tile
        start = tl.minimum(start, end)
    return start, end


@triton.jit
def _keys_of_sequences(first_seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, capacity, S: tl.constexpr):
    """Number of keys of SEQS sequences, 0 past the last one."""
    seq = first_seq + tl.arange(0, SEQS)
    mask = seq < num_seqs
    _, num_queries = queries_of(seq, mask, cu_seqlens_q_ptr, S)
    start, end = keys_of(tl.load(seq_lens_ptr + seq, mask=mask, other=0), num_queries, capacity, S)
    return end - start, seq, mask


@triton.jit
def _segment_size(seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, capacity, S: tl.constexpr):
    """Keys of a segment: a share of all keys, rounded up to tiles."""
    total = tl.zeros([SEQS], tl.int64)
    for first_seq in range(0, num_seqs, SEQS):
        keys, _, _ = _keys_of_sequences(first_seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, capacity, S)
        total += keys
    share = tl.cdiv(tl.sum(total, axis=0), S.target_segments).to(tl.int32)
    return tl.cdiv(tl.maximum(share, S.min_segment), S.tile) * S.tile


@triton.jit
def find_segment(segment, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, capacity, S: tl.constexpr):
    """Sequence of a segment (num_seqs if there are fewer segments) and its range of keys."""
    size = _segment_size(seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, capacity, S)
    segments = 0
    seq = 0
    first_segment = 0
    for first_seq in range(0, num_seqs, SEQS):
        keys, _, mask = _keys_of_sequences(first_seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, capacity, S)
        count = tl.where(mask, tl.maximum(tl.cdiv(keys, size), 1), 0)
        before = mask & (segments + tl.cumsum(count, axis=0) <= segment)
        seq += tl.sum(before.to(tl.int32), axis=0)
        first_segment += tl.sum(tl.where(before, count, 0), axis=0)
        segments += tl.sum(count, axis=0)
    exists = seq < num_seqs
    _, num_queries = queries_of(seq, exists, cu_seqlens_q_ptr, S)
    start, end = keys_of(tl.load(seq_lens_ptr + seq, mask=exists, other=0), num_queries, capacity, S)
    splits = tl.maximum(tl.cdiv(end - start, size), 1)
    share = tl.cdiv(tl.cdiv(end - start, splits), S.tile) * S.tile
    start += (segment - first_segment) * share
    return seq, start, tl.minimum(start + share, end)


@triton.jit
def segments_of(seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, capacity, S: tl.constexpr):
    """First segment and number of segments of sequence ``seq``; 0 segments if there is no such sequence."""
    size = _segment_size(seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, capacity, S)
    first_segment = 0
    splits = 0
    for first_seq in range(0, num_seqs, SEQS):
        keys, other, mask = _keys_of_sequences(first_seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, capacity, S)
        count = tl.where(mask, tl.maximum(tl.cdiv(keys, size), 1), 0)
        first_segment += tl.sum(tl.where(other < seq, count, 0), axis=0)
        splits += tl.sum(tl.where(other == seq, count, 0), axis=0)
    return first_segment, splits


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
    first_tile = tl.load(cu_seqlens_q_ptr + seq) // S.queries + seq
    return seq, (tile - first_tile) * S.queries
