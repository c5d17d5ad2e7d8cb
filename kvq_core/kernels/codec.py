"""Device half of the codecs: rows to codes and back. The host half, with the same names, is `kvq_core.codec`.

Every format has a portable form of integer and plain float operations, right under the Triton interpreter and on every
GPU. Where ``CAPS`` allows, inline PTX or the hardware cast takes its place with the same results, bit for bit:
``"portable"`` no PTX, ``"ptx"`` sm_80 and later, ``"ptx_fp8"`` sm_89 and later (float8 casts in hardware).

Kernels that encode are launched with ``enable_fp_fusion=False``: a multiplication contracted with the addition that
rounds it would round once instead of twice.
"""

import triton
import triton.language as tl


@triton.jit
def encode_rows(x, tensor_scale_ptr, MODE: tl.constexpr, CAPS: tl.constexpr):
    """Encode rows [rows, dim] of bfloat16, float16 or float32: codes as unsigned integers, and the row scales."""
    row_scales = tl.zeros([x.shape[0]], tl.float32)
    if MODE == "bfloat16" or MODE == "float16" or MODE == "float32":
        codes = cast_bits(x, MODE)
    elif MODE == "fp8_e4m3" or MODE == "fp8_e5m2":
        inv = tl.div_rn(1.0, tl.load(tensor_scale_ptr))
        codes = encode_per_tensor(to_float32(x), inv, MODE, CAPS)
    else:
        codes, row_scales = encode_per_token_head(to_float32(x), MODE, CAPS)
    return codes, row_scales


@triton.jit
def encode_per_token_head(x, MODE: tl.constexpr, CAPS: tl.constexpr):
    # float32(1 / QMAX), the nearest float32 (the decimals below round to it).
    INV_QMAX: tl.constexpr = 0.007874015718698502 if MODE == "int8_per_token_head" else 0.0022321429569274187
    # On bit patterns the maximum is exact, free of order and keeps NaN (which is above infinity).
    absmax_bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    finite = absmax_bits < 0x7F800000
    absmax = tl.where(finite, absmax_bits, 0).to(tl.float32, bitcast=True)
    scale = tl.maximum(absmax * INV_QMAX, 1e-6)
    inv = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    # |y| exceeds QMAX by rounding errors at most, far from the next code, so the specification's clip changes nothing.
    y = x * inv[:, None]
    if MODE == "int8_per_token_head":
        codes = round_to_int8(y)
    else:
        codes = encode_float8(y, "e4m3", CAPS)
    codes = tl.where(finite[:, None], codes, tl.zeros_like(codes))
    nan = tl.full(scale.shape, 0x7FC00000, tl.int32).to(tl.float32, bitcast=True)
    return codes, tl.where(finite, scale, nan)


@triton.jit
def encode_per_tensor(x, inv, MODE: tl.constexpr, CAPS: tl.constexpr):
    """The element's code, or the NaN code where it is not finite."""
    QMAX: tl.constexpr = 448.0 if MODE == "fp8_e4m3" else 57344.0
    NAN_CODE: tl.constexpr = 0x7F if MODE == "fp8_e4m3" else 0x7E
    finite = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
    y = tl.where(finite, x, 0.0) * inv
    finite = finite & (y == y)  # a scale that has no finite reciprocal
    y = tl.minimum(tl.maximum(y, -QMAX), QMAX)
    codes = encode_float8(y, "e4m3" if MODE == "fp8_e4m3" else "e5m2", CAPS)
    return tl.where(finite, codes, tl.full(codes.shape, NAN_CODE, tl.uint8))


@triton.jit
def round_to_int8(y):
    """Round |y| < 127.5 to the nearest integer, ties to even: adding 1.5 * 2^23 leaves it in the low mantissa bits."""
    return ((y + 12582912.0).to(tl.int32, bitcast=True) & 0xFF).to(tl.uint8)


@triton.jit
def encode_float8(y, FORMAT: tl.constexpr, CAPS: tl.constexpr):
    """Round float32 to float8, ties to even; the bits as uint8. Only for finite |y| that round to finite codes."""
    if CAPS != "ptx_fp8":
        codes = encode_float8_portable(y, FORMAT)
    elif FORMAT == "e4m3":
        codes = _e4m3_codes_ptx(y)
    else:
        codes = _e5m2_codes_ptx(y)
    return codes


