"""The table and the JSON of a run."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from bench.rows import RATES, Key, Row, meets_bar, ratio

PACKAGES = ("torch", "triton", "jax", "jax-triton", "flashinfer-python", "numpy", "ml-dtypes")


@dataclass(frozen=True)
class Report:
    """All that a run found out.

    Args:
        environment: device, driver and versions.
        copy_tb_per_s: bandwidth of a device-to-device copy, bytes read plus bytes written.
        matmul_tflop_per_s: rate of a large bfloat16 matrix product.
        rows: the measurements.
    """

    environment: dict[str, str]
    copy_tb_per_s: float
    matmul_tflop_per_s: float
    rows: tuple[Row, ...]

    @property
    def by_key(self) -> dict[Key, Row]:
        return {row.key: row for row in self.rows}


def environment(device: str) -> dict[str, str]:
    """The day, the device, its driver, and the versions of what runs on it."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "driver": _driver(),
        "python": platform.python_version(),
        **versions,
    }


def save(report: Report, path: Path) -> None:
    """Write ``report`` as JSON, with the derived figures beside what was measured."""
    derived = [_derived(row, report) for row in report.rows]
    rows = [dataclasses.asdict(row) | figures for row, figures in zip(report.rows, derived, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(report) | {"rows": rows}, indent=1) + "\n")


def load(path: Path) -> Report:
    """The report that `save` wrote."""
    fields = json.loads(path.read_text())
    return Report(**fields | {"rows": tuple(map(Row.from_json, fields["rows"]))})


def table(report: Report) -> Table:
    """The rows, those of one case together."""
    where = report.environment
    result = Table(
        title=f"{where['device']}, copy {report.copy_tb_per_s:.2f} TB/s, bf16 matmul {report.matmul_tflop_per_s:.0f} "
        f"TFLOP/s, torch {where['torch']}, triton {where['triton']}, jax {where['jax']}, "
        f"FlashInfer {where['flashinfer-python']}",
        box=box.SIMPLE_HEAD,
    )
    for name in ("case", "who", "mode"):
        result.add_column(name, no_wrap=True)
    for name in ("us", "min..max", "TB/s", "% copy", "TFLOP/s", "time over", "bar"):
        result.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in _grouped(report.rows):
        if last is not None and (row.section, row.case) != last:
            result.add_section()
        result.add_row(*_cells(row, report, is_first=(row.section, row.case) != last))
        last = row.section, row.case
    return result


def peer_name(row: Row) -> str:
    """The row that ``row`` is held against, by what tells the two apart; empty where there is none."""
    if row.versus is None:
        return ""
    case, impl, mode = row.versus
    return (impl if case == row.case else case) + ("" if mode == row.mode else f" {mode}")


def _grouped(rows: tuple[Row, ...]) -> list[Row]:
    order: dict[tuple[str, str], int] = {}
    for row in rows:
        order.setdefault((row.section, row.case), len(order))
    return sorted(rows, key=lambda row: order[row.section, row.case])


def _cells(row: Row, report: Report, is_first: bool) -> list[str]:
    figures = _derived(row, report)
    low, high = row.timing.min_us, row.timing.max_us
    return [
        row.case if is_first else "",
        row.impl,
        row.mode,
        _number(row.timing.median_us),
        f"{_number(low)}..{_number(high)}",
        f"{row.tb_per_s:.2f}" if row.num_bytes else "",
        f"{figures['percent_of_copy']:.0f}" if row.num_bytes else "",
        f"{row.tflop_per_s:.0f}" if row.num_flops and not row.num_bytes else "",
        "" if figures["ratio"] is None else f"{figures['ratio']:.3f} {peer_name(row)}",
        _bar_cell(row, figures["meets_bar"]),
    ]


def _bar_cell(row: Row, is_met: bool | None) -> str:
    if row.bar is None:
        return ""
    sign = ">=" if row.bar.quantity in RATES else "<="
    unit = "" if row.bar.quantity == "ratio" else f" {row.bar.quantity}"
    verdict = {True: "[green]met[/]", False: "[red]missed[/]", None: "?"}[is_met]
    return f"{sign} {row.bar.limit:g}{unit} {verdict}"


def _derived(row: Row, report: Report) -> dict:
    over = ratio(row, report.by_key)
    return {
        "tb_per_s": row.tb_per_s,
        "tflop_per_s": row.tflop_per_s,
        "percent_of_copy": 100 * row.tb_per_s / report.copy_tb_per_s,
        "ratio": over,
        "meets_bar": meets_bar(row, over),
    }


def _number(us: float) -> str:
    return f"{us:.2f}" if us < 100 else f"{us:.1f}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
