"""What is supported where: which variants the conformance cases cover on which backend, as the table of the README.

    python -m tests.support            # print it
    python -m tests.support --write    # put it into README.md

Every cell follows from the cases that all backends of its column run. "yes" is all that the row lists.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import backends, cases
from tests.case_types import AppendCase, AttentionCase, CopyCase, GatherCase
from tests.parts import MergeCase
from tests.test_properties import EXAMPLES

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- written by python -m tests.support --write -->\n", "<!-- end -->\n"
CASES = (
    *cases.APPEND_CASES,
    *cases.GATHER_CASES,
    *cases.COPY_CASES,
    *cases.ATTENTION_CASES,
    *cases.MERGE_CASES,
)
SHORT_NAMES = {
    "int8_per_token_head": "int8",
    "fp8_per_token_head": "fp8",
    "fp8_e4m3": "e4m3",
    "fp8_e5m2": "e5m2",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
}


@dataclass(frozen=True)
class Column:
    """Backends, by name, that a user sees as one: ``impl`` of a framework on its devices."""

    framework: str
    impl: str
    devices: str
    names: tuple[str, ...]

    def runs(self, case: Any) -> bool:
        """Whether the conformance tests run ``case`` on every backend of the column."""
        return all(
            backends.takes_on(backend, case) and not backends.lacks_strides(backend, case)
            for backend in backends.ALL
            if backend.name in self.names
        )


COLUMNS = (
    Column("torch", "triton", "GPU", ("torch-triton",)),
    Column("jax", "triton", "GPU", ("jax-triton",)),
    Column("torch", "eager", "GPU and CPU", ("torch-eager", "torch-eager-gpu")),
    Column("jax", "xla", "CPU", ("jax-xla",)),
    Column("torch", "triton", "interpreter", ("torch-interpreter",)),
    Column("jax", "triton", "interpreter", ("jax-interpreter",)),
)


Condition = Callable[[Any], bool]


def mode_of(case: Any) -> tuple[str, ...]:
    return (case.layout.kv_cache_dtype,)


def head_dims_of(case: Any) -> tuple[int, ...]:
    return case.layout.head_dim, case.layout.head_dim_v


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        name: what a user calls it.
        covers: whether a case is one; several conditions, one for each operation, must all be met by some case.
        values: what a cell lists of a case, modes or numbers.
        drawn: whether the properties of `tests.test_properties` draw it.
        not_in: frameworks that do not have it.
    """

    name: str
    covers: Condition | tuple[Condition, ...]
    values: Callable[[Any], Iterable[str | int]] = mode_of
    drawn: bool = True
    not_in: tuple[str, ...] = ()

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """``covers`` as a tuple."""
        return self.covers if isinstance(self.covers, tuple) else (self.covers,)

    def covered(self, *columns: Column) -> set[str | int]:
        """The values that cases cover which any of the columns runs, in every operation."""
        ran = [case for case in CASES if any(column.runs(case) for column in columns)]
        values = [{value for case in ran if covers(case) for value in self.values(case)} for covers in self.conditions]
        return set.intersection(*values)

    def cells(self) -> list[str]:
        """What the cases cover, and in each column: "yes" for all of it, ``-`` for nothing, else what."""
        everything = self.covered(*COLUMNS)
        found = [self.covered(column) for column in COLUMNS]
        return [text_of(everything), *("yes" if values == everything else text_of(values) for values in found)]


def text_of(values: set[str | int]) -> str:
    """Modes by their short names and the number of pairs; numbers as a range and how many; ``-`` for nothing."""
    numbers = [value for value in values if isinstance(value, int)]
    if numbers:
        return f"{min(numbers)} to {max(numbers)} ({len(numbers)})" if len(numbers) > 1 else str(numbers[0])
    modes = [short for name, short in SHORT_NAMES.items() if name in values]
    pairs = values - SHORT_NAMES.keys()
    words = ["all"] if len(modes) == len(SHORT_NAMES) else modes
    if pairs:
        words.append(f"{len(pairs)} pair{'s' if len(pairs) > 1 else ''}")
    return ", ".join(words) or "-"


def records(case_type: type, condition: Condition = lambda case: True) -> Condition:
    """Cases of a type over records."""
    return lambda case: isinstance(case, case_type) and not case.layout.has_rows and condition(case)


def attention(condition: Condition = lambda case: True) -> Condition:
    """Attention over records."""
    return records(AttentionCase, condition)


