"""Checks of what is known without reading an array: dtypes, shapes, strides, static numbers (DESIGN.md section 6).

Every backend calls them before anything is launched or written. A wrong dtype or type of number is a TypeError,
everything else a ValueError; the message says what was expected, what came, and how to mend it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

from kvq_core.layout import FIELD_ALIGNMENT, RECORD_AXES, ROW_AXES, CacheLayout
from kvq_core.mla import MLALayout

ROW_ALIGNMENT = 4  # bytes: a row scale, and the words that kernels read 8-bit codes of V in
FLOAT_DTYPES = ("bfloat16", "float16", "float32")
INDEX_DTYPES = ("int32", "int64")


class ArraySpec(NamedTuple):
    """What a check may know of an array: its numpy dtype name, its shape, its strides in elements."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class AttentionCall(NamedTuple):
    """What checks and plans may know of a call of ``paged_attention`` or ``mla_attention``: all but the values.

    Launch plans are cached by it. So it is without ``max_seqlen_k``, which may differ at every step and changes no
    kernel, and it is a tuple: a frozen dataclass takes three times as long to make and to look up.
    """

    q: ArraySpec
    pages: ArraySpec
    page_table: ArraySpec
    seq_lens: ArraySpec
    cu_seqlens_q: ArraySpec | None = None
    sinks: ArraySpec | None = None
    alibi_slopes: ArraySpec | None = None
    max_seqlen_q: int | None = None
    sm_scale: float | None = None
    causal: bool = True
    window: int | None = None
    softcap: float | None = None

    @property
    def score_scale(self) -> float:
        """``sm_scale``, or its default."""
        return self.q.shape[2] ** -0.5 if self.sm_scale is None else self.sm_scale


def axis_stride(x: ArraySpec, axis: int) -> int:
    """Elements from index to index of an axis. The stride of one of length 1 says nothing, and differs by framework."""
    return x.strides[axis] if x.shape[axis] > 1 else math.prod(x.shape[axis + 1 :])


def pages_alignment(pages: ArraySpec) -> int:
    """What kernels take the address of a pool to be a multiple of: the power of two, up to 16, that its strides are."""
    return math.gcd(FIELD_ALIGNMENT, *(axis_stride(pages, axis) for axis in range(len(pages.shape) - 1)))


def check_append_kv(layout: CacheLayout, pages: ArraySpec, k: ArraySpec, v: ArraySpec, slot_mapping: ArraySpec) -> None:
    """Check the arguments of ``append_kv``.

    Args:
        layout: the layout of ``pages``.
        pages: uint8, the axes of ``layout``.
        k: bfloat16, float16 or float32 ``[num_tokens, num_kv_heads, head_dim]``, last axis contiguous.
        v: the same with ``head_dim_v``; its dtype may differ from that of ``k``.
        slot_mapping: int32 or int64 ``[num_tokens]``.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    num_kv_heads = _check_pages(pages, layout)
    for name, spec, dim_name, dim in (("k", k, "head_dim", layout.head_dim), ("v", v, "head_dim_v", layout.head_dim_v)):
        _check_dtype(name, spec, FLOAT_DTYPES)
        _check_shape(name, spec, {"num_tokens": None, "num_kv_heads": num_kv_heads, dim_name: dim})
        _check_rows_contiguous(name, spec)
    if v.shape[0] != k.shape[0]:
        raise ValueError(f"expected as many tokens in v as in k, {k.shape[0]}; got {v.shape[0]}")
    _check_vector("slot_mapping", slot_mapping, INDEX_DTYPES, "num_tokens", k.shape[0])


def check_gather_kv(
    layout: CacheLayout, pages: ArraySpec, page_table: ArraySpec, seq_lens: ArraySpec, dtype: str
) -> None:
    """Check the arguments of ``gather_kv``.

    Args:
        layout: the layout of ``pages``.
        pages: uint8, the axes of ``layout``.
        page_table: int32 ``[num_seqs, max_pages]``, contiguous.
        seq_lens: int32 ``[num_seqs]``, contiguous.
        dtype: the dtype of the result, bfloat16, float16 or float32.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    _check_pages(pages, layout)
    _check_sequences(page_table, seq_lens)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"expected the dtype of the result to be {_either(FLOAT_DTYPES)}; got {dtype!r}")


