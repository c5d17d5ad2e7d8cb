"""How the keys of a batch are shared out: every tile to one program, in parts of one size."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl

from kvq_core.kernels.segments import part_of, part_start, part_tiles

PROGRAMS = 8


@dataclass(frozen=True)
class Spec:
    programs: int


@triton.jit
def find_parts(total_ptr, size_ptr, starts_ptr, owners_ptr, S: tl.constexpr, STARTS: tl.constexpr, TILES: tl.constexpr):
    total = tl.load(total_ptr)
    program, tile = tl.arange(0, STARTS), tl.arange(0, TILES)
    tl.store(size_ptr, part_tiles(total, S))
    tl.store(starts_ptr + program, part_start(program.to(tl.int64), total, S))
    tl.store(owners_ptr + tile, part_of(tile.to(tl.int64), total, S))


@pytest.mark.interpreter
@pytest.mark.parametrize("total", [0, 1, 7, 8, 9, 64, 65, 248, 249, 256, 257, 500, 512, 1000, 1016, 1024])
def test_parts_cover_all_tiles_and_are_of_one_size(total):
    size, starts = torch.empty((), dtype=torch.int64), torch.empty(16, dtype=torch.int64)
    owners = torch.empty(1024, dtype=torch.int64)
    find_parts[(1,)](torch.tensor(total), size, starts, owners, S=Spec(PROGRAMS), STARTS=16, TILES=1024)
    least = max(1, -(-total // PROGRAMS))
    assert least <= size <= least * 17 / 16
    assert starts[PROGRAMS] == total
    assert starts.tolist() == [min(program * int(size), total) for program in range(16)]
    for tile in range(total):
        assert starts[owners[tile]] <= tile < starts[owners[tile] + 1]


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("programs", "num_seqs", "tiles", "size"), [(132, 64, 128, 64), (66, 64, 128, 128), (132, 16, 128, 16)]
)
def test_parts_of_sequences_of_a_round_length_end_where_they_do(programs, num_seqs, tiles, size):
    """64 sequences of 128 tiles over 132 programs: parts of 64 tiles, though 63 would do."""
    got = torch.empty((), dtype=torch.int64)
    rest = torch.empty(16, dtype=torch.int64), torch.empty(1024, dtype=torch.int64)
    find_parts[(1,)](torch.tensor(num_seqs * tiles), got, *rest, S=Spec(programs), STARTS=16, TILES=1024)
    assert got == size
