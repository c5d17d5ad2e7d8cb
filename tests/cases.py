"""The conformance cases: one list for every operation, the same for every backend.

Cases that share a layout and options share compiled kernels, so a new case should vary values, lengths and tables
before it varies shapes. Tags: a "large" case takes the interpreter too long; a "callback" case also goes through the
interpreter in a JAX callback, where the kernels are those of the others and only the launcher is new. A "sweep" case
crosses what others cover one by one: compiled kernels and eager torch take it, the interpreter and XLA (which compiles
each shape for a second) do not. A "gpu" case shows a kernel that exists compiled only.
"""

from __future__ import annotations

import dataclasses
import itertools

from kvq_core import CacheLayout
from tests.case_types import AppendCase, AttentionCase, CopyCase, GatherCase
from tests.parts import MergeCase

MODES = (
    "bfloat16",
    "float16",
    "float32",
    "fp8_e4m3",
    "fp8_e5m2",
    "int8_per_token_head",
    "fp8_per_token_head",
)
PAIRS = (
    "int8_per_token_head/fp8_per_token_head",
    "bfloat16/int8_per_token_head",
    "fp8_e4m3/bfloat16",
    "int8_per_token_head/fp8_e5m2",
    "fp8_per_token_head/float32",
    "float16/fp8_e4m3",
)
DTYPES = ("bfloat16", "float16", "float32")
INT8, FP8 = "int8_per_token_head", "fp8_per_token_head"
MIXED_PAIR = PAIRS[0]
HEAD_DIMS = (
    (16, 16),
    (48, 64),
    (64, 48),
    (80, 80),
    (96, 32),
    (112, 112),
    (128, 128),
    (192, 128),
    (256, 256),
    (512, 512),
)
PAGE_SIZES = (1, 5, 8, 24, 32, 64, 128)
SCALES = {"k_scale": 0.37, "v_scale": 1.7}  # of per-tensor modes; others ignore them
ROW_ORDERS = ("HND", "NHD")
ROW_POOLS = ("shared", "padded", "gaps", "transposed", "head-major")
ROW_MODES = (INT8, FP8, MIXED_PAIR, "bfloat16/int8_per_token_head", "fp8_e4m3/float32")
ROW_SHAPES = ((1, 128), (5, 80), (16, 64))  # page sizes, head dims
CALLBACK, LARGE, SWEEP, GPU = (frozenset({tag}) for tag in ("callback", "large", "sweep", "gpu"))


def layout_of(
    mode: str = INT8, page: int = 16, heads: int = 2, dim: int = 64, dim_v: int | None = None, rows: str | None = None
) -> CacheLayout:
    """``rows``: the order of a row container, or None for records."""
    placement = {} if rows is None else {"scale_placement": "row", "row_order": rows}
    return CacheLayout(mode, page_size=page, num_kv_heads=heads, head_dim=dim, head_dim_v=dim_v, **placement)


def _thinned(all_cases):
    """Every third case is tagged a sweep, unless it goes through the callback."""
    for i, case in enumerate(all_cases):
        yield dataclasses.replace(case, tags=SWEEP) if i % 3 == 2 and not case.tags else case


def _callback_if(condition: bool) -> frozenset[str]:
    return CALLBACK if condition else frozenset()