@triton.jit
def _e4m3_codes_ptx(y):
    """Not Triton's cast: on sm_89 that one goes through float16 and rounds twice."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b16 a, b;
        cvt.rn.satfinite.e4m3x2.f32 a, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 b, $4, $3;
        mov.b32 $0, {a, b};
        }
        """,
        "=r,r,r,r,r",
        [y],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _e5m2_codes_ptx(y):
    """As `_e4m3_codes_ptx`."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b16 a, b;
        cvt.rn.satfinite.e5m2x2.f32 a, $2, $1;
        cvt.rn.satfinite.e5m2x2.f32 b, $4, $3;
        mov.b32 $0, {a, b};
        }
        """,
        "=r,r,r,r,r",
        [y],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def encode_float8_portable(y, FORMAT: tl.constexpr):
    DROPPED: tl.constexpr = 20 if FORMAT == "e4m3" else 21  # mantissa bits that float8 does not have
    BIAS_SHIFT: tl.constexpr = (127 - 7) * 8 if FORMAT == "e4m3" else (127 - 15) * 4
    MIN_NORMAL_BITS: tl.constexpr = (127 - 6) << 23 if FORMAT == "e4m3" else (127 - 14) << 23
    # The float32 whose last mantissa bit weighs as much as the smallest float8 subnormal: 2^-9 or 2^-16.
    MAGIC: tl.constexpr = 16384.0 if FORMAT == "e4m3" else 128.0
    MAGIC_BITS: tl.constexpr = (127 + 14) << 23 if FORMAT == "e4m3" else (127 + 7) << 23
    bits = y.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rounded = magnitude + ((1 << (DROPPED - 1)) - 1) + ((magnitude >> DROPPED) & 1)
    normal = (rounded >> DROPPED) - BIAS_SHIFT
    subnormal = (magnitude.to(tl.float32, bitcast=True) + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS
    code = tl.where(magnitude < MIN_NORMAL_BITS, subnormal, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def cast_bits(x, DTYPE: tl.constexpr):
    """The bits of x in DTYPE: a bit copy of the same dtype, else one rounding with NaN made canonical."""
    if DTYPE == "bfloat16":
        bits = x.to(tl.uint16, bitcast=True) if x.dtype == tl.bfloat16 else bfloat16_bits(to_float32(x))
    elif DTYPE == "float16":
        bits = x.to(tl.uint16, bitcast=True) if x.dtype == tl.float16 else float16_bits(to_float32(x))
    else:
        bits = x.to(tl.uint32, bitcast=True) if x.dtype == tl.float32 else float32_bits(to_float32(x))
    return bits


@triton.jit
def to_float32(x):
    """x in float32, exactly. The interpreter's own cast of bfloat16 changes subnormals."""
    if x.dtype == tl.bfloat16:
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def round_for(ptr, x, CAPS: tl.constexpr):
    """float32 x as ``ptr`` stores it. The interpreter's own cast to bfloat16 truncates."""
    if CAPS == "portable" and ptr.dtype.element_ty == tl.bfloat16:
        y = bfloat16_bits(x).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(ptr.dtype.element_ty)
    return y


@triton.jit
def bfloat16_bits(x):
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return (tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded) & 0xFFFF).to(tl.uint16)


@triton.jit
def float16_bits(x):
    is_nan = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) > 0x7F800000
    # 65520 is the least float32 that rounds to infinity; the clip keeps the sign and spares a cast that overflows.
    overflow = tl.abs(x) >= 65520.0
    safe = tl.where(is_nan | overflow, 0.0, x).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
    infinity = 0x7C00 | ((x.to(tl.int32, bitcast=True) >> 16) & 0x8000)
    return tl.where(is_nan, 0x7E00, tl.where(overflow, infinity, safe)).to(tl.uint16)


@triton.jit
def float32_bits(x):
    bits = x.to(tl.int32, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits).to(tl.uint32, bitcast=True)


@triton.jit
def decode_bytes(codes, MODE: tl.constexpr, CAPS: tl.constexpr):
    """uint8 codes of an 8-bit mode to float16, exactly."""
    if MODE == "int8_per_token_head":
        if CAPS == "portable":
            values = codes.to(tl.int8, bitcast=True).to(tl.float16)
        else:
            values = _convert_bytes(codes, _INT8_WORD_PTX)
    elif MODE == "fp8_e5m2":
        values = (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True)  # float16 with the mantissa cut to two bits
    elif CAPS == "ptx_fp8":
        values = _convert_bytes(codes, _E4M3_WORD_PTX)
    else:
        values = _e4m3_bytes_portable(codes)
    return values


@triton.jit
def decode_pairs(pairs, MODE: tl.constexpr, CAPS: tl.constexpr):
    """int16, each two neighbouring codes of one row, to two float16 tensors: the lower bytes and the upper, exactly."""
    if MODE == "int8_per_token_head" and CAPS != "portable":
        values = _convert_pairs(pairs, _INT8_PAIRS_PTX)
    elif MODE == "fp8_e5m2" and CAPS != "portable":
        values = _convert_pairs(pairs, _E5M2_PAIRS_PTX)
    elif MODE != "int8_per_token_head" and CAPS == "ptx_fp8":
        values = _convert_pairs(pairs, _E4M3_PAIRS_PTX)
    else:
        values = (
            decode_bytes((pairs & 0xFF).to(tl.uint8), MODE, CAPS),
            decode_bytes(((pairs >> 8) & 0xFF).to(tl.uint8), MODE, CAPS),
        )
    return values


