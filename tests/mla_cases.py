"""The conformance cases of MLA caches; what the tags mean is said in `tests.cases`."""

from __future__ import annotations

import itertools

from kvq_core import MLALayout
from kvq_core.mla import MLA_MODES
from tests.case_types import AppendCase, AttentionCase, GatherCase
from tests.cases import BOTH, CALLBACK, FP8, GPU, HUGE, INT8, KINDS, LARGE, MIXED, PREFILL, TINY, _thinned

SCALE = {"k_scale": 0.37, "v_scale": 0.37}  # one for both parts, of the per-tensor mode
PAGE_SIZES = (1, 5, 24, 64)
DIMS = ((512, 64), (16, 16), (48, 80), (256, 64), (192, 32))
HEADS = (1, 16, 20, 40, 128)


def layout_of(mode: str = INT8, page: int = 16, rank: int = 64, rope_dim: int = 32) -> MLALayout:
    return MLALayout(mode, page_size=page, kv_lora_rank=rank, rope_dim=rope_dim)


def _append_cases():
    for mode, dtype in itertools.product(MLA_MODES, ("bfloat16", "float16", "float32")):
        tags = CALLBACK if dtype == "bfloat16" else frozenset()
        yield AppendCase(f"mla-edge-{mode}-{dtype}", layout_of(mode, page=8), dtype, "bfloat16", **SCALE, tags=tags)
    for i, (rank, rope_dim) in enumerate(DIMS):
        yield AppendCase(f"mla-dims-{rank}-{rope_dim}", layout_of(MLA_MODES[i % 4], 7, rank, rope_dim), num_tokens=19)
    for slots in ("dropped", "duplicates", "none"):
        yield AppendCase(f"mla-slots-{slots}", layout_of(FP8), num_tokens=40, slots=slots, slot_dtype="int64")
    for strides in ("fused", "odd"):
        yield AppendCase(f"mla-strides-{strides}", layout_of(), num_tokens=37, strides=strides)
    yield AppendCase("mla-padded-pages", layout_of(FP8, page=5), pool="shared")


def _gather_cases():
    for mode in MLA_MODES:
        yield GatherCase(f"mla-edge-{mode}", layout_of(mode, page=8), tags=CALLBACK, **SCALE)
    for page in PAGE_SIZES:
        yield GatherCase(f"mla-page-{page}", layout_of(FP8, page))
    yield GatherCase("mla-foreign-pages", layout_of(page=8), foreign=True)
    yield GatherCase("mla-no-sequences", layout_of(), lengths=())
    yield GatherCase("mla-padded-pages", layout_of(FP8, page=8), pool="shared")


def attention(name: str, layout: MLALayout, heads: int = 3, sm_scale: float = 0.15, **fields) -> AttentionCase:
    return AttentionCase(f"mla-{name}", layout, **{"group": heads, "sm_scale": sm_scale, **SCALE, **fields})


def _modes():
    for kind, mode in itertools.product(KINDS, MLA_MODES):
        yield attention(f"{kind}-{mode}", layout_of(mode), **KINDS[kind], tags=CALLBACK)
        yield attention(f"{kind}-{mode}-many-heads", layout_of(mode), heads=70, **KINDS[kind])
    for kind, mode, q_dtype in itertools.product(BOTH, MLA_MODES, ("float16", "float32")):
        yield attention(f"{kind}-{mode}-q-{q_dtype}", layout_of(mode), q_dtype=q_dtype, **KINDS[kind])