def _append_cases():
    for (i, dtype), mode in itertools.product(enumerate(DTYPES), (*MODES, *PAIRS)):
        layout = layout_of(mode, page=8, heads=3, dim=16, dim_v=32)
        tags = CALLBACK if i == 0 else frozenset()
        yield AppendCase(
            f"edge-{mode}-{dtype}",
            layout,
            dtype,
            DTYPES[(i + MODES.index(mode)) % 3 if mode in MODES else i],
            tags=tags,
        )
    for mode, scale in itertools.product(("fp8_e4m3", "fp8_e5m2"), (0.013, 37.0, 1e-30, 1e30)):
        layout = layout_of(mode, page=8, heads=3, dim=16, dim_v=32)
        yield AppendCase(f"scale-{scale:g}-{mode}", layout, "float32", k_scale=scale, v_scale=1.0)
    for mode, (dim, dim_v) in itertools.product((INT8, FP8, "bfloat16"), HEAD_DIMS):
        yield AppendCase(f"dims-{dim}-{dim_v}-{mode}", layout_of(mode, 16, 2, dim, dim_v), num_tokens=21)
    for (i, page), heads in itertools.product(enumerate(PAGE_SIZES), (1, 5)):
        layout = layout_of((INT8, FP8)[i % 2], page, heads, 48, 16)
        yield AppendCase(f"page-{page}-heads-{heads}", layout, "float16", num_tokens=19)
    base = AppendCase("slots", layout_of(FP8, 8, 3, 16, 32), num_tokens=40)
    for slots, slot_dtype in itertools.product(("shuffled", "dropped", "duplicates", "none"), ("int32", "int64")):
        yield dataclasses.replace(base, name=f"slots-{slots}-{slot_dtype}", slots=slots, slot_dtype=slot_dtype)
    yield dataclasses.replace(base, name="slots-beyond-int32", slots="far", slot_dtype="int64")
    for num_tokens, slots in (
        (0, "shuffled"),
        (1, "shuffled"),
        (256, "duplicates"),
        (257, "duplicates"),
        (900, "dropped"),
        (900, "duplicates"),
    ):
        tags = LARGE if num_tokens == 900 else CALLBACK
        yield dataclasses.replace(
            base, name=f"tokens-{num_tokens}-{slots}", num_tokens=num_tokens, slots=slots, tags=tags
        )
    for strides, mode, dtype in itertools.product(("fused", "transposed", "odd"), (INT8, "bfloat16"), DTYPES):
        yield AppendCase(
            f"strides-{strides}-{mode}-{dtype}", layout_of(mode, dim=80, dim_v=48), dtype, dtype, 37, strides=strides
        )
    for mode in (INT8, FP8, "float16"):
        yield AppendCase(f"padded-pages-{mode}", layout_of(mode, 8, 3, 16, 32), pool="shared")


def _append_rows():
    for rows, mode in itertools.product(ROW_ORDERS, ROW_MODES):
        yield AppendCase(f"rows-{rows}-{mode}", layout_of(mode, 8, 3, 16, 32, rows), tags=CALLBACK, **SCALES)
    for rows, (page, dim) in itertools.product(ROW_ORDERS, ROW_SHAPES):
        yield AppendCase(f"rows-{rows}-page-{page}-dims-{dim}", layout_of(FP8, page, 2, dim, rows=rows), num_tokens=21)
    for pool, mode in itertools.product(ROW_POOLS, (INT8, MIXED_PAIR)):
        yield AppendCase(f"rows-{pool}-{mode}", layout_of(mode, 8, 3, 16, 32, "HND"), pool=pool)
    yield AppendCase("rows-NHD-shared", layout_of(INT8, 8, 3, 16, 32, "NHD"), slots="duplicates", pool="shared")


def _gather_cases():
    for mode, dtype in itertools.product((*MODES, *PAIRS), DTYPES):
        layout = layout_of(mode, page=8, heads=3, dim=16, dim_v=32)
        tags = CALLBACK if dtype == "float32" else frozenset()
        yield GatherCase(f"edge-{mode}-to-{dtype}", layout, dtype=dtype, tags=tags, **SCALES)
    for i, page in enumerate(PAGE_SIZES):
        yield GatherCase(f"page-{page}", layout_of((INT8, FP8)[i % 2], page, 1, 48, 80))
    for mode in (INT8, "fp8_e5m2", "bfloat16"):
        yield GatherCase(f"foreign-pages-{mode}", layout_of(mode, 8, 3, 16, 32), foreign=True, tags=CALLBACK)
    yield GatherCase("past-the-table", layout_of(INT8, 8, 3, 16, 32), spare_columns=-3)
    yield GatherCase("wide-table", layout_of(FP8, 8, 3, 16, 32), spare_columns=20)
    yield GatherCase("no-sequences", layout_of(INT8, 8, 3, 16, 32), lengths=(), tags=CALLBACK)
    yield GatherCase("no-columns", layout_of(INT8, 8, 3, 16, 32), lengths=(0, 0), spare_columns=0)
    yield GatherCase("padded-pages", layout_of(INT8, 8, 3, 16, 32), pool="shared")
    for rows, mode in itertools.product(ROW_ORDERS, ROW_MODES):
        tags = CALLBACK if mode == INT8 else frozenset()
        yield GatherCase(f"rows-{rows}-{mode}", layout_of(mode, 8, 3, 16, 32, rows), foreign=True, tags=tags, **SCALES)
    for rows, (page, dim) in itertools.product(ROW_ORDERS, ROW_SHAPES):
        yield GatherCase(f"rows-{rows}-page-{page}-dims-{dim}", layout_of(FP8, page, 2, dim, rows=rows))
    for pool in ROW_POOLS:
        yield GatherCase(f"rows-{pool}", layout_of(INT8, 8, 3, 16, 32, "HND"), pool=pool)


