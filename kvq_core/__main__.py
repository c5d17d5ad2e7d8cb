"""``python -m kvq_core plan CONFIG.json``: which layer is cached how, what fits into memory, and advice."""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvq_core.advice import Situation, advise
from kvq_core.layout import CacheLayout
from kvq_core.mla import MLALayout
from kvq_core.model_config import text_config
from kvq_core.planner import MemoryPlan, parse_bytes
from kvq_core.policy import LayerPolicy, layer_policies

COMPARED_MODES = ("bfloat16", "fp8_e4m3", "int8_per_token_head", "fp8_per_token_head")
# At which decode of many long sequences reads int8 pages on an H200, rounded down (bench/results/nvidia-h200.json).
DEFAULT_BANDWIDTH = 4.0e12
_BANDWIDTH = re.compile(r"(\d+(?:\.\d+)?) *(TB/s|GB/s)?")


@dataclass(frozen=True)
class Report:
    """The plan of a request beside the plans of the modes to compare it with."""

    args: argparse.Namespace
    plan: MemoryPlan
    by_mode: dict[str, MemoryPlan]
    advice: list[str]

    def decode_us(self, plan: MemoryPlan) -> float:
        """Microseconds to read the keys and values of one sequence once."""
        return plan.decode_bytes / self.args.bandwidth * 1e6


def main(argv: list[str] | None = None) -> None:
    """Run the command; a bad argument or config ends it with status 2 and one line."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        report = make_report(args)
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        parser.error(str(error))
    sys.stdout.write(as_json(report) if args.json else as_text(report))


def make_report(args: argparse.Namespace) -> Report:
    """Plan what ``args`` asks for, and every mode to compare with.

    Raises:
        OSError: the config cannot be read.
        ValueError: it is no JSON object of a decoder, or the request is malformed.
        NotImplementedError: kvq does not support the request.
    """
    config = _read_config(args.config)
    context = args.context or text_config(config).get("max_position_embeddings")
    if context is None:
        raise ValueError("the config has no max_position_embeddings: pass --context")
    memory = args.gpu_memory - args.weights
    if memory < 0:
        raise ValueError(f"--weights {args.weights} bytes exceed --gpu-memory {args.gpu_memory} bytes")

    def plan(kv_cache_dtype: str, skip_layers: list[str]) -> MemoryPlan:
        layers = layer_policies(
            config,
            kv_cache_dtype,
            skip_layers=skip_layers,
            page_size=args.page_size,
            compute_dtype=args.compute_dtype,
        )
        return MemoryPlan(layers, context=context, memory=memory)

    asked = plan(args.kv_cache_dtype, args.skip_layers)
    by_mode = {mode: plan(mode, []) for mode in COMPARED_MODES}
    return Report(args, asked, by_mode, advise(Situation(asked, by_mode, config, args.skip_layers)))


def as_json(report: Report) -> str:
    """The report as one JSON object."""
    args, plan = report.args, report.plan
    bfloat16 = report.by_mode["bfloat16"]
    fields = {
        "kv_cache_dtype": args.kv_cache_dtype,
        "skip_layers": args.skip_layers,
        "page_size": args.page_size,
        "context": plan.context,
        "memory": plan.memory,
        "layers": [_layer_json(layer, num_pages) for layer, num_pages in zip(plan.layers, plan.num_pages, strict=True)],
        "bytes_per_token": plan.bytes_per_token,
        "bytes_per_sequence": plan.bytes_per_sequence,
        "sequences": plan.num_sequences,
        "tokens": plan.tokens,
        "tokens_bfloat16": bfloat16.tokens,
        "bandwidth": args.bandwidth,
        "decode_us": report.decode_us(plan),
        "decode_us_bfloat16": report.decode_us(bfloat16),
        "advice": report.advice,
    }
    return json.dumps(fields, indent=2) + "\n"


def _layer_json(layer: LayerPolicy, num_pages: int) -> dict[str, Any]:
    return {
        "index": layer.index,
        "kind": layer.kind,
        "kv_cache_dtype": layer.kv_cache_dtype,
        "bytes_per_token": layer.bytes_per_token,
        "num_pages": num_pages,
        "window": layer.window,
        "shares_kv_with": layer.shares_kv_with,
        "fingerprint": layer.layout.fingerprint() if layer.layout is not None else None,
    }


def as_text(report: Report) -> str:
    """The report as tables and sentences for a person."""
    args, plan = report.args, report.plan
    weights = f"{args.weights / 1e9:.2f} GB of weights taken off" if args.weights else "weights not counted: --weights"
    lines = [
        f"{args.config}: {len(plan.layers)} layers, pages of {args.page_size} tokens",
        f"{plan.memory / 1e9:.2f} GB for KV pages ({weights}), sequences of {plan.context} tokens",
        "",
        *_table(_layer_rows(plan.layers)),
        "",
        *_table(_plan_rows(report)),
        "",
        "Decode is the time to read the keys and values of one sequence once, at "
        f"{args.bandwidth / 1e12:g} TB/s: no weights, no launches.",
        "",
        *[textwrap.fill(f"- {sentence}", width=118, subsequent_indent="  ") for sentence in report.advice],
    ]
    return "\n".join(lines) + "\n"


def _layer_rows(layers: tuple[LayerPolicy, ...]) -> list[tuple[str, ...]]:
    """A header, and a row for all layers that are cached alike."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for layer in layers:
        alike.setdefault(_describe(layer), []).append(layer.index)
    header = ("layers", "kind", "window", "kv_cache_dtype", "cache", "bytes per token")
    return [header, *((_ranges(indices), *cells) for cells, indices in alike.items())]