def _shapes():
    for kind, (i, heads) in itertools.product(KINDS, enumerate(HEADS)):
        yield attention(f"{kind}-heads-{heads}", layout_of(MLA_MODES[i % 4]), heads=heads, **KINDS[kind])
    for kind, (i, page) in itertools.product(BOTH, enumerate(PAGE_SIZES)):
        for heads in (3, 64):
            layout = layout_of(MLA_MODES[1 + i % 3], page)
            yield attention(f"{kind}-page-{page}-heads-{heads}", layout, heads=heads, **KINDS[kind])
    for kind, mode, (rank, rope_dim) in itertools.product(BOTH, (INT8, "bfloat16"), DIMS):
        for heads in (16, 64):
            layout = layout_of(mode, 16, rank, rope_dim)
            yield attention(f"{kind}-dims-{rank}-{rope_dim}-{mode}-heads-{heads}", layout, heads=heads, **KINDS[kind])
    for kind, mode in itertools.product(KINDS, ("fp8_e4m3", FP8)):
        tags = CALLBACK if (kind, mode) == ("prefill", FP8) else frozenset()
        yield attention(f"{kind}-not-causal-{mode}", layout_of(mode), causal=False, **KINDS[kind], tags=tags)
    yield attention("max-seqlen-q", layout_of(), seqs=PREFILL, ragged=True, max_seqlen_q=40)
    yield attention(
        "two-queries-128-heads", layout_of(FP8), heads=128, seqs=((2, 90), (1, 3)), ragged=True, max_seqlen_q=2
    )


AMPLITUDES = {  # sm_scale keeps the scores ordinary, so that many keys count and small errors show
    "latent-tiny": {"k_exponents": TINY, "sm_scale": 1.0},
    "latent-huge": {"k_exponents": HUGE, "v_exponents": HUGE, "sm_scale": 1e-5},
    "latent-mixed": {"k_exponents": MIXED, "sm_scale": 1e-5},
    "both-mixed": {"k_exponents": MIXED, "v_exponents": MIXED, "sm_scale": 1e-5},
    "one-key-wins": {"k_exponents": MIXED, "v_exponents": MIXED, "sm_scale": 1.0},
    "q-mixed": {"q_exponents": MIXED, "sm_scale": 1e-5},
}


def _amplitudes():
    for kind, mode, (name, options) in itertools.product(BOTH, MLA_MODES, AMPLITUDES.items()):
        k_scale = {"k_scale": 10.0, "v_scale": 10.0} if mode == "fp8_e4m3" and "tiny" not in name else SCALE
        heads = 64 if name in ("both-mixed", "q-mixed") else 5
        yield attention(f"{kind}-{name}-{mode}", layout_of(mode), heads, **{**k_scale, **options}, **KINDS[kind])


def _traps():
    for kind, mode, heads in itertools.product(KINDS, MLA_MODES, (3, 64)):
        for damage in ("nan_k", "nan_v", "foreign"):
            name = f"{kind}-{damage}-{mode}-heads-{heads}"
            yield attention(name, layout_of(mode), heads, damage=(damage,), **KINDS[kind])
    for kind in KINDS:
        yield attention(f"{kind}-negative-page", layout_of(FP8, 5), damage=("negative",), **KINDS[kind])
        yield attention(f"{kind}-past-the-table", layout_of(), spare_columns=-1, **KINDS[kind])
        yield attention(f"{kind}-no-columns", layout_of(), spare_columns=-100, **KINDS[kind])