def _copy_cases():
    for mode, page in (*zip(MODES, (5, 64, 16, 8, 32, 1, 128), strict=True), (INT8, 24)):
        yield CopyCase(f"page-{page}-{mode}", layout_of(mode, page, 3, 80), tags=CALLBACK)
    for index_dtype in ("int32", "int64"):
        yield CopyCase(f"foreign-{index_dtype}", layout_of(INT8, 8), foreign=True, index_dtype=index_dtype)
    yield CopyCase("no-pairs", layout_of(INT8, 8), num_pairs=0)
    yield CopyCase("padded-pages", layout_of(INT8, 8), pool="shared", foreign=True)
    for rows, page in itertools.product(ROW_ORDERS, (1, 5, 16)):
        yield CopyCase(f"rows-{rows}-page-{page}", layout_of(INT8, page, 3, 80, rows=rows), foreign=page == 5)
    for pool in ROW_POOLS:
        yield CopyCase(f"rows-{pool}", layout_of(FP8, 16, 3, 80, rows="HND"), pool=pool, foreign=True)


DECODE = ((1, 37), (1, 5), (1, 0), (1, 64), (1, 1))
FEW = ((3, 37), (1, 5), (0, 9), (4, 64), (2, 2))  # queries of a draft model's tokens
PREFILL = ((7, 23), (0, 9), (1, 17), (20, 20), (0, 0), (9, 50))
KINDS = {
    "decode": {"seqs": DECODE},
    "few": {"seqs": FEW, "ragged": True, "max_seqlen_q": 4, "padding_rows": 1},
    "prefill": {"seqs": PREFILL, "ragged": True, "padding_rows": 3},
}
BOTH = ("decode", "prefill")


def _attention_modes():
    for kind, mode in itertools.product(KINDS, (*MODES, *PAIRS)):
        yield AttentionCase(f"{kind}-{mode}", layout_of(mode), **KINDS[kind], **SCALES, tags=CALLBACK)
    for kind, mode, q_dtype in itertools.product(BOTH, (INT8, FP8, "fp8_e5m2", *DTYPES), ("float16", "float32")):
        tags = SWEEP if (kind == "decode") == (q_dtype == "float16") else _callback_if(mode == INT8)
        yield AttentionCase(
            f"{kind}-{mode}-q-{q_dtype}", layout_of(mode), q_dtype=q_dtype, **KINDS[kind], **SCALES, tags=tags
        )


def _attention_shapes():
    for kind, (i, (dim, dim_v)) in itertools.product(BOTH, enumerate(HEAD_DIMS)):
        for mode in (INT8, ("bfloat16", FP8, "fp8_e4m3", "float32")[i % 4]):
            layout, tags = layout_of(mode, 16, 1, dim, dim_v), _callback_if(mode == INT8 and i % 3 == 0)
            yield AttentionCase(f"{kind}-dims-{dim}-{dim_v}-{mode}", layout, **KINDS[kind], tags=tags)
    for kind, (i, page) in itertools.product(BOTH, enumerate(PAGE_SIZES)):
        layout, tags = layout_of((INT8, FP8)[i % 2], page, 1), _callback_if(i % 3 == 0)
        yield AttentionCase(f"{kind}-page-{page}", layout, **KINDS[kind], tags=tags)
    for kind, (heads, group) in itertools.product(KINDS, ((3, 1), (1, 3), (1, 5), (1, 8), (1, 12), (1, 33), (5, 1))):
        tags = _callback_if(kind == "decode" and group in (1, 33))
        yield AttentionCase(
            f"{kind}-heads-{heads}-group-{group}", layout_of(INT8, heads=heads), group=group, **KINDS[kind], tags=tags
        )
    for queries in (2, 16):
        seqs = ((queries, 40), (1, 7))
        yield AttentionCase(f"queries-{queries}", layout_of(INT8), seqs, ragged=True, max_seqlen_q=queries)
    yield AttentionCase("prefill-max-seqlen-q", layout_of(INT8), PREFILL, ragged=True, max_seqlen_q=40, group=4)


