"""Attention in parts: the keys of an attention case dealt out to caches of their own."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from kvq_core import CacheLayout, reference
from tests import inputs as make
from tests.case_types import AttentionCase, AttentionInputs


@dataclass(frozen=True)
class MergeCase:
    """``whole`` cut at random places into ``num_parts`` ranges of keys a sequence, some of them empty.

    The parts before the last lie before all queries if the whole is causal, so that all of their keys are seen.
    """

    whole: AttentionCase
    num_parts: int

    @property
    def name(self) -> str:
        return f"{self.whole.name}-in-{self.num_parts}"

    @property
    def layout(self) -> CacheLayout:
        return self.whole.layout

    @property
    def tags(self) -> frozenset[str]:
        return self.whole.tags

    def parts(self) -> list[tuple[AttentionInputs, dict]]:
        """Inputs and static arguments of ``paged_attention`` for each part; sinks count in the last."""
        rng, inputs, options = make.generator(self.name), self.whole.inputs(), self.whole.options()
        num_queries, seq_lens = np.array(self.whole.seqs).T
        most = np.maximum(0, seq_lens - num_queries) if self.whole.causal else seq_lens
        cuts = np.sort(rng.integers(0, most + 1, (self.num_parts - 1, len(most))), axis=0)
        bounds = np.concatenate([np.zeros_like(cuts[:1]), cuts, seq_lens[None]])
        parts = [_part_of(rng, self.layout, inputs, *ends) for ends in itertools.pairwise(bounds)]
        before = [(part._replace(sinks=None), options | {"causal": False}) for part in parts[:-1]]
        return [*before, (parts[-1], options)]


def _part_of(
    rng: np.random.Generator, layout: CacheLayout, inputs: AttentionInputs, starts: np.ndarray, stops: np.ndarray
) -> AttentionInputs:
    """The inputs over keys ``starts[i] .. stops[i]`` of sequence i, their bytes moved to a pool of their own."""
    lengths = (stops - starts).tolist()
    table, _ = make.make_table(rng, layout, lengths, shared_pages=0, spare_pages=1)
    pages = make.poisoned_pool(layout, inputs.pages.shape[0])  # all parts of one shape: XLA compiles for each
    page_table = make.pad_table(rng, table, inputs.page_table.shape[1])
    for old, new, start, stop in zip(inputs.page_table, page_table, starts, stops, strict=True):
        old_pages, old_rows = np.divmod(np.arange(start, stop), layout.page_size)
        new_pages, new_rows = np.divmod(np.arange(stop - start), layout.page_size)
        for name in layout.fields:
            rows = reference.record_field(layout, inputs.pages, name)[old[old_pages], :, old_rows]
            reference.record_field(layout, pages, name)[new[new_pages], :, new_rows] = rows
    return inputs._replace(pages=pages, page_table=page_table, seq_lens=np.array(lengths, np.int32))
