"""The plots of a report: bandwidth, speed-up against context, roofline."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.cases import BF16, FP8, FP8_TENSOR, INT8, SWEEP_BATCH, SWEEP_CONTEXT
from bench.report import Report
from bench.rows import FLASHINFER, JAX, LIBRARY, TORCH, Row

COLORS = {INT8: "tab:blue", FP8: "tab:green", BF16: "tab:gray", FP8_TENSOR: "tab:olive"}
STYLES = {TORCH: ("o", "-"), FLASHINFER: ("x", "--"), JAX: ("s", ":"), LIBRARY: ("^", ":")}
Series = dict[tuple[str, str], list[tuple[float, float]]]  # (implementation, mode) -> points


def draw(report: Report, stem: Path) -> list[Path]:
    """Write the plots that the rows of ``report`` allow as PNG beside ``stem``; return their paths."""
    plots = {"bandwidth": _bandwidth, "speedup": _speedup, "roofline": _roofline}
    has_sweep = any(row.section == "sweep" for row in report.rows)
    wanted = {name: plot for name, plot in plots.items() if has_sweep or name == "roofline"}
    stem.parent.mkdir(parents=True, exist_ok=True)
    return [_save(plot(report), stem.with_name(f"{stem.name}-{name}.png")) for name, plot in wanted.items()]


def break_even(points: list[tuple[float, float]]) -> float | None:
    """The context from which the speed-up stays at 1 or above, interpolated over its logarithm; None if none does.

    Args:
        points: (context, speed-up), by context.
    """
    behind = [i for i, (_, speedup) in enumerate(points) if speedup < 1]
    if not behind:
        return points[0][0] if points else None
    last = behind[-1]
    if last + 1 == len(points):
        return None
    (x0, y0), (x1, y1) = points[last : last + 2]
    return x0 * (x1 / x0) ** ((1 - y0) / (y1 - y0))


def speedups(report: Report) -> tuple[str, Series]:
    """Who bfloat16 is measured by, and the speed-up over it against context, for each quantized series."""
    times = _series(report, "context", lambda row: row.timing.median_us)
    yardstick = FLASHINFER if (FLASHINFER, BF16) in times else TORCH
    base = dict(times.get((yardstick, BF16), []))
    quantized = {key: points for key, points in times.items() if key[1] != BF16}
    return yardstick, {key: [(x, base[x] / y) for x, y in points if x in base] for key, points in quantized.items()}


def _series(report: Report, along: str, value: Callable[[Row], float]) -> Series:
    """The sweep along ``"context"`` or ``"batch"``: points by increasing ``along``."""
    fixed, at = {"context": ("batch", SWEEP_BATCH), "batch": ("context", SWEEP_CONTEXT)}[along]
    series: Series = {}
    for row in report.rows:
        if row.section == "sweep" and row.shape[fixed] == at:
            series.setdefault((row.impl, row.mode), []).append((row.shape[along], value(row)))
    return {key: sorted(points) for key, points in series.items()}


def _bandwidth(report: Report) -> Figure:
    figure, axes = _figure(report, 2)
    titles = {"context": f"batch {SWEEP_BATCH}", "batch": f"context {SWEEP_CONTEXT // 1024}k"}
    for axis, (along, title) in zip(axes, titles.items(), strict=True):
        for key, points in _series(report, along, lambda row: row.tb_per_s).items():
            _line(axis, key, points)
        axis.axhline(report.copy_tb_per_s, color="black", linewidth=0.8, label="copy")
        _label(axis, title, along, "KV bytes read, TB/s")
    axes[0].legend(fontsize=7)
    return figure


def _speedup(report: Report) -> Figure:
    figure, (axis,) = _figure(report, 1)
    yardstick, series = speedups(report)
    for key, points in series.items():
        _line(axis, key, points, note=_break_even_note(points))
    axis.axhline(1, color="black", linewidth=0.8)
    _label(axis, f"batch {SWEEP_BATCH}", "context", f"speed-up over {yardstick} bfloat16")
    axis.legend(fontsize=7)
    return figure


def _break_even_note(points: list[tuple[float, float]]) -> str:
    context = break_even(points)
    if context is None:
        return ", no break-even"
    return f", break-even {'≤' if context == points[0][0] else ''}{context / 1024:.2g}k"


def _roofline(report: Report) -> Figure:
    figure, (axis,) = _figure(report, 1)
    ridge = report.matmul_tflop_per_s / report.copy_tb_per_s
    reach = [1, ridge, 4 * ridge]
    axis.plot(reach, [min(report.matmul_tflop_per_s, x * report.copy_tb_per_s) for x in reach], color="black")
    points: Series = {}
    for row in report.rows:
        if row.num_bytes and row.num_flops:
            intensity = row.num_flops / row.num_bytes
            points.setdefault((row.impl, row.mode), []).append((intensity, row.tflop_per_s))
    for key, places in points.items():
        _line(axis, key, places, is_curve=False)
    _label(axis, "decode; line: copy bandwidth and bf16 matmul", "FLOP per byte of K and V", "TFLOP/s")
    axis.set_yscale("log", base=2)
    axis.legend(fontsize=7)
    return figure


def _figure(report: Report, columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.6 * columns + 1, 4), dpi=110, layout="constrained")
    where = report.environment
    figure.suptitle(f"kvq decode, {where['device']}, torch {where['torch']}, triton {where['triton']}", fontsize=9)
    axes = figure.subplots(1, columns, sharey=True, squeeze=False)
    return figure, list(axes[0])


def _line(
    axis: Axes, key: tuple[str, str], points: list[tuple[float, float]], is_curve: bool = True, note: str = ""
) -> None:
    marker, style = STYLES[key[0]]
    look = {"color": COLORS[key[1]], "marker": marker, "markersize": 5, "linestyle": style if is_curve else "none"}
    axis.plot(*zip(*points, strict=True), label=" ".join(key) + note, **look)


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: _short(value))
    axis.grid(alpha=0.3)


def _short(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 and math.log2(value).is_integer() else f"{value:g}"


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    return path
