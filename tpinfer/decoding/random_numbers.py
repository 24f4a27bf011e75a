"""Counter-based random numbers: each depends on its keys alone, never on what was drawn before."""

from collections.abc import Sequence

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_FEW = 16
"""Keys that plain integers serve sooner than arrays."""

RandomKey = tuple[int, int, int, int]
"""(seed, which of n continuations, position of the token, purpose)."""


def uniform(seed: int, index: int, position: int, purpose: int = 0) -> float:
    """A number in (0, 1) that depends on its arguments alone (SplitMix64 finaliser, applied per
    key)."""
    state = _GOLDEN
    for key in (seed, index, position, purpose):
        state = (state + (key & _MASK) * _FIRST + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _FIRST) & _MASK
        state = ((state ^ (state >> 27)) * _SECOND) & _MASK
        state ^= state >> 31
    return ((state >> 11) + 0.5) / (1 << 53)


def uniforms(keys: Sequence[RandomKey]) -> np.ndarray:
    """`uniform` of every key, float64 [len(keys)]: the same numbers, all at once."""
    if len(keys) <= _FEW:
        return np.array([uniform(*key) for key in keys], dtype=np.float64)
    columns = np.array(keys, dtype=np.uint64).reshape(len(keys), 4)
    state = np.full(len(keys), _GOLDEN, dtype=np.uint64)
    first, second, golden = np.uint64(_FIRST), np.uint64(_SECOND), np.uint64(_GOLDEN)
    for column in columns.T:
        state = state + column * first + golden
        state = (state ^ (state >> np.uint64(30))) * first
        state = (state ^ (state >> np.uint64(27))) * second
        state ^= state >> np.uint64(31)
    return ((state >> np.uint64(11)).astype(np.float64) + 0.5) / (1 << 53)
