"""Elements, slices and hostile values that the tests of csrc's loops share."""

import numpy as np
import pytest

DTYPES = {"float32": np.float32, "float64": np.float64, "bfloat16": np.uint16, "float16": np.float16}
STATE_DTYPES = ["float32", "float64"]
OFFSETS = range(8)
LENGTHS = [*range(71), *(16 * blocks + step for blocks in (5, 8, 16) for step in (-1, 0, 1)), 4096]

dtype = pytest.mark.parametrize("dtype", DTYPES)
other_dtype = pytest.mark.parametrize("other_dtype", DTYPES)
state_dtype = pytest.mark.parametrize("state_dtype", STATE_DTYPES)
overwrite = pytest.mark.parametrize("overwrite", [False, True])


def widen(elements: np.ndarray) -> np.ndarray:
    """The float64 values of elements; uint16 are bfloat16, the upper half of a float32."""
    if elements.dtype == np.uint16:
        elements = (elements.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return elements.astype(np.float64)


def narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values rounded to the nearest element, ties to even; to 16 bits through float32, as PyTorch does."""
    if dtype == "float64":
        return values
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        values = values.astype(np.float32)
        if dtype != "bfloat16":
            return values.astype(DTYPES[dtype])
    bits = values.view(np.uint32)
    word, rest = bits >> 16, bits & 0xFFFF
    word = word + ((rest > 0x8000) | ((rest == 0x8000) & (word % 2 == 1)))
    return np.where(np.isnan(values), 0x7FC0, word).astype(np.uint16)


def eighths(dtype: str, seed: int) -> np.ndarray:
    """Multiples of 1/8 from -16 to 16, which every dtype holds."""
    return narrow(np.random.default_rng(seed).integers(-128, 128, max(LENGTHS), endpoint=True) / 8, dtype)


def anywhere(dtype: str, seed: int, count: int) -> np.ndarray:
    """Elements with all their bits in use and magnitudes from 1e-4 to 1e2."""
    generator = np.random.default_rng(seed)
    return narrow(generator.standard_normal(count) * 10.0 ** generator.uniform(-4, 2, count), dtype)


class Slice:
    """``elements`` at ``offset`` in an allocation that has ``tail`` elements after them, all others a known pattern."""

    def __init__(self, elements: np.ndarray, offset: int, tail: int = 0) -> None:
        self.base = np.empty(offset + elements.size + tail, elements.dtype)
        self.base.view(np.uint8).fill(0x5A)
        self.inside = slice(offset, offset + elements.size)
        self.base[self.inside] = elements
        self.elements = self.base[self.inside]

    def holds(self, expected: np.ndarray) -> bool:
        """Whether the elements are ``expected``, bit by bit, and those around them are untouched."""
        return (
            self.base.tobytes() == Slice(expected, self.inside.start, self.base.size - self.inside.stop).base.tobytes()
        )