def _attention_of_four_warps():
    """32 query rows of a KV head, which on Hopper a group of four warps attends with."""
    kinds = {
        "decode": {"seqs": ((1, 300), (1, 128), (1, 5)), "group": 32},
        "few": {"seqs": ((8, 200), (3, 37), (0, 9)), "ragged": True, "max_seqlen_q": 8, "padding_rows": 2, "group": 4},
    }
    for (i, kind), (j, mode) in itertools.product(
        enumerate(kinds), enumerate((INT8, FP8, "fp8_e4m3", "fp8_e5m2", f"{INT8}/{FP8}", f"{FP8}/bfloat16"))
    ):
        tags = SWEEP if (i + j) % 2 else _callback_if(mode == FP8)
        yield AttentionCase(f"{kind}-rows-32-{mode}", layout_of(mode, 16, 1, 128), **kinds[kind], **SCALES, tags=tags)
    for i, (dim, dim_v) in enumerate(((80, 80), (112, 96), (192, 128), (256, 256), (64, 128), (16, 128))):
        layout, kind = layout_of((INT8, FP8)[i % 2], (8, 64)[i % 2], 1, dim, dim_v), ("few", "decode")[i % 2]
        yield AttentionCase(f"{kind}-rows-32-dims-{dim}-{dim_v}", layout, **kinds[kind], tags=SWEEP)
    for kind, mode in zip(kinds, (INT8, FP8), strict=True):
        options = {"v_exponents": MIXED, "damage": ("nan_v", "foreign"), **OPTIONS["all"]}
        yield AttentionCase(f"{kind}-rows-32-all", layout_of(mode, 5, 1, 128, rows="NHD"), **kinds[kind], **options)


OPTIONS = {
    "not-causal": {"causal": False},
    "window-1": {"window": 1},
    "window-9": {"window": 9},
    "window-100": {"window": 100},
    "window-not-causal": {"window": 9, "causal": False},
    "softcap": {"softcap": 2.5},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "sm-scale": {"sm_scale": 0.7},
    "all": {"window": 13, "softcap": 20.0, "alibi": True, "sinks": True, "sm_scale": 0.4},
    "all-but-causal": {"causal": False, "softcap": 3.0, "alibi": True, "sinks": True},
}


def _attention_options():
    for kind, (name, options) in itertools.product(KINDS, OPTIONS.items()):
        yield AttentionCase(f"{kind}-{name}", layout_of(INT8), **KINDS[kind], **options)


def _attention_options_of_modes():
    """Every option over every mode, many at once."""
    for mode, name in itertools.product((*MODES, MIXED_PAIR), ("all", "all-but-causal")):
        for kind in BOTH if name == "all" else ("prefill",):
            tags = _callback_if((kind == "decode") == (name == "all"))
            yield AttentionCase(
                f"{kind}-{name}-of-{mode}", layout_of(mode), **KINDS[kind], **OPTIONS[name], **SCALES, tags=tags
            )


TINY, HUGE, MIXED = (-4, -4), (4, 4), (-4, 4)
AMPLITUDES = {  # sm_scale keeps the scores ordinary, so that many keys count and small errors show
    "v-tiny": {"v_exponents": TINY},
    "v-huge": {"v_exponents": HUGE},
    "v-mixed": {"v_exponents": MIXED},
    "k-tiny": {"k_exponents": TINY, "sm_scale": 1e3},
    "k-huge": {"k_exponents": HUGE, "sm_scale": 1e-5},
    "k-and-v-mixed": {"k_exponents": MIXED, "v_exponents": MIXED, "sm_scale": 1e-5},
    "one-key-wins": {"k_exponents": MIXED, "v_exponents": MIXED, "sm_scale": 1.0},
    "q-mixed": {"q_exponents": MIXED, "sm_scale": 1e-5},
}


def _attention_amplitudes():
    for kind, mode, (name, options) in itertools.product(BOTH, (INT8, FP8, "bfloat16"), AMPLITUDES.items()):
        yield AttentionCase(f"{kind}-{name}-{mode}", layout_of(mode), **KINDS[kind], **options)


