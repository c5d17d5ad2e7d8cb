"""Codes as float16, a word of four at a time; byte for byte `kvq_core.kernels.codec.decode_bytes`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def decode_words(words, MODE: gl.constexpr):
    """Words of four codes [rows, n] to words of two float16 each [rows, 2 n], exactly."""
    if MODE == "int8_per_token_head":  # (byte ^ 0x80) | 0x6400 is 1152 + x
        low, high = gl.inline_asm_elementwise(
            """
            {
            .reg .b32 biased, a, b, bias;
            mov.b32 bias, 0x64806480;
            xor.b32 biased, $2, 0x80808080;
            prmt.b32 a, biased, 0x64646464, 0x4140;
            prmt.b32 b, biased, 0x64646464, 0x4342;
            sub.f16x2 $0, a, bias;
            sub.f16x2 $1, b, bias;
            }
            """,
            "=r,=r,r",
            [words],
            dtype=(gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        low, high = gl.inline_asm_elementwise(
            """
            {
            .reg .b16 a, b;
            mov.b32 {a, b}, $2;
            cvt.rn.f16x2.e4m3x2 $0, a;
            cvt.rn.f16x2.e4m3x2 $1, b;
            }
            """,
            "=r,=r,r",
            [words],
            dtype=(gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
    return gl.reshape(gl.join(low, high), [words.shape[0], 2 * words.shape[1]])
