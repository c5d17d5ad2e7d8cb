"""What a measurement is: plain data that the table, the JSON and the plots are made from."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

TORCH, JAX, FLASHINFER, LIBRARY = "kvq torch", "kvq jax", "FlashInfer", "torch SDPA"
PLAIN = "torch.add"  # what the host takes for the least that PyTorch can do on a GPU
KERNEL = "kvq kernel"  # prefill without a library
Quantity = Literal["ratio", "us", "TB/s", "TFLOP/s"]
RATES = ("TB/s", "TFLOP/s")  # more is better
Key = tuple[str, str, str]  # case, implementation, mode of a row


class Timing(NamedTuple):
    """Microseconds of one call: the median, the least and the most of the samples."""

    median_us: float
    min_us: float
    max_us: float

    @classmethod
    def of(cls, samples_us: Sequence[float]) -> Timing:
        return cls(statistics.median(samples_us), min(samples_us), max(samples_us))


class Bar(NamedTuple):
    """A bound of an issue: at most ``limit`` times the peer or microseconds, at least ``limit`` TB/s or TFLOP/s."""

    quantity: Quantity
    limit: float

    def is_met(self, value: float) -> bool:
        return value >= self.limit if self.quantity in RATES else value <= self.limit


@dataclass(frozen=True)
class Row:
    """One implementation on one case.

    Args:
        section: the part of the benchmark, a name that ``--only`` takes.
        case: the name of the case.
        impl: who ran it, e.g. `TORCH`.
        mode: how K and V are stored.
        timing: of one call.
        shape: what was measured, by argument name.
        num_bytes: least bytes that one call moves: KV read, or rows read and records written. 0 if it is no measure.
        num_flops: floating-point operations of the two products of attention. 0 for an append.
        versus: the row whose time divides this one's; the ratio is missing where that row is.
        bar: the bound that an issue sets, if any.
    """

    section: str
    case: str
    impl: str
    mode: str
    timing: Timing
    shape: dict
    num_bytes: float = 0.0
    num_flops: float = 0.0
    versus: Key | None = None
    bar: Bar | None = None

    @property
    def key(self) -> Key:
        return self.case, self.impl, self.mode

    @property
    def tb_per_s(self) -> float:
        """Terabytes a second, 0 where bytes are no measure."""
        return self.num_bytes / self.timing.median_us * 1e-6

    @property
    def tflop_per_s(self) -> float:
        return self.num_flops / self.timing.median_us * 1e-6

    @classmethod
    def from_json(cls, fields: dict) -> Row:
        """The row that `dataclasses.asdict` made ``fields`` of, maybe by way of JSON."""
        names = cls.__dataclass_fields__
        fields = {name: value for name, value in fields.items() if name in names}
        fields["timing"] = Timing(*fields["timing"])
        fields["versus"] = fields["versus"] and tuple(fields["versus"])
        fields["bar"] = fields["bar"] and Bar(*fields["bar"])
        return cls(**fields)


def ratio(row: Row, rows: dict[Key, Row]) -> float | None:
    """The time of ``row`` over that of the row it is held against; None without one."""
    other = rows.get(row.versus) if row.versus else None
    return None if other is None else row.timing.median_us / other.timing.median_us


def quantity(row: Row, ratio_to_peer: float | None) -> float | None:
    """What the bar of ``row`` bounds; None where there is none, or no row to hold it against."""
    if row.bar is None:
        return None
    values = {"ratio": ratio_to_peer, "us": row.timing.median_us, "TB/s": row.tb_per_s, "TFLOP/s": row.tflop_per_s}
    return values[row.bar.quantity]


def meets_bar(row: Row, ratio_to_peer: float | None) -> bool | None:
    """Whether the bar of ``row`` is met; None where there is none, or no row to hold it against."""
    value = quantity(row, ratio_to_peer)
    return None if row.bar is None or value is None else row.bar.is_met(value)