def check_copy_pages(pages: ArraySpec, src: ArraySpec, dst: ArraySpec) -> None:
    """Check the arguments of ``copy_pages``.

    Args:
        pages: uint8, the axes of any layout.
        src: int32 or int64 ``[num_pairs]``, the pages to read.
        dst: int32 or int64 ``[num_pairs]``, the pages to write.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    _check_pages(pages)
    _check_vector("src", src, INDEX_DTYPES, "num_pairs")
    _check_vector("dst", dst, INDEX_DTYPES, "num_pairs", src.shape[0])


def check_paged_attention(layout: CacheLayout, call: AttentionCall) -> None:
    """Check the arguments of ``paged_attention``.

    Args:
        layout: the layout of ``pages``.
        call: its arguments:
            q: bfloat16, float16 or float32 ``[num_q_tokens, num_q_heads, head_dim]``, last axis contiguous.
            pages: uint8, the axes of ``layout``.
            page_table: int32 ``[num_seqs, max_pages]``, contiguous.
            seq_lens: int32 ``[num_seqs]``, contiguous.
            cu_seqlens_q: int32 ``[num_seqs + 1]``, contiguous; None for one query per sequence.
            max_seqlen_q: an integer from 1, or None.
            sm_scale: a finite number, or None.
            causal: a bool.
            window: an integer from 1, or None.
            softcap: a finite number above 0, or None.
            sinks: float32 ``[num_q_heads]``, contiguous, or None.
            alibi_slopes: float32 ``[num_q_heads]``, contiguous, or None.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    num_kv_heads = _check_pages(call.pages, layout)
    _check_query(call.q, num_kv_heads, layout.head_dim)
    num_seqs = _check_sequences(call.page_table, call.seq_lens)
    _check_cu_seqlens_q(call.cu_seqlens_q, call.q.shape[0], num_seqs)
    for name, spec in (("sinks", call.sinks), ("alibi_slopes", call.alibi_slopes)):
        if spec is not None:
            _check_vector(name, spec, ("float32",), "num_q_heads", call.q.shape[1])
    _check_bool("causal", call.causal)
    check_count("max_seqlen_q", call.max_seqlen_q)
    check_count("window", call.window)
    _check_number("sm_scale", call.sm_scale)
    _check_number("softcap", call.softcap)
    if call.softcap is not None and call.softcap <= 0:
        raise ValueError(f"expected softcap above 0; got {call.softcap!r}. None turns it off")


