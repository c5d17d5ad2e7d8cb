"""The figures that documents quote from the committed runs: `python -m bench.quotes [--write]` checks or renews them.

A quote is text of a document with the figures of a run. Its words name the place, its numbers are what must stand
there. Whether the words around them are still true is for a reader to see.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.cases import BF16, FP8, FP8_TENSOR, INT8
from bench.report import Report, load, peer_name
from bench.rows import FLASHINFER, JAX, KERNEL, LIBRARY, PLAIN, RATES, TORCH, Row, meets_bar, quantity, ratio

ROOT = Path(__file__).parents[1]
RUN = ROOT / "bench/results/nvidia-h200.json"
SECTION_RUNS = {section: ROOT / f"bench/results/nvidia-h200-{section}.json" for section in ("prefill", "mla")}
BEGIN, END = "<!-- written by python -m bench.quotes --write -->\n", "<!-- end -->\n"
NUMBER = re.compile(r"\d+(?:\.\d+)*")


@dataclass(frozen=True)
class Figures:
    """Figures of a run by case, mode and implementation."""

    run: Report

    def row(self, case: str, mode: str, impl: str = TORCH) -> Row:
        return self.run.by_key[case, impl, mode]

    def us(self, case: str, mode: str, impl: str = TORCH) -> float:
        return self.row(case, mode, impl).timing.median_us

    def tb_per_s(self, case: str, mode: str) -> float:
        return self.row(case, mode).tb_per_s

    def tflop_per_s(self, case: str, mode: str, impl: str = TORCH) -> float:
        return self.row(case, mode, impl).tflop_per_s

    def over_peer(self, case: str, mode: str) -> float:
        return self.us(case, mode) / self.us(case, BF16, FLASHINFER)

    def us_of_bytes(self, case: str, mode: str) -> float:
        """The time of the bytes alone, at the bandwidth of a copy."""
        return self.row(case, mode).num_bytes / self.run.copy_tb_per_s * 1e-6

    @property
    def missed(self) -> list[Row]:
        return [row for row in self.run.rows if meets_bar(row, ratio(row, self.run.by_key)) is False]


def committed() -> Report:
    """The committed runs as one: the rows of some sections are those of a run of their own."""
    run = load(RUN)
    rows = [row for row in run.rows if row.section not in SECTION_RUNS]
    for path in SECTION_RUNS.values():
        rows += load(path).rows
    return dataclasses.replace(run, rows=tuple(rows))


def documents(run: Report) -> dict[str, tuple[str, ...]]:
    """The quotes of each document, by its path."""
    of = Figures(run)
    return {
        "README.md": (
            *_first_table(of),
            *_below_it(of),
            *_mla(of),
            _count_of_missed_bars(of),
            *_missed(of),
            *_advice(of),
        ),
        "bench/README.md": (
            _count_of_missed_bars(of),
            _fp8_over_bfloat16(of),
            *_where_time_goes(of),
            *_where_time_of_mla_goes(of),
            *_jax_and_host(of),
            *_prefill(of),
        ),
        "kvq_core/advice.py": (_decode_us(of),),
    }


def renewed(text: str, run: Report, quotes: tuple[str, ...]) -> str:
    """``text`` with the numbers of ``quotes``, and with the table of missed bars between its markers, if it has them.

    Raises:
        ValueError: the words of a quote are not in one place.
    """
    for quote in quotes:
        text = put(text, quote)
    between = re.compile(f"(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})", flags=re.DOTALL)
    return between.sub(lambda _: f"\n{missed_bars(run)}\n", text)


def put(text: str, quote: str) -> str:
    """``text`` with the numbers of ``quote`` in the one place that has its words.

    Raises:
        ValueError: there is no such place, or more than one.
    """
    places = list(_pattern(quote).finditer(text))
    if len(places) != 1:
        raise ValueError(f"expected one place that reads {quote!r}, whatever its numbers; found {len(places)}")
    (start, end), numbers = places[0].span(), iter(NUMBER.findall(quote))
    return text[:start] + NUMBER.sub(lambda _: next(numbers), text[start:end]) + text[end:]


def without(text: str, quotes: tuple[str, ...]) -> str:
    """``text`` less its ``quotes``."""
    for quote in quotes:
        text = _pattern(quote).sub("", text)
    return text


def missed_bars(run: Report) -> str:
    """A table in Markdown of the rows that miss their bars."""
    header = ["case", "who", "mode", "measured", "bar"]
    body = [_cells(row, run) for row in Figures(run).missed]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *body))


def _cells(row: Row, run: Report) -> list[str]:
    bar, value = row.bar, quantity(row, ratio(row, run.by_key))
    assert bar is not None
    is_ratio = bar.quantity == "ratio"
    measured = f"{value:.3f} of the time of {peer_name(row)}" if is_ratio else f"{value:.4g} {bar.quantity}"
    return [
        row.case,
        row.impl,
        row.mode,
        measured,
        f"{'at least' if bar.quantity in RATES else 'at most'} {bar.limit:g}",
    ]


def _first_table(of: Figures) -> tuple[str, ...]:
    kvq = {mode: f"{of.us('64x8k', mode):.0f} us" for mode in (BF16, INT8, FP8)}
    peer = {mode: f"{of.us('64x8k', mode, FLASHINFER):.0f} us" for mode in (BF16, FP8_TENSOR)}
    return (
        f"peer: FlashInfer {of.run.environment['flashinfer-python']} |",
        f"| `bfloat16` | 4096 | 100.0% | {kvq[BF16]} | {peer[BF16]} (bfloat16) |",
        f"| `int8_per_token_head` | 2112 | 51.6% | {kvq[INT8]} |",
        f"| `fp8_per_token_head` | 2112 | 51.6% | {kvq[FP8]} |",
        f"(one scale per layer) | 2048 | 50.0% | | {peer[FP8_TENSOR]} (e4m3) |",
    )


def _below_it(of: Figures) -> tuple[str, ...]:
    one = {
        case: (of.us(case, INT8), of.us(case, BF16), of.us(case, BF16, FLASHINFER)) for case in ("1x1k", "1x8k sweep")
    }
    dense = of.row("prefill 8k D=128", BF16, LIBRARY)
    slow, fast = (dense.num_flops / us * 1e-6 for us in (dense.timing.max_us, dense.timing.min_us))
    return (
        "1k keys take {:.1f} us from int8, {:.1f} from bfloat16 and {:.1f} in FlashInfer".format(*one["1x1k"]),
        "8k keys {:.1f}, {:.1f} and {:.1f}".format(*one["1x8k sweep"]),
        f"8k tokens make {of.tflop_per_s('prefill 8k D=128', INT8):.0f} TFLOP/s from int8 pages, where cuDNN on dense "
        f"bfloat16 makes {dense.tflop_per_s:.0f} (samples: {slow:.0f} to {fast:.0f})",
        f"32k tokens {of.tflop_per_s('prefill 32k D=128', INT8):.0f} where it makes "
        f"{of.tflop_per_s('prefill 32k D=128', BF16, LIBRARY):.0f}",
        f"kvq's own prefill kernel makes {of.tflop_per_s('prefill 8k D=128', INT8, KERNEL):.0f}",
    )


def _count_of_missed_bars(of: Figures) -> str:
    return f"miss {len(of.missed)} of the {sum(row.bar is not None for row in of.run.rows)} bars"


def _mla(of: Figures) -> tuple[str, ...]:
    few, many = (
        [of.us(case, mode) for mode in (FP8_TENSOR, FP8, INT8, BF16)] + [of.us(case, BF16, FLASHINFER)]
        for case in ("mla 16 heads", "mla 128 heads")
    )
    return (
        "16 heads take {:.0f} us from `fp8_e4m3`, {:.0f} from `fp8_per_token_head`, {:.0f} from int8 and {:.0f} from "
        "bfloat16, FlashInfer {:.0f} from bfloat16".format(*few),
        "take {:.0f}, {:.0f}, {:.0f} and {:.0f} us, FlashInfer {:.0f}".format(*many),
    )


def _missed(of: Figures) -> tuple[str, ...]:
    host = "append + attention"
    decodes = [row for row in of.run.rows if (row.section, row.impl) == ("decode", JAX)]
    jax = max(row.timing.median_us / of.us(row.case, row.mode) for row in decodes)
    return (
        f"JAX: up to {jax:.2f} of the time",
        f"cost the host {of.us(host, INT8):.0f} us without a CUDA graph, where FlashInfer's cost it "
        f"{of.us(host, BF16, FLASHINFER):.0f}",
    )


def _fp8_over_bfloat16(of: Figures) -> str:
    """A bar of issue 4 that no row carries: its rows are held against FlashInfer."""
    case = "mla 128 heads"
    tensor, token = (of.us(case, mode) / of.us(case, BF16) for mode in (FP8_TENSOR, FP8))
    return f"fp8 takes {tensor:.3f} (one scale per layer) and {token:.3f} (per token) of the time of bfloat16"


def _advice(of: Figures) -> tuple[str, ...]:
    return (
        f"about the same time, {of.us('64x8k', FP8):.0f} us where int8 takes {of.us('64x8k', INT8):.0f},",
        f"8k take {of.us('64x8k', INT8):.0f} us from int8 and {of.us('64x8k', BF16):.0f} us from bfloat16, "
        f"16 of them {of.us('16x8k', INT8):.0f} us and {of.us('16x8k', BF16):.0f} us",
        f"1k takes {of.us('1x1k', INT8):.1f} us from int8 and {of.us('1x1k', BF16):.1f} us from bfloat16",
        # What `python -m kvq_core plan` prints, from rounded figures.
        f"8k keys in {round(of.us('64x8k', INT8), 1):.0f} us from int8 and in {round(of.us('64x8k', BF16), 1):.0f} "
        "from bfloat16",
    )


def _decode_us(of: Figures) -> str:
    lines = (
        f'"{case}": {{"{INT8}": {of.us(case, INT8):.1f}, "{BF16}": {of.us(case, BF16):.1f}}},'
        for case in ("1x1k", "64x8k")
    )
    return " ".join(lines)


def _where_time_goes(of: Figures) -> tuple[str, ...]:
    case, mqa, append = "64x8k", "64x8k 32/1", "append 65536"
    return (
        f"{of.row(case, INT8).num_bytes * 1e-9:.3f} GB of keys and values, {of.us_of_bytes(case, INT8):.0f} us at the "
        f"copy bandwidth of {of.run.copy_tb_per_s:.2f} TB/s",
        f"| the committed run | | {of.us(case, INT8):.1f} / {of.us(case, FP8):.1f} |",
        f"{of.tb_per_s(case, INT8):.2f} TB/s from int8 and {of.tb_per_s(case, FP8):.2f} from fp8 with the merge, "
        f"{of.tb_per_s(case, BF16):.2f} from bfloat16",
        f"489 in log 7, {of.us(case, BF16):.0f} in the committed run",
        f"Append of 65536 tokens: {of.tb_per_s(append, INT8):.2f} TB/s int8, {of.tb_per_s(append, FP8):.2f} fp8",
        f"{of.us(mqa, INT8):.0f} us int8, {of.us(mqa, FP8):.0f} fp8, {of.tb_per_s(mqa, INT8):.1f} TB/s",
    )


def _where_time_of_mla_goes(of: Figures) -> tuple[str, ...]:
    few, many = "mla 16 heads", "mla 128 heads"
    times = " | ".join(f"{of.us(few, mode):.1f}" for mode in (FP8_TENSOR, FP8, INT8))
    rates = " | ".join(f"{of.tflop_per_s(many, mode):.0f}" for mode in (BF16, FP8_TENSOR, FP8, INT8))
    return (
        f"| the committed run of few heads | {times} |",
        f"The bytes alone take {of.us_of_bytes(few, FP8_TENSOR):.0f} and {of.us_of_bytes(few, FP8):.0f} us",
        f"| the committed run of many heads | {rates} |",
        f"FlashInfer's {of.us(few, BF16, FLASHINFER):.1f} and {of.us(many, BF16, FLASHINFER):.1f} us from bfloat16",
    )


def _jax_and_host(of: Figures) -> tuple[str, ...]:
    case, host = "8x32k", "append + attention"
    over_torch = {mode: of.us(case, mode, JAX) / of.us(case, mode) for mode in (INT8, FP8)}
    samples = of.row(case, FP8, JAX).timing
    return (
        f"through JAX is {over_torch[INT8]:.3f} of PyTorch's time from int8 and {over_torch[FP8]:.3f} from fp8, with "
        f"samples of fp8 from {samples.min_us:.1f} to {samples.max_us:.1f} us",
        f"In the committed run {of.us(host, INT8):.0f} us, where `torch.add` takes {of.us(host, 'float32', PLAIN):.1f} "
        f"and FlashInfer's step {of.us(host, BF16, FLASHINFER):.0f},",
    )


def _prefill(of: Figures) -> tuple[str, ...]:
    case, chunk = "prefill 8k D=128", "prefill 2k of 32k D=128"
    dense = of.row(case, BF16, LIBRARY)
    return (
        f"of {of.us(case, INT8):.0f} us in the committed run, where cuDNN alone takes {dense.timing.median_us:.0f}, "
        f"with samples from {dense.timing.min_us:.0f} to {dense.timing.max_us:.0f}",
        f"merged: {of.over_peer(chunk, INT8):.2f} of FlashInfer's paged",
        f"{of.tflop_per_s(case, INT8, KERNEL):.0f} TFLOP/s at 8k from int8, where cuDNN makes {dense.tflop_per_s:.0f}",
    )


def _pattern(quote: str) -> re.Pattern[str]:
    """The words of ``quote`` with any numbers, broken into lines anywhere."""
    words = (r"\s+".join(map(re.escape, re.split(r"\s+", part))) for part in NUMBER.split(quote))
    return re.compile(NUMBER.pattern.join(words))


def main() -> int:
    """Renew the documents, or say which are stale; exit status 1 if any is left so."""
    parser = argparse.ArgumentParser(prog="python -m bench.quotes", description="Figures of the committed runs.")
    parser.add_argument("--write", action="store_true", help="put them into the documents")
    write, run = parser.parse_args().write, committed()
    is_stale = False
    for path, quotes in documents(run).items():
        document = ROOT / path
        old = document.read_text()
        new = renewed(old, run, quotes)
        if new == old:
            continue
        is_stale = not write
        print(f"{path}: {'renewed' if write else 'stale'}")
        if write:
            document.write_text(new)
    return int(is_stale)


if __name__ == "__main__":
    sys.exit(main())