def _describe(layer: LayerPolicy) -> tuple[str, ...]:
    window = "-" if layer.window is None else str(layer.window)
    if layer.layout is None:
        return (layer.kind, window, "-", "none", "0")
    cache = _describe_layout(layer.layout) if layer.owns_pages else f"that of layer {layer.shares_kv_with}"
    return (layer.kind, window, str(layer.kv_cache_dtype), cache, f"{layer.bytes_per_token:.10g}")


def _describe_layout(layout: CacheLayout | MLALayout) -> str:
    if isinstance(layout, MLALayout):
        return f"latent {layout.kv_lora_rank} + rope {layout.rope_dim}"
    dims = str(layout.head_dim) if layout.head_dim == layout.head_dim_v else f"{layout.head_dim}/{layout.head_dim_v}"
    return f"{layout.num_kv_heads} x {dims}"


def _plan_rows(report: Report) -> list[tuple[str, ...]]:
    """A header, the request, and the modes without skipped layers that differ from it."""
    skips = f", skipping {','.join(report.args.skip_layers)}" if report.args.skip_layers else ""
    named = {f"{report.args.kv_cache_dtype}{skips}": report.plan}
    named |= {mode: plan for mode, plan in report.by_mode.items() if plan != report.plan}
    header = ("plan", "bytes per token", "GB per sequence", "sequences", "tokens", "of bfloat16", "decode")
    return [header, *((name, *_plan_cells(report, plan)) for name, plan in named.items())]


def _plan_cells(report: Report, plan: MemoryPlan) -> tuple[str, ...]:
    bfloat16 = report.by_mode["bfloat16"].tokens
    return (
        f"{plan.bytes_per_token:.0f}",
        f"{plan.bytes_per_sequence / 1e9:.3f}",
        str(plan.num_sequences),
        str(plan.tokens),
        f"{plan.tokens / bfloat16:.2f}x" if bfloat16 else "-",
        f"{report.decode_us(plan):.0f} us",
    )


def _ranges(indices: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2,5``."""
    starts = [index for index in indices if index - 1 not in indices]
    ends = [index for index in indices if index + 1 not in indices]
    return ",".join(str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True))


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of columns; numbers, but not the first column, to the right."""
    columns = []
    for number, cells in enumerate(zip(*rows, strict=True)):
        width = max(map(len, cells))
        is_number = number > 0 and all(cell[0].isdigit() for cell in cells[1:])
        columns.append([cell.rjust(width) if is_number else cell.ljust(width) for cell in cells])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"expected {file} to hold JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"expected {file} to hold a JSON object; got {type(config).__name__}")
    return config


def _bandwidth(text: str) -> float:
    match = _BANDWIDTH.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"expected TB/s like '4.0' or '3350GB/s'; got {text!r}")
    return float(match[1]) * (1e9 if match[2] == "GB/s" else 1e12)


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1; got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvq_core", description="kvq: a quantized, paged KV cache")
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="which layer is cached how, what fits into memory, and advice")
    add = plan.add_argument
    add("config", type=Path, help="a Hugging Face config.json, or the folder that holds it")
    add("--kv-cache-dtype", required=True, help="a mode, or a pair K/V; auto is the model's dtype")
    add(
        "--skip-layers",
        nargs="+",
        default=[],
        help="layers that stay in the model's dtype: indices, ranges a-b, sliding_window, first:N, last:N",
    )
    add("--gpu-memory", type=_bytes, required=True, help="141GB is 141e9 bytes, 141GiB is 141 * 2**30")
    add("--weights", type=_bytes, default=0, help="what the model and everything else takes of it (default 0)")
    add("--context", type=_positive, help="tokens of a sequence (default: the config's max_position_embeddings)")
    add("--page-size", type=_positive, default=16, help="tokens of a page (default 16)")
    add("--compute-dtype", help="dtype of skipped layers (default: the config's 16-bit dtype, else bfloat16)")
    add(
        "--bandwidth",
        type=_bandwidth,
        default=DEFAULT_BANDWIDTH,
        help="TB/s at which pages are read (default 4.0: int8 pages on one H200, bench/results)",
    )
    add("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    main()