def check_merge_states(
    outs: ArraySpec | Sequence[ArraySpec],
    lses: ArraySpec | Sequence[ArraySpec],
    out_dtypes: tuple[str, ...] = FLOAT_DTYPES,
    lse_dtypes: tuple[str, ...] = ("float32",),
) -> None:
    """Check the arguments of ``merge_states``, each one array of stacked parts or a sequence of parts.

    Args:
        outs: parts ``[num_q_tokens, num_q_heads, head_dim_v]`` of one dtype.
        lses: as many parts ``[num_q_tokens, num_q_heads]``.
        out_dtypes: what the dtype of ``outs`` may be.
        lse_dtypes: what the dtype of ``lses`` may be.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    outs, lses = _parts(outs), _parts(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"expected one part or more, and as many in lses as in outs; got {len(outs)} in outs and {len(lses)} in "
            "lses. Pass both as paged_attention(return_lse=True) returned them for each part"
        )
    sizes: dict[str, int | None] = dict.fromkeys(("num_q_tokens", "num_q_heads", "head_dim_v"))
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        _check_dtype(f"outs[{i}]", out, out_dtypes if i == 0 else (outs[0].dtype,))
        _check_shape(f"outs[{i}]", out, sizes)
        sizes = dict(zip(sizes, out.shape, strict=True))
        _check_dtype(f"lses[{i}]", lse, lse_dtypes)
        _check_shape(f"lses[{i}]", lse, {name: sizes[name] for name in ("num_q_tokens", "num_q_heads")})


def _parts(specs: ArraySpec | Sequence[ArraySpec]) -> list[ArraySpec]:
    """The specs of the parts along the first axis of one array, or of a sequence of them."""
    if not isinstance(specs, ArraySpec):
        return list(specs)
    return [ArraySpec(specs.dtype, specs.shape[1:], specs.strides[1:])] * (specs.shape[0] if specs.shape else 0)


def _check_pages(pages: ArraySpec, layout: CacheLayout | MLALayout | None = None) -> int:
    """Check a pool of pages, against ``layout`` if given; return the number of KV heads it holds.

    Records lie one after the other in their page. The rows of a row container may lie anywhere, in any order of axes,
    but neither over one another nor off the grid of `ROW_ALIGNMENT`.
    """
    _check_dtype("pages", pages, ("uint8",), "View its bytes as uint8")
    if layout is not None:
        axes, sizes = layout.axes, layout.shape(0)
    else:
        axes = ROW_AXES["HND"] if len(pages.shape) == 4 else RECORD_AXES
        sizes = (None,) * len(axes)
    _check_shape("pages", pages, dict(zip(axes, sizes, strict=True)) | {"num_pages": None, "num_kv_heads": None})
    num_kv_heads = pages.shape[axes.index("num_kv_heads")]
    _check_kv_head_count(num_kv_heads, layout.num_kv_heads if layout else num_kv_heads)
    _check_multiple(axes[-1], pages.shape[-1], FIELD_ALIGNMENT if axes == RECORD_AXES else ROW_ALIGNMENT)
    if axes == RECORD_AXES:
        _check_record_strides(pages)
    elif 0 not in pages.shape:
        _check_row_strides(pages)
    return num_kv_heads


def _check_multiple(name: str, num_bytes: int, alignment: int) -> None:
    if num_bytes == 0 or num_bytes % alignment:
        raise ValueError(f"expected {name} to be a multiple of {alignment}; got {num_bytes}")


def _check_record_strides(pages: ArraySpec) -> None:
    num_pages, num_kv_heads, record_bytes = pages.shape
    if num_pages > 0 and not _is_contiguous(pages.shape[1:], pages.strides[1:]):
        raise ValueError(
            f"expected pages with contiguous records, strides (page stride, {record_bytes}, 1); got {pages.strides}. "
            "Slice a pool along pages only; shard KV heads into a pool of their own"
        )
    page_stride, least = pages.strides[0], num_kv_heads * record_bytes
    if num_pages > 1 and (page_stride < least or page_stride % FIELD_ALIGNMENT):
        raise ValueError(
            f"expected a page stride of at least {least} bytes (num_kv_heads={num_kv_heads} * "
            f"record_bytes={record_bytes}) and a multiple of {FIELD_ALIGNMENT}; got {page_stride}"
        )


def _check_row_strides(pages: ArraySpec) -> None:
    axes = sorted((pages.strides[axis], size) for axis, size in enumerate(pages.shape[:-1]) if size > 1)
    if pages.strides[-1] != 1 or any(stride % ROW_ALIGNMENT for stride, _ in axes):
        raise ValueError(
            f"expected pages with contiguous rows, last stride 1, and other strides that are multiples of "
            f"{ROW_ALIGNMENT}; got {pages.strides}. View a container as uint8 and slice it along any axis but the last"
        )
    span = pages.shape[-1]
    for stride, size in axes:
        if stride < span:
            raise ValueError(
                f"expected rows that do not overlap, strides of at least {span} bytes here; got {stride} in "
                f"{pages.strides} of shape {list(pages.shape)}. Copy a view that repeats rows"
            )
        span += (size - 1) * stride


def _check_kv_head_count(num_kv_heads: int, num_kv_heads_of_layout: int) -> None:
    """A pool holds all KV heads of the layout, or one shard of them (inside ``shard_map``)."""
    if num_kv_heads == 0 or num_kv_heads_of_layout % num_kv_heads:
        raise ValueError(
            f"expected pages of num_kv_heads={num_kv_heads_of_layout} of the layout, or of a shard that divides it; "
            f"got {num_kv_heads}. Allocate pages with layout.shape(num_pages)"
        )


def _check_query(q: ArraySpec, num_kv_heads: int, head_dim: int) -> None:
    _check_dtype("q", q, FLOAT_DTYPES)
    _check_shape("q", q, {"num_q_tokens": None, "num_q_heads": None, "head_dim": head_dim})
    _check_rows_contiguous("q", q)
    if q.shape[1] == 0 or q.shape[1] % num_kv_heads:
        raise ValueError(
            f"expected num_q_heads to be a multiple of the {num_kv_heads} KV heads of pages; got {q.shape[1]}"
        )


def _check_sequences(page_table: ArraySpec, seq_lens: ArraySpec) -> int:
    """Check table and lengths; return the number of sequences."""
    _check_dtype("page_table", page_table, ("int32",))
    _check_shape("page_table", page_table, {"num_seqs": None, "max_pages": None})
    _check_contiguous("page_table", page_table)
    _check_vector("seq_lens", seq_lens, ("int32",), "num_seqs", page_table.shape[0])
    return page_table.shape[0]


def _check_cu_seqlens_q(cu_seqlens_q: ArraySpec | None, num_q_tokens: int, num_seqs: int) -> None:
    if cu_seqlens_q is not None:
        _check_vector("cu_seqlens_q", cu_seqlens_q, ("int32",), "num_seqs + 1", num_seqs + 1)
    elif num_q_tokens != num_seqs:
        raise ValueError(
            f"expected one query per sequence, {num_seqs}, without cu_seqlens_q; got num_q_tokens={num_q_tokens}. "
            "Pass cu_seqlens_q, int32 [num_seqs + 1], to say which queries belong to which sequence"
        )


def _check_vector(name: str, spec: ArraySpec, dtypes: tuple[str, ...], size_name: str, size: int | None = None) -> None:
    _check_dtype(name, spec, dtypes)
    _check_shape(name, spec, {size_name: size})
    _check_contiguous(name, spec)


def _check_dtype(name: str, spec: ArraySpec, dtypes: tuple[str, ...], way_out: str = "Cast it first") -> None:
    if spec.dtype not in dtypes:
        raise TypeError(f"expected {name} of dtype {_either(dtypes)}; got {spec.dtype}. {way_out}")


def _check_shape(name: str, spec: ArraySpec, sizes: dict[str, int | None]) -> None:
    """Check the shape against named sizes; None stands for any size."""
    agrees = len(spec.shape) == len(sizes) and all(
        want is None or want == got for want, got in zip(sizes.values(), spec.shape, strict=True)
    )
    if not agrees:
        wanted = ", ".join(size if want is None else f"{size}={want}" for size, want in sizes.items())
        raise ValueError(f"expected {name} of shape [{wanted}]; got {list(spec.shape)}")


def _check_rows_contiguous(name: str, spec: ArraySpec) -> None:
    if spec.strides[-1] != 1 and 0 not in spec.shape:
        raise ValueError(
            f"expected {name} with a contiguous last axis, stride 1; got strides {spec.strides}. "
            f"Pass {name}.contiguous() or a copy in that order"
        )


def _check_contiguous(name: str, spec: ArraySpec) -> None:
    if not _is_contiguous(spec.shape, spec.strides):
        raise ValueError(
            f"expected {name} to be contiguous; got shape {list(spec.shape)} with strides {spec.strides}. "
            f"Pass {name}.contiguous() or a copy in row-major order"
        )


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Row-major without gaps. Strides of axes of size 1, and of arrays without elements, mean nothing."""
    if 0 in shape:
        return True
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"expected {name} to be True or False; got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless ``value`` is None or a Python integer from 1."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"expected {name} to be None or a Python integer; got {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"expected {name} to be None or an integer from 1; got {value!r}")


def _check_number(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"expected {name} to be None or a Python number; got {value!r} ({type(value).__name__})")
    if not math.isfinite(value):
        raise ValueError(f"expected {name} to be finite; got {value!r}")


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(names)
