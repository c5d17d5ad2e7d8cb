"""One step of the online softmax over a tile [KEYS, heads]. Maxima are held less S.p_shift: see `AttentionSpec`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from kvq_core.kernels.attend import MIN_SCALE
from kvq_core.kernels.codec import approximate_log2, approximate_reciprocal
from kvq_core.kernels.groups.columns.shared import dot_layout
from kvq_core.kernels.groups.line import KEYS, LAZY

LOWEST = gl.constexpr(-3.4028234663852886e38)  # -inf would make NaN of a difference
IN_EVERY_THREAD = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))


@gluon.jit
def log2_scores(dots, left, bufs, stage, S: gl.constexpr):
    """Exponents of the probabilities, times their row scales, of a tile of which ``left`` keys exist.

    ``dots``: of `scores`, with row scales.
    """
    DOT: gl.constexpr = dot_layout(S)
    TOKENS: gl.constexpr = gl.SliceLayout(1, DOT)
    CAPS: gl.constexpr = S.records.caps
    factor = bufs.factor.load(gl.SliceLayout(0, DOT))
    if S.records.v.per_token_head:
        scale = bufs.scales.index(stage).load(TOKENS)
        log2 = approximate_log2(gl.maximum(scale, MIN_SCALE), CAPS)  # of a NaN and a number, the number
    x, _ = warpgroup_mma_wait(0, deps=dots)
    if S.records.v.per_token_head:
        x = gl.fma(x, factor[None, :], log2[:, None])
    else:
        x = x * factor[None, :]
    # This also keeps the product apart from the subtraction of a maximum: of one multiply-add and a maximum of rounded
    # products, huge scores would differ by more than float16 can hold the power of.
    if left < KEYS:
        x = gl.where((gl.arange(0, KEYS, layout=TOKENS) < left)[:, None], x, float("-inf"))
    return x


@gluon.jit
def has_to_raise(x, m, S: gl.constexpr):
    """Whether a score is so far above a maximum that its probability would not be finite in float16."""
    low, high = _split_keys(x)
    largest = gl.maximum(low, high)
    # Heads of one thread come last: 2 of every 8. What is left are the threads of each warp.
    z = gl.reshape(largest - _of_thread(m, largest), [4, 8, x.shape[1] // 8, 4, 2])
    z = gl.reshape(gl.permute(z, (0, 1, 3, 2, 4)), [4, 32, x.shape[1] // 4])
    is_far = (gl.max(z, 2) > LAZY + S.p_shift).to(gl.int32)
    return gl.max(gl.convert_layout(gl.max(is_far, 1), IN_EVERY_THREAD), 0) != 0


@gluon.jit
def raise_maxima(x, m, S: gl.constexpr):
    """New maxima, and what that scales older sums by.

    By the differences whose powers are taken: of huge scores, sums round, and float16 would overflow.
    """
    largest = gl.max(x, 0)
    m_new = gl.where(largest - m > LAZY + S.p_shift, largest - S.p_shift, m)
    return m_new, gl.exp2(m - m_new)


@gluon.jit
def add_probabilities(l, p, bufs, stage, S: gl.constexpr):
    """Add probabilities, without their row scales, to the sums of each thread [KEYS / 2, heads]."""
    CAPS: gl.constexpr = S.records.caps
    low, high = _split_keys(p)
    if S.records.v.per_token_head:
        scale = bufs.scales.index(stage).load(gl.SliceLayout(1, dot_layout(S)))
        _, inverse = gl.broadcast(p, approximate_reciprocal(gl.maximum(scale, MIN_SCALE), CAPS)[:, None])
        inverse_low, inverse_high = _split_keys(inverse)
        l = gl.fma(low, inverse_low, gl.fma(high, inverse_high, l))
    else:
        l += low + high
    return l


@gluon.jit
def no_probabilities(S: gl.constexpr):
    """Sums of each thread to begin with."""
    HEADS: gl.constexpr = S.rows
    DOT: gl.constexpr = dot_layout(S)
    low, _ = _split_keys(gl.zeros([KEYS, HEADS], gl.float32, DOT))
    return low


@gluon.jit
def scale_probabilities(l, alpha):
    """Sums of each thread times a factor for every head."""
    return l * _of_thread(alpha, l)


@gluon.jit
def scale_chunks(acc, alpha, COUNT: gl.constexpr):
    """Sums of chunks times a factor for every head."""
    scaled = ()
    for i in gl.static_range(COUNT):
        scaled = scaled + (acc[i] * alpha[None, :],)
    return scaled


@gluon.jit
def _split_keys(x):
    """The two keys that a thread has of every 16: [KEYS, heads] as two of [KEYS / 2, heads]."""
    y = gl.permute(gl.reshape(x, [4, 2, 8, x.shape[1]]), (0, 2, 3, 1))
    low, high = gl.split(y)
    return gl.reshape(low, [32, x.shape[1]]), gl.reshape(high, [32, x.shape[1]])


@gluon.jit
def _of_thread(x, like):
    """A vector of the heads as a row of what `_split_keys` gives."""
    return gl.convert_layout(x, gl.SliceLayout(0, like.type.layout), assert_trivial=True)[None, :]