def rows(strided: bool) -> tuple[Condition, ...]:
    """Writing, reading and attending to row containers that are dense arrays, or that have strides."""
    return tuple(
        lambda case, case_type=case_type: (
            isinstance(case, case_type) and case.layout.has_rows and bool(case.pool) == strided
        )
        for case_type in (AppendCase, GatherCase, AttentionCase)
    )


def has_padded_pages(case: Any) -> bool:
    return bool(case.pool)


def has_strides(case: Any) -> bool:
    return bool(case.strides)


def most_queries(case: AttentionCase) -> int:
    return max((count for count, _ in case.seqs), default=0)


def is_speculative(case: AttentionCase) -> bool:
    """Whether the caller says that a sequence has few queries, and some have more than one."""
    return case.max_seqlen_q is not None and 2 <= most_queries(case) <= case.max_seqlen_q <= 16


def is_prefill(case: AttentionCase) -> bool:
    return most_queries(case) > 16


def is_mixed_batch(case: AttentionCase) -> bool:
    return is_prefill(case) and any(count == 1 for count, _ in case.seqs)


def has_scales(case: AttentionCase) -> bool:
    """Whether a per-tensor mode has a scale other than 1."""
    sides = ((case.layout.k_mode, case.k_scale), (case.layout.v_mode, case.v_scale))
    return any(mode.is_per_tensor and scale != 1 for mode, scale in sides)


VARIANTS = (
    Variant("append", records(AppendCase)),
    Variant("gather", records(GatherCase)),
    Variant("copy pages", lambda case: isinstance(case, CopyCase), drawn=False),
    Variant("decode", attention(lambda case: not case.ragged and case.seqs)),
    Variant("speculative decode, 2 to 16 queries", attention(is_speculative)),
    Variant("prefill, chunked or whole", attention(is_prefill)),
    Variant("decode and prefill in one batch", attention(is_mixed_batch)),
    Variant("sliding window", attention(lambda case: case.window)),
    Variant("softcap", attention(lambda case: case.softcap)),
    Variant("sinks", attention(lambda case: case.sinks)),
    Variant("ALiBi", attention(lambda case: case.alibi)),
    Variant("not causal", attention(lambda case: not case.causal)),
    Variant("scales per tensor other than 1", attention(has_scales)),
    Variant("pages shared by sequences", attention(lambda case: case.shared_pages), drawn=False),
    Variant("`merge_states` over parts", records(MergeCase), drawn=False),
    Variant("row containers", rows(strided=False)),
    Variant("row containers with strides", rows(strided=True), drawn=False, not_in=("jax",)),
    Variant(
        "padding between pages",
        tuple(records(case_type, has_padded_pages) for case_type in (AppendCase, GatherCase, AttentionCase)),
        drawn=False,
        not_in=("jax",),
    ),
    Variant(
        "strided `q`, `k`, `v`",
        (records(AppendCase, has_strides), attention(has_strides)),
        drawn=False,
        not_in=("jax",),
    ),
    Variant("dtype of `q`", attention(), lambda case: (case.q_dtype,)),
    Variant("`head_dim`, `head_dim_v`", attention(), head_dims_of),
    Variant("`page_size`", attention(), lambda case: (case.layout.page_size,)),
    Variant("query heads per KV head", attention(), lambda case: (case.group,)),
)


def table() -> str:
    """The table in Markdown."""
    backends_of = (f"{column.framework} `{column.impl}`, {column.devices}" for column in COLUMNS)
    header = ["variant", "tested with", *backends_of]
    body = [[variant.name, *variant.cells()] for variant in VARIANTS]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *body))


def drawn() -> str:
    """What random combinations are made of, in a sentence."""
    rest = ", ".join(variant.name for variant in VARIANTS if not variant.drawn)
    counts = EXAMPLES.values()
    sentence = (
        f"On every backend, hypothesis draws {min(counts)} to {max(counts)} random combinations of all rows but "
        f"these: {rest}."
    )
    return textwrap.fill(sentence, width=120, break_on_hyphens=False) + "\n"


def with_table(readme: str) -> str:
    """The text of the README with the table between its markers."""
    pattern = re.compile(f"(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})", flags=re.DOTALL)
    return pattern.sub(lambda _: f"\n{table()}\n{drawn()}\n", readme)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support", description="What is supported where.")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    if parser.parse_args().write:
        README.write_text(with_table(README.read_text()))
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
