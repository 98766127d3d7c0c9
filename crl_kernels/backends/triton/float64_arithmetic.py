"""Arithmetic as good as float64, also on GPUs where float64 is slow; as in ``csrc/cuda/float64_arithmetic.cuh``.

With PAIRS, a number is a pair of float32, (high, low): their sum, or high where low is NaN. Without, it is a float64
tensor. Elements of the vectors ("plain") are float32, bfloat16 or float16 with PAIRS, and of any dtype without. Kernels
with PAIRS are compiled without fusing products with sums, which would round otherwise than is assumed here.
"""

import functools

import torch
import triton
import triton.language as tl

FAST_FLOAT64 = ((7, 0), (8, 0), (9, 0), (10, 0))  # compute capabilities of NVIDIA's data-centre GPUs
FAST_FLOAT64_AMD = ("gfx906", "gfx908", "gfx90a", "gfx94", "gfx95")  # beginnings of the names of AMD's

# Magnitudes between which what rounding cuts off products is within float32's exponents.
SMALLEST, LARGEST = tl.constexpr(2.0**-75), tl.constexpr(2.0**100)
BOUND = tl.constexpr(1e30)  # x / (1 + x) is 1 from there on


@functools.cache
def slow_float64(device: torch.device) -> bool:
    """Whether a GPU computes many times fewer float64 results than float32 ones."""
    if device.type == "cpu":
        return False
    if torch.version.hip is not None:
        return not torch.cuda.get_device_properties(device).gcnArchName.startswith(FAST_FLOAT64_AMD)
    return torch.cuda.get_device_capability(device) not in FAST_FLOAT64