def _attention_precise_queries():
    for mode, (name, options), q_dtype in itertools.product(
        (INT8, "float32"), AMPLITUDES.items(), ("float16", "float32")
    ):
        kind = "prefill" if q_dtype == "float16" else "decode"
        yield AttentionCase(
            f"{kind}-{name}-{mode}-q-{q_dtype}", layout_of(mode), q_dtype=q_dtype, **KINDS[kind], **options
        )


def _attention_traps():
    for kind, mode in itertools.product(KINDS, (INT8, FP8, "fp8_e4m3", "bfloat16")):
        for damage in ("nan_k", "nan_v"):
            yield AttentionCase(f"{kind}-{damage}-{mode}", layout_of(mode), **KINDS[kind], damage=(damage,))
        hidden = {"damage": ("nan_before_window", "garbage"), "window": 3}
        yield AttentionCase(f"{kind}-hidden-{mode}", layout_of(mode, page=5), **KINDS[kind], **hidden)
    for kind, damage in itertools.product(KINDS, ("foreign", "negative")):
        yield AttentionCase(f"{kind}-{damage}-page", layout_of(INT8), **KINDS[kind], damage=(damage,), tags=CALLBACK)
        yield AttentionCase(
            f"{kind}-{damage}-page-window", layout_of(INT8, page=5), **KINDS[kind], damage=(damage,), window=9
        )
    for kind, mode in itertools.product(KINDS, (INT8, "bfloat16")):
        yield AttentionCase(f"{kind}-past-the-table-{mode}", layout_of(mode), **KINDS[kind], spare_columns=-1)
        yield AttentionCase(f"{kind}-no-columns-{mode}", layout_of(mode), **KINDS[kind], spare_columns=-100)
    yield AttentionCase(
        "prefill-past-the-table-not-causal", layout_of(INT8), **KINDS["prefill"], spare_columns=-1, causal=False
    )


def _attention_calls():
    shared = ((1, 40), (1, 32), (1, 64))
    for kind in KINDS:
        yield AttentionCase(f"{kind}-wide-table", layout_of(INT8), **KINDS[kind], spare_columns=30)
        yield AttentionCase(f"{kind}-padded-pages", layout_of(INT8), **KINDS[kind], pool="shared")
    yield AttentionCase("decode-shared-pages", layout_of(INT8), shared, shared_pages=2, tags=CALLBACK)
    yield AttentionCase(
        "prefill-shared-pages", layout_of(FP8), ((9, 40), (32, 64), (2, 34)), ragged=True, shared_pages=2
    )
    for strides, kind, q_dtype in itertools.product(("fused", "transposed", "odd"), BOTH, ("bfloat16", "float32")):
        yield AttentionCase(
            f"{kind}-strides-{strides}-{q_dtype}", layout_of(INT8), q_dtype=q_dtype, strides=strides, **KINDS[kind]
        )
    for kind in ("few", "prefill"):
        only_padding = {**KINDS[kind], "seqs": ((0, 5), (0, 0))}
        yield AttentionCase(f"{kind}-only-padding-rows", layout_of(INT8), **only_padding, sinks=True)
    yield AttentionCase("no-sequences", layout_of(INT8), ())
    yield AttentionCase("no-queries", layout_of(INT8), ((0, 5), (0, 0)), ragged=True)
    yield AttentionCase("no-keys", layout_of(INT8), ((1, 0), (1, 0)), sinks=True)
    for kind, seqs in (("decode", ((1, 5), (1, 0))), ("prefill", ((70, 90), (1, 0)))):
        name, ragged = f"{kind}-no-pages", kind == "prefill"
        yield AttentionCase(name, layout_of(INT8), seqs, ragged=ragged, no_pages=True, tags=CALLBACK)
    yield AttentionCase("decode-as-ragged", layout_of(INT8), DECODE, ragged=True, max_seqlen_q=1, tags=CALLBACK)
    yield AttentionCase(
        "mixed-batch", layout_of(FP8), ((1, 70), (30, 30), (1, 3), (17, 80)), ragged=True, tags=CALLBACK
    )
    yield AttentionCase("two-splits", layout_of(INT8, heads=1), ((1, 700), (1, 3)), tags=CALLBACK)
    yield AttentionCase(
        "two-splits-all", layout_of(FP8, heads=1), ((2, 600), (1, 300)), ragged=True, max_seqlen_q=2, **OPTIONS["all"]
    )
    yield AttentionCase("130-sequences", layout_of(INT8, heads=1, dim=16), tuple((1, 1 + i % 40) for i in range(130)))
    yield AttentionCase(
        "140-prompts",
        layout_of(INT8, heads=1, dim=16),
        tuple((i % 3, i % 3 + i % 11) for i in range(140)),
        ragged=True,
        tags=LARGE,
    )
    for mode in (INT8, FP8, "bfloat16"):
        yield AttentionCase(
            f"many-splits-{mode}",
            layout_of(mode, heads=1),
            ((1, 6000), (1, 900), (1, 0)),
            v_exponents=MIXED,
            tags=LARGE,
        )
        yield AttentionCase(f"long-prefill-{mode}", layout_of(mode), ((300, 900), (129, 129)), ragged=True, tags=LARGE)
        yield AttentionCase(
            f"long-windowed-{mode}", layout_of(mode), ((70, 900), (1, 500)), ragged=True, window=200, tags=LARGE
        )


