"""The cases of the benchmark, with the bars of issues 3 and 4 (MLA). Names are read by the table and the plots."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

from bench.rows import FLASHINFER, TORCH, Bar, Key
from kvq_core import CacheLayout, MLALayout
from kvq_core.mla import MLA_MODES

INT8, FP8, BF16 = "int8_per_token_head", "fp8_per_token_head", "bfloat16"
FP8_TENSOR = "fp8_e4m3"  # FlashInfer's quantized cache: one scale for all
MODES = (INT8, FP8, BF16)
K = 1024


@dataclass(frozen=True)
class DecodeCase:
    """Decoding: ``queries`` tokens a sequence attend over sequences of ``seq_lens`` keys.

    ``table_factor``: how many times wider than needed the page table is. ``bar``, ``bf16_bar``: the most time, over
    FlashInfer's in bfloat16, of the quantized modes and of bfloat16. ``versus``: another case of kvq to be held against
    instead of a peer.
    """

    name: str
    seq_lens: tuple[int, ...]
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    queries: int = 1
    window: int | None = None
    table_factor: int = 1
    modes: tuple[str, ...] = MODES
    peers: tuple[str, ...] = (BF16, FP8_TENSOR)
    bar: float | None = None
    bf16_bar: float | None = None
    versus: str | None = None

    def layout(self, mode: str) -> CacheLayout:
        return CacheLayout(mode, page_size=self.page_size, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)

    @property
    def pages_of(self) -> tuple[int, ...]:
        """Pages of each sequence."""
        return tuple(math.ceil(seq_len / self.page_size) for seq_len in self.seq_lens)

    @property
    def num_pages(self) -> int:
        return sum(self.pages_of)

    @property
    def visible_keys(self) -> int:
        """Keys that some query sees, over all sequences."""
        reach = math.inf if self.window is None else self.window + self.queries - 1
        return int(sum(min(seq_len, reach) for seq_len in self.seq_lens))

    @property
    def num_flops(self) -> float:
        return 4.0 * self.queries * self.visible_keys * self.num_q_heads * self.head_dim

    def num_bytes(self, mode: str) -> float:
        """Bytes of the keys and values that some query sees."""
        return self.visible_keys * self.layout(mode).bytes_per_token

    def num_sets(self, cold_bytes: int) -> int:
        """Buffer sets to rotate over, so that every call finds its keys and values evicted from the caches."""
        return min(128, max(2, math.ceil(cold_bytes / min(map(self.num_bytes, self.modes)))))

    def held_against(self, mode: str) -> Key:
        return (self.name, FLASHINFER, BF16) if self.versus is None else (self.versus, TORCH, mode)

    def bar_of(self, mode: str) -> Bar | None:
        limit = self.bf16_bar if mode == BF16 else self.bar
        return None if limit is None else Bar("ratio", limit)

    def shape(self) -> dict:
        """What the JSON says of the case."""
        return {
            "batch": len(self.seq_lens),
            "context": max(self.seq_lens),
            "total_keys": sum(self.seq_lens),
            "num_q_heads": self.num_q_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "page_size": self.page_size,
            "queries": self.queries,
            "window": self.window,
            "table_factor": self.table_factor,
        }


@dataclass(frozen=True)
class AppendCase:
    """Quantize-on-write of ``num_tokens`` tokens. ``bar``: on every row."""

    num_tokens: int
    bar: Bar | None = None
    modes: tuple[str, ...] = (INT8, FP8)
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16

    @property
    def name(self) -> str:
        return f"append {self.num_tokens}"

    def layout(self, mode: str) -> CacheLayout:
        return CacheLayout(mode, page_size=self.page_size, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)

    def num_bytes(self, mode: str) -> float:
        """bfloat16 rows read and records written."""
        read = 2 * 2 * self.num_kv_heads * self.head_dim
        return self.num_tokens * (read + self.layout(mode).bytes_per_token)

    def num_sets(self, cold_bytes: int) -> int:
        return min(128, max(2, math.ceil(cold_bytes / self.num_bytes(INT8))))

    def shape(self) -> dict:
        return {name: getattr(self, name) for name in ("num_tokens", "num_kv_heads", "head_dim", "page_size")}


@dataclass(frozen=True)
class PrefillCase:
    """The last ``queries`` tokens of one sequence of ``context`` keys, causal. ``bar``: on the quantized modes.

    Without keys before them they are held against cuDNN's dense attention, else against FlashInfer.
    """

    queries: int
    context: int
    bar: Bar
    head_dim: int = 128
    num_q_heads: int = 32
    num_kv_heads: int = 8
    page_size: int = 16
    modes: tuple[str, ...] = MODES

    @property
    def name(self) -> str:
        of = f" of {self.context // K}k" if self.has_prefix else ""
        return f"prefill {self.queries // K}k{of} D={self.head_dim}"

    @property
    def has_prefix(self) -> bool:
        return self.context > self.queries

    @property
    def num_flops(self) -> float:
        pairs = self.queries * (self.context - self.queries) + self.queries**2 / 2
        return 4.0 * pairs * self.num_q_heads * self.head_dim

    def as_decode(self) -> DecodeCase:
        """The same pool, tables and layouts."""
        return DecodeCase(
            self.name,
            (self.context,),
            num_q_heads=self.num_q_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            page_size=self.page_size,
            queries=self.queries,
            modes=self.modes,
        )


@dataclass(frozen=True)
class MLACase:
    """MLA decoding: one query of ``num_heads`` heads a sequence. ``bar``: of the quantized or of all modes."""

    name: str
    num_heads: int
    bar: Bar
    batch: int = 64
    context: int = 8 * K
    page_size: int = 64
    modes: tuple[str, ...] = MLA_MODES

    def layout(self, mode: str) -> MLALayout:
        return MLALayout(mode, page_size=self.page_size)

    @property
    def sm_scale(self) -> float:
        """That of DeepSeek, whose heads have 128 elements without and 64 with rope before they become latents."""
        return (128 + 64) ** -0.5

    @property
    def num_flops(self) -> float:
        layout = self.layout(BF16)
        return 2.0 * self.batch * self.context * self.num_heads * (layout.head_dim + layout.head_dim_v)

    def num_bytes(self, mode: str) -> float:
        """Bytes of the latents and rope parts that are read."""
        return self.batch * self.context * self.layout(mode).bytes_per_token

    def bar_of(self, mode: str) -> Bar | None:
        """The ratio to FlashInfer in bfloat16 is asked of the FP8 modes."""
        return self.bar if mode.startswith("fp8") or self.bar.quantity != "ratio" else None

    def as_decode(self) -> DecodeCase:
        """A case with the same page table."""
        return DecodeCase(self.name, (self.context,) * self.batch, page_size=self.page_size)

    def shape(self) -> dict:
        return {name: getattr(self, name) for name in ("batch", "context", "num_heads", "page_size")}


def uniform(batch: int, context: int, name: str = "", **fields) -> DecodeCase:
    """``batch`` sequences of ``context`` keys, called like "64x8k" and then ``name``."""
    return DecodeCase(f"{batch}x{context // K}k {name}".strip(), (context,) * batch, **fields)


def _ragged(batch: int = 64, least: int = 128, most: int = 32 * K) -> DecodeCase:
    draw = random.Random(3)
    lengths = tuple(round(math.exp(draw.uniform(math.log(least), math.log(most)))) for _ in range(batch))
    return DecodeCase(f"{batch} ragged {least}..{most // K}k", lengths, bar=0.65)


DECODE = (
    uniform(64, 8 * K, bar=0.55, bf16_bar=1.02),
    uniform(64, 8 * K, "page 64", page_size=64, bar=0.55, bf16_bar=1.02),
    uniform(8, 32 * K, bar=0.58),
    uniform(16, 8 * K, bar=0.65),
    uniform(1, 128 * K, bar=0.65),
    uniform(64, 8 * K, "D=256", head_dim=256, bar=0.58, peers=(BF16,)),
    uniform(64, 8 * K, "D=64", head_dim=64, bar=0.65, peers=(BF16,)),
    uniform(16, 8 * K, "32/32", num_kv_heads=32, bar=0.65, peers=(BF16,)),
    uniform(64, 8 * K, "32/1", num_kv_heads=1, bar=0.65, peers=(BF16,)),
    uniform(64, 8 * K, "64/8", num_q_heads=64, bar=0.65, peers=(BF16,)),
    _ragged(),
    uniform(1, 1 * K, bar=1.0),
    uniform(4, 1 * K, bar=1.0),
    uniform(64, 8 * K, "table x64", table_factor=64, peers=(), versus="64x8k", bar=1.05, bf16_bar=1.05),
)
SWEEP_BATCH, SWEEP_CONTEXT = 8, 8 * K
SWEEP = (
    *(uniform(SWEEP_BATCH, 2**i * K, "sweep") for i in range(8)),
    *(uniform(2**i, SWEEP_CONTEXT, "sweep") for i in range(7) if 2**i != SWEEP_BATCH),
)
VARIANTS = (
    uniform(64, 8 * K, "1 query", modes=(INT8,), peers=()),
    uniform(64, 8 * K, "4 queries", modes=(INT8,), peers=(), queries=4, versus="64x8k 1 query"),
    uniform(16, 1 * K, "no window", modes=(INT8,), peers=()),
    uniform(16, 32 * K, "window 1024", modes=(INT8,), peers=(), window=1024, versus="16x1k no window"),
)
APPEND = (AppendCase(64, Bar("us", 5.5)), AppendCase(1024), AppendCase(64 * K, Bar("TB/s", 3.5)))
_OF_DENSE, _OF_FA3 = Bar("ratio", 1 / 0.85), Bar("ratio", 1 / 0.80)
PREFILL = (
    PrefillCase(8 * K, 8 * K, _OF_DENSE),
    PrefillCase(32 * K, 32 * K, _OF_DENSE, modes=(INT8, FP8)),
    PrefillCase(8 * K, 8 * K, _OF_DENSE, head_dim=256),
    PrefillCase(32 * K, 32 * K, _OF_DENSE, head_dim=256, modes=(INT8, FP8)),
    PrefillCase(2 * K, 32 * K, _OF_FA3),
)
MLA = (MLACase("mla 16 heads", 16, Bar("ratio", 0.65)), MLACase("mla 128 heads", 128, Bar("TFLOP/s", 300)))
JAX_DECODE = tuple(case for case in DECODE if case.name in ("64x8k", "8x32k", "16x8k"))
JAX_APPEND = APPEND[2:]
HOST = uniform(1, 1 * K, peers=(BF16,))
SECTIONS = ("decode", "sweep", "append", "host", "prefill", "variants", "mla", "jax")


@dataclass(frozen=True)
class Selection:
    """The cases of one run; sections that were not asked for are empty."""

    decode: tuple[DecodeCase, ...] = ()
    sweep: tuple[DecodeCase, ...] = ()
    variants: tuple[DecodeCase, ...] = ()
    append: tuple[AppendCase, ...] = ()
    prefill: tuple[PrefillCase, ...] = ()
    mla: tuple[MLACase, ...] = ()
    jax_decode: tuple[DecodeCase, ...] = ()
    jax_append: tuple[AppendCase, ...] = ()
    host: tuple[DecodeCase, ...] = ()

    @property
    def decodes(self) -> tuple[tuple[str, DecodeCase], ...]:
        """All cases that `bench.decode` measures, with their section."""
        return tuple((name, case) for name in ("decode", "sweep", "variants") for case in getattr(self, name))

    def layouts(self) -> tuple[DecodeCase, ...]:
        """A case for every distinct layout, head count and query count that torch is going to run."""
        cases = [*(case for _, case in self.decodes), *self.host]
        return tuple({_kernel_key(case): case for case in reversed(cases)}.values())[::-1]


def _kernel_key(case: DecodeCase) -> tuple:
    return case.layout(BF16), case.num_q_heads, case.queries, case.window, case.modes


def select(sections: Iterable[str], quick: bool) -> Selection:
    """The cases of ``sections``; ``quick`` keeps a few of each, to see that all runs."""
    sections = set(sections)
    everything = {
        "decode": DECODE,
        "sweep": SWEEP,
        "variants": VARIANTS,
        "append": APPEND,
        "prefill": PREFILL,
        "mla": MLA,
        "host": (HOST,),
        "jax_decode": JAX_DECODE,
        "jax_append": JAX_APPEND,
    }
    wanted = {name: cases for name, cases in everything.items() if name.split("_")[0] in sections}
    if quick:
        wanted = {name: _few(name, cases) for name, cases in wanted.items()}
    return Selection(**wanted)


def _few(section: str, cases: tuple) -> tuple:
    names = {
        "decode": ("64x8k", "16x8k", "1x1k"),
        "sweep": ("8x1k sweep", "8x4k sweep", "8x16k sweep", "1x8k sweep"),
        "prefill": ("prefill 8k D=128",),
        "jax_decode": ("64x8k",),
    }
    return tuple(case for case in cases if case.name in names.get(section, (case.name,)))