@triton.jit
def approximate_log2(x, CAPS: tl.constexpr):
    """log2 of normal positive numbers to about 2^-22 absolutely: one instruction, where tl.log2 takes a dozen."""
    if CAPS == "portable":
        y = tl.log2(x)
    else:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def approximate_reciprocal(x, CAPS: tl.constexpr):
    """1 / x of normal numbers to one unit in the last place."""
    if CAPS == "portable":
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def _e4m3_bytes_portable(codes):
    """Seven bits moved to float16's exponent and mantissa are the value times 2^-8."""
    bits = codes.to(tl.uint16)
    values = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), values).to(tl.float16)


@triton.constexpr_function
def bias_of(MODE, CAPS, OPERAND):
    """What `decode_biased` adds to every value."""
    is_biased = MODE == "int8_per_token_head" and CAPS != "portable" and OPERAND == "float16"
    return 1152.0 if is_biased else 0.0


@triton.jit
def decode_biased(codes, MODE: tl.constexpr, CAPS: tl.constexpr, OPERAND: tl.constexpr):
    """`decode_bytes` plus `bias_of`: (byte ^ 0x80) | 0x6400 is the float16 1152 + x, and the subtraction can wait."""
    if bias_of(MODE, CAPS, OPERAND) == 0.0:
        values = decode_bytes(codes, MODE, CAPS)
    else:
        values = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t;
            xor.b32 t, $2, 0x80808080;
            prmt.b32 $0, t, 0x64646464, 0x4140;
            prmt.b32 $1, t, 0x64646464, 0x4342;
            }
            """,
            "=&r,=r,r",
            [codes],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    return values


@triton.jit
def decode_biased_pairs(pairs, MODE: tl.constexpr, CAPS: tl.constexpr, OPERAND: tl.constexpr):
    """`decode_pairs` plus `bias_of`."""
    if bias_of(MODE, CAPS, OPERAND) == 0.0:
        values = decode_pairs(pairs, MODE, CAPS)
    else:
        values = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t;
            xor.b32 t, $2, 0x80808080;
            prmt.b32 $0, t, 0x64646464, 0x4240;
            prmt.b32 $1, t, 0x64646464, 0x4341;
            }
            """,
            "=&r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return values


# A register of four codes, $2, to two of two float16 each. (byte ^ 0x80) | 0x6400 is the float16 1152 + x.
_INT8_WORD_PTX = tl.constexpr(
    """
        {
        .reg .b32 t, a, b, c;
        mov.b32 c, 0x64806480;
        xor.b32 t, $2, 0x80808080;
        prmt.b32 a, t, 0x64646464, 0x4140;
        prmt.b32 b, t, 0x64646464, 0x4342;
        sub.f16x2 $0, a, c;
        sub.f16x2 $1, b, c;
        }
        """
)
_E4M3_WORD_PTX = tl.constexpr(
    """
        {
        .reg .b16 a, b;
        mov.b32 {a, b}, $2;
        cvt.rn.f16x2.e4m3x2 $0, a;
        cvt.rn.f16x2.e4m3x2 $1, b;
        }
        """
)
# As above, of the pairs of two rows at a time: a result register holds one byte of each row.
_INT8_PAIRS_PTX = tl.constexpr(
    """
        {
        .reg .b32 t, a, b, c;
        mov.b32 c, 0x64806480;
        xor.b32 t, $2, 0x80808080;
        prmt.b32 a, t, 0x64646464, 0x4240;
        prmt.b32 b, t, 0x64646464, 0x4341;
        sub.f16x2 $0, a, c;
        sub.f16x2 $1, b, c;
        }
        """
)
_E4M3_PAIRS_PTX = tl.constexpr(
    """
        {
        .reg .b32 t;
        .reg .b16 a, b;
        prmt.b32 t, $2, 0, 0x3120;
        mov.b32 {a, b}, t;
        cvt.rn.f16x2.e4m3x2 $0, a;
        cvt.rn.f16x2.e4m3x2 $1, b;
        }
        """
)
# A byte in the upper half of a float16 is its value.
_E5M2_PAIRS_PTX = tl.constexpr(
    """
        prmt.b32 $0, $2, 0, 0x2404;
        prmt.b32 $1, $2, 0, 0x3414;
        """
)


@triton.jit
def _convert_bytes(codes, PTX: tl.constexpr):
    return tl.inline_asm_elementwise(PTX, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def _convert_pairs(pairs, PTX: tl.constexpr):
    HALVES: tl.constexpr = (tl.float16, tl.float16)
    return tl.inline_asm_elementwise(PTX, "=&r,=r,r", [pairs], dtype=HALVES, is_pure=True, pack=2)