def _merge_cases():
    for (i, kind), mode in itertools.product(enumerate(KINDS), (INT8, "fp8_e4m3", "bfloat16")):
        tags = CALLBACK if mode == INT8 else frozenset()
        whole = AttentionCase(f"merge-{kind}-{mode}", layout_of(mode), **KINDS[kind], **SCALES, tags=tags)
        yield MergeCase(whole, 2 + i % 2)
    options = {name: OPTIONS[name] for name in ("not-causal", "softcap", "sinks")}
    options |= {"v-mixed": AMPLITUDES["v-mixed"], "one-key-wins": AMPLITUDES["one-key-wins"]}
    options |= {"nan_v": {"damage": ("nan_v",)}, "nan_k": {"damage": ("nan_k",)}, "q-float32": {"q_dtype": "float32"}}
    for i, (kind, name) in enumerate(itertools.product(BOTH, options)):
        tags = SWEEP if i % 3 == 2 else frozenset()
        whole = AttentionCase(f"merge-{kind}-{name}", layout_of(INT8), **KINDS[kind], **options[name], tags=tags)
        yield MergeCase(whole, 2 + i % 2)


def _attention_rows():
    for kind, rows, mode in itertools.product(KINDS, ROW_ORDERS, ROW_MODES):
        tags = CALLBACK if mode == INT8 else SWEEP if (kind == "few") != (rows == "HND") else frozenset()
        yield AttentionCase(
            f"{kind}-rows-{rows}-{mode}",
            layout_of(mode, rows=rows),
            **KINDS[kind],
            **SCALES,
            v_exponents=MIXED,
            tags=tags,
        )
    for kind, (i, (page, dim)) in itertools.product(KINDS, enumerate(ROW_SHAPES)):
        rows, mode = ROW_ORDERS[i % 2], (FP8, INT8)[i % 2]
        yield AttentionCase(
            f"{kind}-rows-page-{page}-dims-{dim}", layout_of(mode, page, 1, dim, rows=rows), **KINDS[kind]
        )
    for kind, pool in itertools.product(BOTH, ROW_POOLS):
        yield AttentionCase(f"{kind}-rows-{pool}", layout_of(INT8, rows="HND"), **KINDS[kind], pool=pool)
    for kind in KINDS:
        damage = {"damage": ("foreign", "nan_v"), "window": 9}
        yield AttentionCase(f"{kind}-rows-damaged", layout_of(INT8, page=5, rows="NHD"), **KINDS[kind], **damage)


APPEND_CASES = (*_append_cases(), *_append_rows())
GATHER_CASES = tuple(_gather_cases())
COPY_CASES = tuple(_copy_cases())
ATTENTION_CASES = (
    *_attention_modes(),
    *_thinned(_attention_shapes()),
    *_thinned(_attention_options()),
    *_attention_options_of_modes(),
    *_thinned(_attention_amplitudes()),
    *_thinned(_attention_precise_queries()),
    *_thinned(_attention_traps()),
    *_attention_calls(),
    *_attention_rows(),
    *_attention_of_four_warps(),
)
MERGE_CASES = tuple(_merge_cases())
