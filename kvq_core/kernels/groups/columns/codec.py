"""Codes in shared memory as left operands of dots, decoded in registers.

A register of a left operand holds two neighbouring columns of a row, and a thread the columns 2t, 2t + 1, 2t + 8 and
2t + 9 of 16. Columns of the scores' dots may be in any order that queries have, too: codes that lie together are
taken for these. So a thread loads 16 bytes at once, and each word of them becomes two registers.

The values' dots want two keys in a register. Of pairs of neighbouring codes ``ldmatrix`` brings those of two keys into
one register, which becomes one of the lower and one of the upper codes. Rows of the dots may be in any order that
results have, too: the codes of a pair are taken for rows 8 apart, which a thread has.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvq_core.kernels.codec import decode_bytes, decode_pairs
from kvq_core.kernels.groups.columns.shared import CHUNK, KEYS, RANK, ROPE, dot_layout

# Bits of an address in a row of codes, from the lowest: 4 in a piece of 16 bytes, 3 of the piece, exchanged by those of
# the row, 2 more. The columns that they stand for in the dots: a pair, two registers, two steps of 16, a third, two of
# the thread, two steps. `in_order_of_codes` puts queries into this order.
K_VIEW = gl.constexpr(
    gl.SharedLinearLayout(
        [[0, 1], [0, 8], [0, 16], [0, 32], [0, 64], [0, 2], [0, 4], [0, 128], [0, 256]]
        + [[1, 64], [2, 2], [4, 4], [8, 0], [16, 0], [32, 0]]
    )
)
ROPE_VIEW = gl.constexpr(
    gl.SharedLinearLayout(
        [[0, 1], [0, 8], [0, 16], [0, 32], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [8, 0], [16, 0], [32, 0]]
    )
)
K_LOADED = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 8], [0, 16], [0, 32], [8, 0]],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 64],
    )
)
# Pairs of codes [pair, key].
V_VIEW = gl.constexpr(
    gl.SharedLinearLayout(
        [[1, 0], [2, 0], [4, 0], [8, 0], [16, 0], [32, 0], [64, 0], [128, 0]]
        + [[8, 1], [16, 2], [32, 4], [0, 8], [0, 16], [0, 32]]
    )
)


@gluon.constexpr_function
def v_loaded(keys):
    """What `load_v` loads: pairs of codes of a chunk and of 32 or 64 keys."""
    assert keys in (KEYS // 2, KEYS)
    reg_bases = [[0, 1], [0, 8], [0, 16], [0, 32]]
    return gl.DistributedLinearLayout(
        reg_bases=reg_bases if keys == KEYS else reg_bases[:3],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[8, 0], [16, 0]],
        block_bases=[],
        shape=[CHUNK // 2, keys],
    )


@gluon.constexpr_function
def _left_operand(S):
    return gl.DotOperandLayout(0, dot_layout(S), 2)


@gluon.jit
def in_order_of_codes(x, IS_ROPE: gl.constexpr):
    """Queries [rows, columns] with their columns in the order of `K_VIEW`, or `ROPE_VIEW`."""
    if IS_ROPE:
        y = gl.permute(gl.reshape(x, [x.shape[0], 4, 4, 2, 2]), (0, 2, 3, 1, 4))
    else:
        y = gl.permute(gl.reshape(x, [x.shape[0], 4, 4, 2, 4, 2, 2]), (0, 1, 3, 4, 5, 2, 6))
    return gl.reshape(y, [x.shape[0], x.shape[1]])


@gluon.jit
def in_order_of_columns(x):
    """Sums [CHUNK, heads] with their rows in the order of the output's columns."""
    y = gl.permute(gl.reshape(x, [4, 2, 8, x.shape[1]]), (0, 2, 1, 3))
    return gl.reshape(y, [x.shape[0], x.shape[1]])


@gluon.jit
def load_k(tile, CHUNK_INDEX: gl.constexpr):
    """Codes of a chunk of the latents of a tile [KEYS, CHUNK]."""
    view = tile._reinterpret(gl.int8, [KEYS, RANK], K_VIEW)
    return view.slice(CHUNK_INDEX * CHUNK, CHUNK, 1).load(K_LOADED)


@gluon.jit
def load_v(tile, CHUNK_INDEX: gl.constexpr, PART: gl.constexpr, SIZE: gl.constexpr):
    """Pairs of codes of a chunk, of a part of the keys [CHUNK / 2, SIZE]."""
    view = tile._reinterpret(gl.int16, [RANK // 2, KEYS], V_VIEW)
    return view.slice(CHUNK_INDEX * (CHUNK // 2), CHUNK // 2, 0).slice(PART * SIZE, SIZE, 1).load(v_loaded(SIZE))


@gluon.jit
def load_rope(tile, S: gl.constexpr):
    """Rope parts of a tile as a left operand [KEYS, ROPE]."""
    MODE: gl.constexpr = S.records.k.mode
    if MODE == "bfloat16":
        VIEW: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])  # shared.CODES, of elements
        operand = tile._reinterpret(gl.bfloat16, [KEYS, ROPE], VIEW).load(_left_operand(S))
    else:
        operand = decode_k(tile._reinterpret(gl.int8, [KEYS, ROPE], ROPE_VIEW).load(K_LOADED), MODE, S)
    return operand


@gluon.jit
def split_columns(x):
    """The lower and the upper half of the columns of codes."""
    return gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@gluon.jit
def decode_k(codes, MODE: gl.constexpr, S: gl.constexpr):
    """Codes of keys as a left operand of scores."""
    CAPS: gl.constexpr = S.records.caps
    return gl.convert_layout(decode_bytes(codes, MODE, CAPS), _left_operand(S), assert_trivial=True)


@gluon.jit
def decode_v(pairs, S: gl.constexpr):
    """Pairs of codes of values [n / 2, keys] as a left operand of sums [n, keys]."""
    MODE: gl.constexpr = S.records.v.mode
    CAPS: gl.constexpr = S.records.caps
    even, odd = decode_pairs(pairs, MODE, CAPS)
    both = gl.permute(gl.reshape(gl.join(even, odd), [4, 8, pairs.shape[1], 2]), (0, 3, 1, 2))
    operand = gl.reshape(both, [2 * pairs.shape[0], pairs.shape[1]])
    return gl.convert_layout(operand, _left_operand(S), assert_trivial=True)
