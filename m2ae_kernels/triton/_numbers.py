"""Numbers as the contrastive losses need them in Triton; without libdevice, which not all have."""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))


@triton.jit
def finite_or_zero(top):
    """A maximum to subtract from what it is the maximum of: inf - inf would be NaN."""
    return tl.where(tl.abs(top) == INF, 0.0, top)


@triton.jit
def log_of(total, exponent):
    """log(total * 2**exponent) in float64, for total >= 0; as if right in float32 and better.

    A fast logarithm errs by a share of its result: of the mantissa's that is nothing.
    """
    bits = total.to(tl.int32, bitcast=True)
    fraction = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    power = ((bits >> 23) - 127).to(tl.float64) + exponent.to(tl.float64)
    # 0, inf and NaN are their own kind; subnormals have few digits anyway.
    is_normal = (total >= 1.1754944e-38) & (total < INF)
    rest = tl.where(is_normal, power, exponent.to(tl.float64))
    return (tl.log2(tl.where(is_normal, fraction, total)).to(tl.float64) + rest) * LN2


@triton.jit
def exp_of(x):
    """exp(x), right to the last digits of float32 for any float32 x <= 0, and 0 below its range."""
    power = tl.where(x < -200.0, -200.0, x).to(tl.float64) * LOG2E  # NaN stays
    whole = tl.floor(power)
    return tl.exp2((power - whole).to(tl.float32)) * tl.exp2(whole.to(tl.float32))


@triton.jit
def exp_of_minus(x, INTERPRETED: tl.constexpr):
    """exp(-x) for x >= 0, right to the last digits of float32, in a few instructions.

    What the exponent to base 2 loses in rounding, a fused multiply-add finds again; the interpreter
    has none, and takes float64.
    """
    x = tl.minimum(x, 126.0, propagate_nan=tl.PropagateNan.ALL)  # exp(-126) is 0
    power = x * LOG2E
    if INTERPRETED:
        lost = (x.to(tl.float64) - power.to(tl.float64) * LN2).to(tl.float32)
    else:
        lost = tl.fma(power, -0.693147182464599609375, x)
        lost = tl.fma(power, 1.904654299957767878541e-9, lost)
    approximate = tl.exp2(-power)
    return approximate - approximate * lost


@triton.jit
def log1p_exp(x):
    """log(1 + exp(x)), with all digits also where it is small."""
    small = exp_of(-tl.abs(x))
    # log(1 + a) = 2 atanh(a / (2 + a)); a <= 1, so nine terms leave less than 1e-9.
    z = small / (2.0 + small)
    square = z * z
    series = 1.0 / 17.0
    for n in tl.static_range(15, 0, -2):
        series = series * square + 1.0 / n
    return tl.maximum(x, 0.0) + 2.0 * z * series


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), with all digits also where it is small."""
    small = exp_of(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1.0 + small)


@triton.jit
def power_of_two(x):
    """The power of two in a float32 x > 0: x = power * mantissa."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def mantissa(x):
    """In [1, 2)."""
    return ((x.to(tl.int32, bitcast=True) & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def ordered_bits(x):
    """int32 in the order of the float32 x, for atomic maxima; its own inverse on the bits."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def from_ordered_bits(bits):
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def float32_of(x, INTERPRETED: tl.constexpr):
    """As float32. The interpreter computes with the bits of bfloat16, and loses subnormals."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def rounded_to(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """The float32 x in another dtype, to nearest; the interpreter cuts bfloat16 off instead."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
