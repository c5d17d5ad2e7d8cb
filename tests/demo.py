"""The main job: one model's keys and values in caches of every kind, in numpy, PyTorch and JAX.

    python -m tests.demo [--modes MODE ...] [--window-bytes N] [--out build/demo.json]

For every mode: the bytes of the caches and whether they are the same in all three, the error of attention over them,
and what it costs the model in bits per byte to read its keys and values from such a cache. Exit status 1 if any byte
differs.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
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
from tests.model.train import CONTEXT
from tests.model_attention import (
    FOLDER,
    Attend,
    LayerInputs,
    Recorder,
    bits_per_byte,
    held_out_windows,
    load_model,
)

MODES = (
    "bfloat16",
    "float16",
    "bfloat16/int8_per_token_head",
    "int8_per_token_head",
    "int8_per_token_head/fp8_per_token_head",
    "fp8_per_token_head",
    "fp8_e4m3",
)
FILES = ("shlex.py", "textwrap.py")
PAGE_SIZE = 16
OUT = Path("build/demo.json")
STEPS_PER_MODE = 4  # of the progress bar: write, attend in PyTorch, attend in JAX, run the model


@dataclass(frozen=True)
class Figures:
    """What the demo measures of one mode; the fields are the keys of build/demo.json."""

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

    def layout(self, mode: str) -> CacheLayout:
        """The layout of a cache for one layer of the model."""
        _, num_kv_heads, head_dim = self.layers[0].k.shape
        return CacheLayout(mode, page_size=PAGE_SIZE, num_kv_heads=num_kv_heads, head_dim=head_dim)


def prepare(window_bytes: int) -> Workload:
    """Run the model with unquantized attention and keep the queries, keys and values of every layer."""
    model = load_model()
    windows = held_out_windows(FILES, window_bytes)
    recorder = Recorder(len(windows))
    score = bits_per_byte(model, windows, recorder)
    placement = Placement.shuffled(len(recorder.layers), len(windows), windows.shape[1] - 1, PAGE_SIZE)
    return Workload(model, windows, tuple(recorder.layers), placement, score)


def measure(work: Workload, mode: str, advance: Callable[[], None]) -> Figures:
    """Write the pool of one mode three times and read it; ``advance`` is called after every step."""
    layout = work.layout(mode)
    pools = [write(pool(layout, work.placement), work.layers) for pool in (NumpyPool, TorchPool, JaxPool)]
    digests = [sha256(pool.pages()) for pool in pools]
    advance()
    errors = []
    for pool in pools[1:]:
        errors.append(attention_error(pool, work.layers))
        advance()
    score = bits_per_byte(work.model, work.windows, through(TorchPool(layout, work.placement)))
    advance()
    return Figures(
        mode,
        layout.bytes_per_token * len(work.layers),
        *digests,
        identical=len(set(digests)) == 1,
        attention_relative_error=max(errors),
        bits_per_byte=score,
        bits_per_byte_delta=score - work.bits_per_byte,
    )


def write(pool, layers: Sequence[LayerInputs]):
    """The pool, with the keys and values of every layer in it."""
    for layer_index, layer in enumerate(layers):
        pool.append(layer_index, layer.k, layer.v)
    return pool


def attention_error(pool, layers: Sequence[LayerInputs]) -> float:
    """The relative L2 error over all layers against float64 attention on the unquantized keys and values."""
    error = norm = 0.0
    for layer_index, layer in enumerate(layers):
        error += np.square(pool.attend(layer_index, layer.q, layer.sm_scale) - layer.exact).sum()
        norm += np.square(layer.exact).sum()
    return float(np.sqrt(error / norm))


def through(pool: TorchPool) -> Attend:
    """An attention for the model that appends its keys and values to the pool and attends over the pool."""

    def attend(layer_index: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, sm_scale: float) -> np.ndarray:
        pool.append(layer_index, k, v)
        return pool.attend(layer_index, q, sm_scale)

    return attend


def measure_all(work: Workload, modes: Sequence[str], console: Console) -> list[Figures]:
    """Measure the modes one after the other and show how far it is."""
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(modes) * STEPS_PER_MODE)
        for mode in modes:
            start = time.monotonic()
            progress.update(task, description=mode)
            results.append(measure(work, mode, lambda: progress.advance(task)))
            console.print(f"{mode:<40} measured in {time.monotonic() - start:.0f} s")
    return results


def print_workload(console: Console, work: Workload) -> None:
    """Say what is run on what."""
    config, (num_windows, window_bytes) = work.model.config, work.windows.shape
    lines = (
        f"Model     tests/{FOLDER.name}: Llama, {work.model.num_parameters():,} parameters in float32; "
        f"{config.num_hidden_layers} layers, {config.num_attention_heads} query heads, {config.num_key_value_heads} "
        f"KV heads, head_dim {config.head_dim}",
        f"Text      the first {window_bytes} bytes of {' and of '.join(FILES)}, held out of training; "
        f"one byte is one token: {num_windows * (window_bytes - 1)} in each layer",
        f"Caches    pages of {PAGE_SIZE} tokens, all layers in one pool of {work.placement.num_pages} pages, "
        "shuffled page tables",
        f"Versions  Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}, "
        f"jax {jax.__version__}, transformers {transformers.__version__}; CPU {platform.machine()}",
        f"Score     {work.bits_per_byte:.4f} bits per byte with unquantized attention (float32)",
    )
    console.print("\n".join(lines), end="\n\n", soft_wrap=True)


def results_table(results: Sequence[Figures], bfloat16_bytes: float) -> Table:
    """One row per mode."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("mode\n(K/V)", no_wrap=True)
    for header in ("bytes/\ntoken", "of\nbf16"):
        table.add_column(header, justify="right", no_wrap=True)
    for framework in ("numpy", "PyTorch", "JAX"):
        table.add_column(f"SHA-256\n{framework}", overflow="fold")
    for header in ("same\nbytes", "attention\nerror", "bits/\nbyte", "change"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in results:
        table.add_row(
            row.mode.replace("/", "/\n"),
            f"{row.bytes_per_token:.0f}",
            f"{row.bytes_per_token / bfloat16_bytes:.1%}",
            *(digest[:12] for digest in (row.sha256_numpy, row.sha256_torch, row.sha256_jax)),
            "yes" if row.identical else "[bold red]NO[/]",
            f"{row.attention_relative_error:.1e}",
            f"{row.bits_per_byte:.4f}",
            f"{row.bits_per_byte_delta:+.4f}",
        )
    return table


LEGEND = """\
bytes/token      all layers, K and V, scales and padding included
SHA-256          of all bytes of the pool, the first 12 digits
attention error  relative L2 over all layers against float64 attention on the unquantized K and V;
                 the worse of PyTorch and JAX
change           of bits/byte, when the model's attention reads its K and V from this cache
fp8_e4m3         has one scale per layer, here 1.0 (not calibrated)
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.demo", description="Caches of every kind, in three frameworks."
    )
    parser.add_argument("--modes", nargs="+", default=MODES, metavar="MODE", help="modes, or pairs K/V")
    parser.add_argument("--window-bytes", type=int, default=CONTEXT, help=f"of each file, from 2 to {CONTEXT}")
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file to write")
    args = parser.parse_args(argv)
    if not 2 <= args.window_bytes <= CONTEXT:
        parser.error(f"expected --window-bytes from 2 to {CONTEXT}, the model's context; got {args.window_bytes}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit status."""
    args = parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # a GPU, where there is one, has no part in this
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    with console.status("Running the model with unquantized attention"):
        work = prepare(args.window_bytes)
    print_workload(console, work)
    results = measure_all(work, args.modes, console)
    bfloat16_bytes = work.layout("bfloat16").bytes_per_token * len(work.layers)
    console.print(results_table(results, bfloat16_bytes), LEGEND, sep="", soft_wrap=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps([asdict(row) for row in results], indent=2) + "\n")
    console.print(f"The same figures are in {args.out}.", soft_wrap=True)
    if all(row.identical for row in results):
        return 0
    console.print("[bold red]The bytes of numpy, PyTorch and JAX differ.[/]")
    return 1


if __name__ == "__main__":
    sys.exit(main())
