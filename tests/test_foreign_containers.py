"""The containers of vLLM (0.26 and later), in each of its orders in memory, are read and written where they lie.

An order names the axes of the tensor that holds all layers, the outermost first: L layers, B pages, H heads, N slots,
C bytes of a row. vLLM hands out every layer as a view ``[B, H, N, C]`` of it.
"""

from __future__ import annotations

import numpy as np
import pytest

from kvq_core import reference
from kvq_core.arguments import ArraySpec
from kvq_core.codec import encode_rows
from kvq_core.plan.launch import DeviceFacts, pool_spec
from tests import backends, cases
from tests import inputs as make
from tests.case_types import AttentionCase, AttentionInputs
from tests.compare import Attention, assert_no_worse_than_naive, assert_same_bytes
from tests.naive import naive_attention

ORDERS = {
    "LBHNC": cases.INT8,
    "LBNHC": cases.FP8,
    "LHBNC": cases.INT8,
    "BLHNC": cases.FP8,
    "BLNHC": cases.INT8,
    "BHLNC": cases.FP8,
}
DIM, PAGE_SIZE, NUM_KV_HEADS, NUM_PAGES, NUM_LAYERS, LAYER = 64, 8, 2, 9, 3, 1
SIZES = {"L": NUM_LAYERS, "B": NUM_PAGES, "H": NUM_KV_HEADS, "N": PAGE_SIZE, "C": 2 * (DIM + 4)}
PAGE_TABLE = np.array([[7, 2, 5], [0, 3, -1]], np.int32)
SEQ_LENS = np.array([21, 9], np.int32)
SLOTS = np.concatenate([PAGE_TABLE[seq, t // 8] * 8 + t % 8 for seq, n in enumerate(SEQ_LENS) for t in [np.arange(n)]])

on_orders = pytest.mark.parametrize("order", ORDERS)


def layout_of(order, rows="HND"):
    return cases.layout_of(ORDERS[order], PAGE_SIZE, NUM_KV_HEADS, DIM, rows=rows)


def container(order):
    """A poisoned tensor in ``order``, as a view ``[L, B, H, N, C]``."""
    tensor = np.full([SIZES[axis] for axis in order], make.POISON, np.uint8)
    return tensor.transpose([order.index(axis) for axis in "LBHNC"])


def tokens(name):
    """K and V of all sequences."""
    rng = make.generator(name)
    return [make.random_rows(rng, (len(SLOTS), NUM_KV_HEADS, DIM), "bfloat16", (-2, 2)) for _ in "kv"]


def filled(order):
    """A container whose layer LAYER the reference wrote."""
    whole = container(order)
    reference.append_kv(layout_of(order), whole[LAYER], *tokens(order), SLOTS)
    return whole


@on_orders
def test_the_reference_writes_the_rows_of_vllm_and_no_other_layer(order):
    k, v = (encode_rows(x, layout_of(order).k_mode) for x in tokens(order))
    want = container(order)
    fields = [x.view(np.uint8) for x in (k[0], k[1][..., None], v[0], v[1][..., None])]
    want[LAYER, SLOTS // PAGE_SIZE, :, SLOTS % PAGE_SIZE] = np.concatenate(fields, axis=-1)
    assert_same_bytes(filled(order), want)


def as_pool(backend, order, whole):
    """Layout, pages and page table with which ``backend`` sees layer LAYER of ``whole``."""
    if backend.takes_strides:
        return layout_of(order), whole[LAYER], PAGE_TABLE
    if order.index("H") < order.index("B") or order == "BHLNC":
        pytest.skip("JAX arrays are dense: the heads of a page are apart")
    layout = layout_of(order, rows="HND" if order.endswith("HNC") else "NHD")
    tensor = whole.transpose(["LBHNC".index(axis) for axis in order])
    if order[0] == "L":
        return layout, tensor[LAYER], PAGE_TABLE
    pool = tensor.reshape(-1, *tensor.shape[2:])
    return layout, pool, np.where(PAGE_TABLE < 0, -1, PAGE_TABLE * NUM_LAYERS + LAYER).astype(np.int32)


@on_orders
@backends.parametrize_backends
def test_every_backend_reads_the_container_in_place(backend, order):
    whole = filled(order)
    layout, pages, page_table = as_pool(backend, order, whole)
    got = backend.gather(layout, pages, page_table, SEQ_LENS, "float32", (1.0, 1.0))
    for side, want in zip(got, reference.gather_kv(layout_of(order), whole[LAYER], PAGE_TABLE, SEQ_LENS), strict=True):
        assert_same_bytes(side, want)
    case = AttentionCase(order, layout, ((3, 21), (1, 9)), ragged=True, max_seqlen_q=3)
    q = make.random_rows(make.generator(order), (4, 2 * NUM_KV_HEADS, DIM), "bfloat16", (0, 0))
    none = {"sinks": None, "alibi_slopes": None, "k_scale": 1.0, "v_scale": 1.0}
    inputs = AttentionInputs(q, pages, page_table, SEQ_LENS, np.array([0, 3, 4], np.int32), **none)
    got, exact = (b.attention(layout, inputs, case.options()) for b in (backend, backends.NUMPY))
    assert_no_worse_than_naive(got, exact, Attention(*naive_attention(case, inputs)))


@pytest.mark.parametrize(("slot_stride", "is_wide"), [(2**27, False), (2**28, True)])
def test_slots_further_apart_than_an_int32_counts_are_addressed_with_64_bits(slot_stride, is_wide):
    row = SIZES["C"]
    pages = ArraySpec("uint8", (9, 2, 8, row), (2 * row, row, slot_stride, 1))
    records = pool_spec(layout_of("LBHNC"), pages, DeviceFacts("cuda", 90, 132))
    assert (records.k.is_wide, records.v.is_wide) == (is_wide, is_wide)


HEADER, LAYER_BYTES = 12, PAGE_SIZE * NUM_KV_HEADS * 2 * (DIM + 4)


def layers_of_padded_pages(buffer):
    """Layers ``[B, H, N, C]`` that share ``buffer [B, stride]``: slots before heads, bytes before and behind a page."""
    row = SIZES["C"]
    strides = (buffer.strides[0], row, NUM_KV_HEADS * row, 1)
    shape = (NUM_PAGES, NUM_KV_HEADS, PAGE_SIZE, row)
    return [np.ndarray(shape, np.uint8, buffer, HEADER + i * LAYER_BYTES, strides) for i in range(NUM_LAYERS)]


@backends.parametrize_backends
def test_layers_that_share_padded_pages_are_written_and_read_beside_each_other(backend):
    if not backend.takes_strides:
        pytest.skip("JAX arrays are dense: there is nothing between pages")
    layout = layout_of("BLNHC")
    buffers = [np.full((NUM_PAGES, HEADER + NUM_LAYERS * LAYER_BYTES + 8), make.POISON, np.uint8) for _ in range(2)]
    for layer in range(NUM_LAYERS):
        k, v = tokens(f"layer {layer}")
        reference.append_kv(layout, layers_of_padded_pages(buffers[1])[layer], k, v, SLOTS)
        got = backend.append(layout, layers_of_padded_pages(buffers[0])[layer], k, v, SLOTS, (1.0, 1.0))
        buffers[0] = make.root(got).reshape(buffers[1].shape)
    assert_same_bytes(*buffers)
    got = backend.copy_pages(layout, layers_of_padded_pages(buffers[0])[2], np.array([7]), np.array([1]))
    reference.copy_pages(layers_of_padded_pages(buffers[1])[2], np.array([7]), np.array([1]))
    assert_same_bytes(make.root(got).reshape(buffers[1].shape), buffers[1])
    args = (PAGE_TABLE, SEQ_LENS, "bfloat16", (1.0, 1.0))
    for pages in layers_of_padded_pages(buffers[0]):
        for side, want in zip(*(b.gather(layout, pages, *args) for b in (backend, backends.NUMPY)), strict=True):
            assert_same_bytes(side, want)
