"""The main job: one model's keys and values in caches of every kind, in numpy, PyTorch and JAX.

    python -m tests.demo [--modes MODE ...] [--window-bytes N] [--out build/demo.json]

For every mode: the bytes of the caches and whether they are the same in all three, the error of attention over them, and
what it costs the model in bits per byte to read its keys and values from such a cache. Exit status 1 if bytes differ.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvq_core import CacheLayout
from tests.demo_pools import JaxPool, NumpyPool, Placement, TorchPool, sha256
from tests.model_attention import FOLDER, LayerInputs, Recorder, bits_per_byte, held_out_windows, load_model

MODES = (
    "bfloat16",
    "float16",
    "bfloat16/int8_per_token_head",
    "int8_per_token_head",
    "int8_per_token_head/fp8_per_token_head",
    "fp8_per_token_head",
    "fp8_e4m3",
)
FILES = ("shlex.py.txt", "textwrap.py.txt")
PAGE_SIZE = 16
OUT = Path("build/demo.json")
STEPS = ("write", "attend in PyTorch", "attend in JAX", "run the model")

Pool = NumpyPool | TorchPool | JaxPool


@dataclass(frozen=True)
class Figures:
    """What the demo measures of one mode, and the keys of build/demo.json."""

    mode: str
    bytes_per_token: float
    sha256_numpy: str
    sha256_torch: str
    sha256_jax: str
    identical: bool
    attention_relative_error: float
    bits_per_byte: float
    bits_per_byte_delta: float


@dataclass(frozen=True)
class Workload:
    """A model, the text that it reads, and what its unquantized attention computes on it."""

    model: transformers.LlamaForCausalLM
    windows: torch.Tensor
    layers: tuple[LayerInputs, ...]
    placement: Placement
    bits_per_byte: float


def prepare(window_bytes: int) -> Workload:
    """Run the model with unquantized attention and keep the queries, keys and values of every layer."""
    model = load_model()
    windows = held_out_windows(FILES, window_bytes)
    recorder = Recorder(len(windows))
    score = bits_per_byte(model, windows, recorder)
    placement = Placement.shuffled(len(recorder.layers), len(windows), windows.shape[1] - 1, PAGE_SIZE)
    return Workload(model, windows, tuple(recorder.layers), placement, score)


def measure(work: Workload, mode: str, begin_step: Callable[[str], None]) -> Figures:
    """Write the caches of one mode three times and read them; ``begin_step`` is told every one of STEPS."""
    layout = CacheLayout(
        mode, page_size=PAGE_SIZE, num_kv_heads=work.layers[0].k.shape[1], head_dim=work.layers[0].k.shape[2]
    )
    begin_step(STEPS[0])
    numpy_pool, torch_pool, jax_pool = (written(pool(layout, work.placement), work) for pool in (NumpyPool, TorchPool, JaxPool))
    digests = [sha256(pool.pages()) for pool in (numpy_pool, torch_pool, jax_pool)]
    begin_step(STEPS[1])
    torch_error = attention_error(torch_pool, work)
    begin_step(STEPS[2])
    jax_error = attention_error(jax_pool, work)
    begin_step(STEPS[3])
    score = bits_per_byte(work.model, work.windows, through(TorchPool(layout, work.placement)))
    return Figures(
        mode,
        layout.bytes_per_token * len(work.layers),
        *digests,
        identical=len(set(digests)) == 1,
        attention_relative_error=max(torch_error, jax_error),
        bits_per_byte=score,
        bits_per_byte_delta=score - work.bits_per_byte,
    )


def written(pool: Pool, work: Workload) -> Pool:
    """The pool, with the keys and values of every layer in it."""
    for layer_index, layer in enumerate(work.layers):
        pool.append(layer_index, layer.k, layer.v)
    return pool


def through(pool: TorchPool):
    """An attention for the model that writes keys and values to the pool and attends over what it reads back."""

    def attend(layer_index: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, sm_scale: float) -> np.ndarray:
        pool.append(layer_index, k, v)
        return pool.attend(layer_index, q, sm_scale)

    return attend


def attention_error(pool: TorchPool | JaxPool, work: Workload) -> float:
    """The relative L2 error over all layers against float64 attention on the unquantized keys and values."""
    error = norm = 0.0
    for layer_index, layer in enumerate(work.layers):
        out = pool.attend(layer_index, layer.q, layer.sm_scale)
        error += np.square(out - layer.exact).sum()
        norm += np.square(layer.exact).sum()
    return float(np.sqrt(error / norm))


def print_workload(console: Console, work: Workload) -> None:
    """Say what was run on what."""
    config, (num_seqs, window_bytes) = work.model.config, work.windows.shape
    console.print(
        f"Model     {FOLDER.name} in {FOLDER.parent}: Llama, {work.model.num_parameters():,} parameters, float32; "
        f"{config.num_hidden_layers} layers, {config.num_attention_heads} query and {config.num_key_value_heads} "
        f"KV heads, head_dim {config.head_dim}"
    )
    console.print(
        f"Text      the first {window_bytes} bytes of {' and of '.join(FILES)}, held out of training: {num_seqs} windows, "
        f"{num_seqs * (window_bytes - 1)} tokens (bytes) in each of {config.num_hidden_layers} layers"
    )
    console.print(
        f"Caches    pages of {PAGE_SIZE} tokens, one pool of {work.placement.num_pages} pages, shuffled page tables"
    )
    console.print(
        f"Versions  Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}, "
        f"jax {jax.__version__}, transformers {transformers.__version__}, CPU {platform.machine()}"
    )
    console.print(f"Score     {work.bits_per_byte:.4f} bits per byte with unquantized (float32) attention\n")


def print_table(console: Console, results: Sequence[Figures], work: Workload) -> None:
    """One row per mode, sizes against bfloat16."""
    bfloat16 = 2 * 2 * work.layers[0].k[0].size * len(work.layers)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("mode (K/V)", no_wrap=True)
    for header in ("bytes/\ntoken", "of bf16", "SHA-256\nnumpy", "\nPyTorch", "\nJAX", "same\nbytes"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("attention\nerror", "bits/\nbyte", "change"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in results:
        table.add_row(
            row.mode.replace("/", "/\n"),
            f"{row.bytes_per_token:.0f}",
            f"{row.bytes_per_token / bfloat16:.1%}",
            *(digest[:12] for digest in (row.sha256_numpy, row.sha256_torch, row.sha256_jax)),
            "yes" if row.identical else "[bold red]NO[/]",
            f"{row.attention_relative_error:.1e}",
            f"{row.bits_per_byte:.4f}",
            f"{row.bits_per_byte_delta:+.4f}",
        )
    console.print(table)


def print_legend(console: Console) -> None:
    """What the columns mean."""
    console.print(
        "bytes/token: all layers, scales included. SHA-256: all bytes of the pool, first 12 digits. Attention error: relative\n"
        "L2 against float64 attention on the unquantized K and V, all layers, the worse of PyTorch and JAX. Change: in bits\n"
        "per byte, when the model's attention reads this cache. fp8_e4m3 has the scale 1.0, without calibration."
    )


def run(work: Workload, modes: Sequence[str], console: Console) -> list[Figures]:
    """Measure all modes and show how far it is."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(modes) * len(STEPS))
        results = []
        for mode in modes:

            def begin_step(step: str, mode: str = mode) -> None:
                progress.update(task, description=f"{mode}: {step}", advance=step != STEPS[0] or bool(results))

            results.append(measure(work, mode, begin_step))
    return results


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--modes", nargs="+", default=MODES, metavar="MODE", help="a mode, or a pair K/V")
    parser.add_argument("--window-bytes", type=int, default=2048, help="bytes of each file, at most 2048")
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    args = parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    with console.status("Running the model with unquantized attention"):
        work = prepare(args.window_bytes)
    print_workload(console, work)
    results = run(work, args.modes, console)
    print_table(console, results, work)
    print_legend(console)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps([asdict(row) for row in results], indent=2) + "\n")
    console.print(f"\nThe same figures are in {args.out}.")
    if all(row.identical for row in results):
        return 0
    console.print("[bold red]The bytes of numpy, PyTorch and JAX differ.[/]")
    return 1


if __name__ == "__main__":
    sys.exit(main())
