"""What is supported where: which variants the conformance cases cover on which backend, as the tables of the README.

    python -m tests.support            # print them
    python -m tests.support --write    # put them into README.md

Every cell follows from the cases that all backends of its column run. "yes" is all that the row lists. The rows are
those of `tests.variants`.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import backends, cases, library_support, test_conformance
from tests.test_properties import EXAMPLES
from tests.variants import MLA_VARIANTS, VARIANTS, Variant

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- written by python -m tests.support --write -->\n", "<!-- end -->\n"
CASES = (
    *test_conformance.APPEND_CASES,
    *test_conformance.GATHER_CASES,
    *cases.COPY_CASES,
    *test_conformance.ATTENTION_CASES,
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


def covered(variant: Variant, *columns: Column) -> set[str | int]:
    """The values of ``variant`` in the cases that any of the columns runs."""
    return variant.covered(case for case in CASES if any(column.runs(case) for column in columns))


def cells(variant: Variant) -> list[str]:
    """What the cases cover, and in each column: "yes" for all of it, ``-`` for nothing, else what."""
    everything = covered(variant, *COLUMNS)
    found = (covered(variant, column) for column in COLUMNS)
    return [text_of(everything), *("yes" if values == everything else text_of(values) for values in found)]


def table(title: str, variants: Iterable[Variant]) -> str:
    """A table in Markdown."""
    backends_of = (f"{column.framework} `{column.impl}`, {column.devices}" for column in COLUMNS)
    header = [title, "tested with", *backends_of]
    body = [[variant.name, *cells(variant)] for variant in variants]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *body))


def tables() -> str:
    """What stands between the markers of the README."""
    return "\n".join((table("KV caches", VARIANTS), table("MLA caches", MLA_VARIANTS), drawn(), library()))


def drawn() -> str:
    """What random combinations are made of, in a sentence."""
    rest, mla_rest = (
        ", ".join(variant.name for variant in variants if not variant.drawn) for variants in (VARIANTS, MLA_VARIANTS)
    )
    counts = EXAMPLES.values()
    return paragraph(
        f"On every backend, hypothesis draws {min(counts)} to {max(counts)} random combinations of all rows but "
        f"these: {rest}; of MLA caches: {mla_rest}."
    )


def library() -> str:
    """What prefill through cuDNN takes, as a list."""
    lead = (
        "Prefill also goes through the framework's cuDNN attention, over values read back from the pages: where "
        "`impl` says so, and by itself for long prompts on a GPU since Hopper. What it is tested with:"
    )
    needs = "; ".join(library_support.needs())
    items = [*map(library_item, library_support.IMPLEMENTATIONS), f"- Both need, else `NotImplementedError`: {needs}."]
    return paragraph(lead) + "\n" + "".join(map(paragraph, items))


def library_item(implementation: library_support.Implementation) -> str:
    """What one of them is tested with, and what it alone refuses."""
    modes, variants = library_support.modes(implementation), library_support.variants(implementation)
    item = f"- {implementation.framework} `{implementation.impl}`: {text_of(modes)}; {', '.join(variants)}."
    refused = f" It refuses {', '.join(implementation.refused)}." if implementation.refused else ""
    return item + refused


def paragraph(text: str) -> str:
    """``text`` in lines of the README, those of an item of a list indented."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, width=120, break_on_hyphens=False, subsequent_indent=indent) + "\n"


def with_tables(readme: str) -> str:
    """The text of the README with the tables between its markers."""
    pattern = re.compile(f"(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})", flags=re.DOTALL)
    return pattern.sub(lambda _: f"\n{tables()}\n", readme)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support", description="What is supported where.")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    if parser.parse_args().write:
        README.write_text(with_tables(README.read_text()))
    else:
        print(tables(), end="")


if __name__ == "__main__":
    main()
