"""Codes as float16, a word of four at a time: what `kvq_core.kernels.codec.decode_bytes` does with bytes."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvq_core.kernels.codec import E4M3_WORD_PTX, INT8_WORD_PTX


@gluon.jit
def decode_words(words, MODE: gl.constexpr):
    """Words of four codes [rows, n] to words of two float16 each [rows, 2 n], exactly."""
    PTX: gl.constexpr = INT8_WORD_PTX if MODE == "int8_per_token_head" else E4M3_WORD_PTX
    low, high = gl.inline_asm_elementwise(PTX, "=r,=r,r", [words], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)
    return gl.reshape(gl.join(low, high), [words.shape[0], 2 * words.shape[1]])