def _calls():
    for kind in KINDS:
        yield attention(f"{kind}-wide-table", layout_of(), spare_columns=30, **KINDS[kind])
        yield attention(f"{kind}-padded-pages", layout_of(FP8), pool="shared", **KINDS[kind])
        yield attention(f"{kind}-strides-fused", layout_of(), strides="fused", **KINDS[kind])
        yield attention(f"{kind}-strides-odd", layout_of(), 64, strides="odd", **KINDS[kind])
    yield attention("shared-pages", layout_of(), seqs=((1, 40), (1, 32), (1, 64)), shared_pages=2, tags=CALLBACK)
    yield attention("only-padding-rows", layout_of(), seqs=((0, 5), (0, 0)), ragged=True, padding_rows=3)
    yield attention("no-sequences", layout_of(), seqs=())
    yield attention("no-keys", layout_of(), seqs=((1, 0), (1, 0)))
    yield attention("no-pages", layout_of(), seqs=((1, 5), (1, 0)), no_pages=True, tags=CALLBACK)
    yield attention("rope-only", layout_of(FP8), 64, 1e-5, seqs=((1, 60),), rope_only=True, v_exponents=MIXED)
    yield attention("two-splits", layout_of(), seqs=((1, 700), (1, 3)), tags=CALLBACK)
    for mode in MLA_MODES:
        many = {"seqs": ((1, 3000), (1, 900), (1, 0)), "k_exponents": MIXED, "tags": LARGE}
        yield attention(f"many-splits-{mode}", layout_of(mode, 64), 16, **many)
        full = {"seqs": ((1, 450), (1, 70)), "k_exponents": MIXED, "tags": LARGE}
        yield attention(f"full-size-rows-{mode}", layout_of(mode, 64, 512, 64), 128, **full)
        long = {"seqs": ((70, 200), (33, 33)), "ragged": True, "tags": LARGE}
        yield attention(f"long-prefill-{mode}", layout_of(mode, 64, 512, 64), 16, **long)


def _task_groups():
    """What `kvq_core.kernels.groups` decodes: tiles of 64 keys, one or two at a time; ends on every side of them."""
    ends = tuple((1, length) for length in (0, 1, 63, 64, 65, 127, 128, 129, 0, 300))
    calls = {
        "ends": {"seqs": ends},
        "wide-pages": {"page": 128, "seqs": ends[3:]},
        "all-mixed": {"k_exponents": MIXED, "v_exponents": MIXED, "sm_scale": 1e-5},
        "q-mixed": {"q_exponents": MIXED, "sm_scale": 1e-5},
        "latent-huge": {"k_exponents": HUGE, "sm_scale": 1e-5},
        "one-key-wins": {"k_exponents": MIXED, "v_exponents": MIXED, "sm_scale": 1.0},
        "many-parts": {"seqs": ((1, 4000), (1, 31), (1, 2500))},
        "many-sequences": {"seqs": tuple((1, 3 * i % 11 * 6) for i in range(150))},
        "no-query": {"seqs": ((1, 70), (0, 200), (1, 0), (0, 0), (1, 140)), "ragged": True, "max_seqlen_q": 1},
        "negative-scale": {"sm_scale": -0.1},
        "rope-only": {"rope_only": True, "v_exponents": MIXED, "sm_scale": 1e-5},
        "strides": {"strides": "odd", "pool": "shared"},
        "past-the-table": {"spare_columns": -1},
        "q-float16": {"q_dtype": "float16", "seqs": ends},
    }
    calls |= {damage: {"damage": (damage,)} for damage in ("nan_k", "nan_v", "foreign", "negative")}
    heads = {
        "many": {"wide-pages": 200, "all-mixed": 33, "many-sequences": 40, "q-float16": 128},
        "few": {"wide-pages": 1, "all-mixed": 5, "many-sequences": 15, "many-parts": 9}
        | {"q-mixed": 32, "one-key-wins": 20, "no-query": 25, "nan_k": 32, "foreign": 17},
    }
    for count, mode, (name, call) in itertools.product(heads, MLA_MODES, calls.items()):
        if (count, mode) == ("few", "bfloat16"):
            continue  # takes the kernel that all GPUs have
        num_heads = heads[count].get(name, {"many": 64, "few": 16}[count])
        options = {"seqs": ((1, 200), (1, 90), (1, 17)), **call}
        layout = layout_of(mode, options.pop("page", 64), 512, 64)
        yield attention(f"task-groups-{count}-heads-{name}-{mode}", layout, num_heads, **options, tags=GPU)


APPEND_CASES = tuple(_append_cases())
GATHER_CASES = tuple(_gather_cases())
ATTENTION_CASES = (
    *_modes(),
    *_thinned(_shapes()),
    *_thinned(_amplitudes()),
    *_thinned(_traps()),
    *_calls(),
    *_task_groups(),
)
