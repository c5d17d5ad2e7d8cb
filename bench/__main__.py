"""Measure kvq and its peers on a GPU host: `python -m bench [--only SECTION ...] [--quick] [--no-peers] [--out FILE]`.

Prints a table, and writes JSON and plots. Exit status 1, and no report, if any result is wrong.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import append, decode, gate, mla, peers, plots, prefill, report, timing
from bench.cases import SECTIONS, DecodeCase, Selection, select
from bench.rows import Row
from tests import backends

RESULTS = Path(__file__).parent / "results"
TORCH_BACKEND = backends.ON_GPU[0]
RED_GATE, NO_GPU = 1, 2
LEAST_WIDTH = 175  # of the table
Step = tuple[str, Callable[[], Iterator[Row]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    arguments = _parse(argv)
    console = Console(width=max(LEAST_WIDTH, Console().width))
    if not torch.cuda.is_available():
        console.print("The benchmark needs an NVIDIA GPU.")
        return NO_GPU
    try:
        result = run(select(arguments.only, arguments.quick), arguments, console)
    except gate.RedGateError as failure:
        console.print(f"No report, for a result is wrong: {failure}", style="red", markup=False)
        return RED_GATE
    out = arguments.out or RESULTS / f"{_slug(result.environment['device'])}{'-quick' * arguments.quick}.json"
    report.save(result, out)
    pictures = plots.draw(result, out.with_suffix(""))
    console.print(report.table(result))
    console.print(f"Written: {', '.join(map(str, (out, *pictures)))}", soft_wrap=True)
    return 0


def run(selection: Selection, arguments: argparse.Namespace, console: Console) -> report.Report:
    """Check, then measure.

    Raises:
        RedGateError: a result is wrong.
    """
    with_peers = arguments.peers and peers.is_installed()
    compiling = _start_compiling(selection) if with_peers else []
    steps = [*_gate_steps(selection), ("FlashInfer compiles", lambda: _wait(compiling))]
    steps += _measure_steps(selection, with_peers)
    if "jax" in arguments.only:
        steps.append(("JAX", lambda: _measure_jax(arguments.quick)))
    rows = []
    with _progress(console) as progress:
        task = progress.add_task("", total=len(steps))
        for name, step in steps:
            progress.update(task, description=name)
            rows += step()
            progress.advance(task)
    ceilings = timing.copy_tb_per_s(), timing.matmul_tflop_per_s()
    return report.Report(report.environment(torch.cuda.get_device_name()), *ceilings, tuple(rows))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure kvq, its peers and the machine.")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--quick", action="store_true", help="a few cases of each section")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave FlashInfer out")
    parser.add_argument("--out", type=Path, help="the JSON; plots go beside it (default: bench/results/DEVICE.json)")
    return parser.parse_args(argv)


def _start_compiling(selection: Selection) -> list[Future]:
    prefills = {case.head_dim for case in selection.prefill} & set(prefill.FA3_HEAD_DIMS)
    decodes = [*(case for _, case in selection.decodes), *selection.host]
    return peers.compile_in_background(decodes, prefills, bool(selection.host), bool(selection.mla))


def _wait(compiling: list[Future]) -> Iterator[Row]:
    for future in compiling:
        future.result()
    yield from ()


def _gate_steps(selection: Selection) -> list[Step]:
    """Every program that is going to be timed, on a small case. It also compiles the kernels."""
    return [(f"check {case.name}", lambda case=case: _check(case)) for case in selection.layouts()]


def _check(case: DecodeCase) -> Iterator[Row]:
    for mode in case.modes:
        gate.check_small(TORCH_BACKEND, case, mode)
    yield from ()


def _measure_steps(selection: Selection, with_peers: bool) -> list[Step]:
    steps: list[Step] = [
        (case.name, lambda section=section, case=case: decode.measure(section, case, with_peers))
        for section, case in selection.decodes
    ]
    steps += [(case.name, lambda case=case: append.measure(case)) for case in selection.append]
    steps += [("host", lambda case=case: append.measure_host(case, with_peers)) for case in selection.host]
    steps += [(case.name, lambda case=case: prefill.measure(case, with_peers)) for case in selection.prefill]
    steps += [(case.name, lambda case=case: mla.measure(case, with_peers)) for case in selection.mla]
    return steps


def _measure_jax(quick: bool) -> Iterator[Row]:
    """The rows of `bench.jax_side`, a process of its own: two frameworks do not share one device's memory well."""
    torch.cuda.empty_cache()
    command = [sys.executable, "-m", "bench.jax_side", *["--quick"] * quick]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise gate.RedGateError("the JAX process failed; see its message above")
    lines = (line for line in done.stdout.splitlines() if line.startswith("{"))  # libraries may print, too
    return map(Row.from_json, map(json.loads, lines))


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console)


def _slug(device: str) -> str:
    return device.lower().replace(" ", "-")


if __name__ == "__main__":
    sys.exit(main())