@triton.jit
def exact_sum(a: tl.tensor, b: tl.tensor) -> tl.tuple:
    """A sum and what rounding has cut off."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


@triton.jit
def exact_product(a: tl.tensor, b: tl.tensor) -> tl.tuple:
    """A product and what rounding has cut off."""
    product = a * b
    return product, tl.fma(a, b, -product)


@triton.jit
def plus(a: tl.tuple, b: tl.tensor) -> tl.tuple:
    """A pair and one float32."""
    total, rest = exact_sum(a[0], b)
    return total, a[1] + rest


@triton.jit
def number(value: tl.tensor, PAIRS: tl.constexpr) -> tl.tuple:
    """Of a float64 scalar."""
    if PAIRS:
        high = value.to(tl.float32)
        low = (value - high.to(tl.float64)).to(tl.float32)
        result = (high, tl.where(tl.abs(high) == float("inf"), 0.0, low))
    else:
        result = value
    return result


@triton.jit
def difference(a: tl.tensor, b: tl.tensor, PAIRS: tl.constexpr) -> tl.tuple:
    """a - b of plain elements."""
    return exact_sum(a.to(tl.float32), -b.to(tl.float32)) if PAIRS else a.to(tl.float64) - b.to(tl.float64)


@triton.jit
def scaled(a: tl.tuple, b: tl.tensor, PAIRS: tl.constexpr) -> tl.tuple:
    """A number times plain elements."""
    if PAIRS:
        high, low = exact_product(a[0], b.to(tl.float32))
        result = (high, tl.fma(a[1], b.to(tl.float32), low))
    else:
        result = a * b.to(tl.float64)
    return result


@triton.jit
def product(a: tl.tuple, b: tl.tuple, PAIRS: tl.constexpr) -> tl.tuple:
    """Of two numbers."""
    if PAIRS:
        high, low = scaled(a, b[0], PAIRS)
        result = (high, tl.fma(a[0], b[1], low))
    else:
        result = a * b
    return result


@triton.jit
def added(a: tl.tuple, b: tl.tuple, PAIRS: tl.constexpr) -> tl.tuple:
    """The sum of two numbers."""
    if PAIRS:
        high, low = plus(a, b[0])
        result = (high, low + b[1])
    else:
        result = a + b
    return result


@triton.jit
def added_to(a: tl.tensor, b: tl.tuple, PAIRS: tl.constexpr) -> tl.tensor:
    """Plain elements plus a number."""
    return rounded(plus(b, a.to(tl.float32)), PAIRS) if PAIRS else a.to(tl.float64) + b


@triton.jit
def rounded(a: tl.tuple, PAIRS: tl.constexpr) -> tl.tensor:
    """To float32 with PAIRS; float64 without."""
    return tl.where(a[1] == a[1], a[0] + a[1], a[0]) if PAIRS else a


@triton.jit
def zero(BLOCK: tl.constexpr, PAIRS: tl.constexpr) -> tl.tuple:
    return (tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)) if PAIRS else tl.zeros([BLOCK], tl.float64)


@triton.jit
def _add(high: tl.tensor, low: tl.tensor, other_high: tl.tensor, other_low: tl.tensor) -> tl.tuple:
    total, rest = exact_sum(high, other_high)
    return total, rest + (low + other_low)


@triton.jit
def sum_of_products(high: tl.tensor, low: tl.tensor) -> tl.tuple:
    """(the sum of a chunk's pairs in float64, whether all products are within float32's exponents)."""
    largest = tl.max(tl.abs(high), axis=0)
    high, low = tl.reduce((high, low), 0, _add)
    return high.to(tl.float64) + low.to(tl.float64), (largest >= SMALLEST) & (largest <= LARGEST)


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, PAIRS: tl.constexpr) -> tl.tensor:
    """a . b of plain elements, in float64."""
    if PAIRS:
        high, low = exact_product(a.to(tl.float32), b.to(tl.float32))
        result, in_range = sum_of_products(high, low)
        if in_range == 0:
            result = tl.sum(a.to(tl.float64) * b.to(tl.float64), axis=0)
    else:
        result = tl.sum(a.to(tl.float64) * b.to(tl.float64), axis=0)
    return result


@triton.jit
def quadratic(s: tl.tensor, distance: tl.tuple, PAIRS: tl.constexpr) -> tl.tensor:
    """The sum of S distance^2, in float64."""
    if PAIRS:
        high, low = product(scaled(distance, s, PAIRS), distance, PAIRS)
        result, in_range = sum_of_products(high, low)
        if in_range == 0:
            wide = distance[0].to(tl.float64)
            wide += tl.where(distance[1] == distance[1], distance[1], 0.0).to(tl.float64)
            result = tl.sum(s.to(tl.float64) * wide * wide, axis=0)
    else:
        result = tl.sum(s.to(tl.float64) * distance * distance, axis=0)
    return result


@triton.jit
def where(condition: tl.tensor, a: tl.tuple, b: tl.tuple, PAIRS: tl.constexpr) -> tl.tuple:
    return (tl.where(condition, a[0], b[0]), tl.where(condition, a[1], b[1])) if PAIRS else tl.where(condition, a, b)


@triton.jit
def proximal_step(theta: tl.tensor, s: tl.tensor, m: tl.tensor, strength: tl.tensor, PAIRS: tl.constexpr) -> tl.tensor:
    """theta - w (theta - m), with w = strength S / (1 + strength S): 0 where S = 0, 1 where it is infinite."""
    if PAIRS:
        high, low = scaled(number(strength, PAIRS), s, PAIRS)
        low = tl.where((s == 0.0) | (high > BOUND), 0.0, low)
        high = tl.where(s == 0.0, 0.0, tl.where(high > BOUND, BOUND, high))  # NaN is kept
        of_one, rest_of_one = plus((high, low), tl.full(high.shape, 1.0, tl.float32))
        quotient = tl.div_rn(high, of_one)
        rest = tl.fma(-quotient, of_one, high) + tl.fma(-quotient, rest_of_one, low)
        high, low = product((quotient, tl.div_rn(rest, of_one)), difference(theta, m, PAIRS), PAIRS)
        result = rounded(plus((-high, -low), theta.to(tl.float32)), PAIRS)
    else:
        x = tl.where(s == 0.0, 0.0, s.to(tl.float64) * strength)
        x = tl.where(x > 1.7976931348623157e308, 1.7976931348623157e308, x)  # NaN is kept
        result = theta.to(tl.float64) - x / (1.0 + x) * difference(theta, m, PAIRS)
    return result
