"""The order of training instances: a pure function of (seed, epoch, index) that needs no table and no state.

In: positions in the endless stream of instances. Out: which instance stands at each. Any rank, at any step, after any
restart, computes the same answer for the positions it needs, in constant memory.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 8  # four suffice for a pseudorandom permutation (Luby and Rackoff 1988); halves of a few bits want more
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, the increment of SplitMix64


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection of uint64, all output bits need all input bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class InstanceOrder:
    """Shuffles `size` instances anew in each epoch, by a keyed bijection of {0 .. size - 1}.

    *Feistel network.* Let b be the number of bits of `size - 1`. A number of b bits is cut in a left half of ⌊b/2⌋ and
    a right half of ⌈b/2⌉ bits. A round maps (L, R) to (R, L xor F(R, key)), keeping as many bits of F as L has, with
    the widths changing places. Given (R, L') one gets L back as L' xor F(R, key): each round is a bijection of
    {0 .. 2^b - 1} *whatever F is*, and so are eight of them. F is a 64-bit mixing function; the key of a round is mixed
    from (seed, epoch, round).

    *Cycle walking.* The network permutes 2^b ≥ `size` numbers, and 2^b < 2·`size` (for `size` 1: b = 1). From
    x < `size`, apply it until the result is below `size` again. The walk runs along the cycle of x, and x itself is
    below `size`, so it ends; different starts end differently, because walked backwards each result leads to the
    nearest number below `size` before it on its cycle, which is the start. So it is a bijection of {0 .. size - 1}, and
    as at least half of all numbers are below `size`, a walk takes at most two applications on average.
    """

    def __init__(self, seed: int, size: int) -> None:
        if size < 1:
            raise ValueError(f"size={size}: an order needs at least one instance")
        self.seed = seed
        self.size = size
        bits = max(1, (size - 1).bit_length())
        self._left_bits = bits // 2
        self._right_bits = bits - bits // 2
        with np.errstate(over="ignore"):
            self._seed_key = mix(np.array([(seed + 1) * _GOLDEN % 2**64], dtype=np.uint64))  # [1]

    def order(self, indices: np.ndarray) -> np.ndarray:
        """Instances at positions `indices` (int64, any shape, ≥ 0, counted over all epochs): int64 of the same shape.

        Position p stands in epoch p // size; every epoch visits each instance exactly once.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and indices.min() < 0:
            raise ValueError(f"position {indices.min()} is negative: positions count from 0")
        epochs, places = np.divmod(indices.reshape(-1), self.size)
        with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
            # Not symmetric in seed and epoch: epoch 1 of seed 0 must not be epoch 0 of seed 1.
            keys = mix(self._seed_key + (epochs.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))
            result = self._permute(places.astype(np.uint64), keys)
            outside = np.flatnonzero(result >= self.size)
            while outside.size:
                result[outside] = self._permute(result[outside], keys[outside])
                outside = outside[result[outside] >= self.size]
        return result.astype(np.int64).reshape(indices.shape)

    def _permute(self, x: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """One pass of the network over uint64 `x` of b bits, element i under key i."""
        left_bits, right_bits = self._left_bits, self._right_bits
        left, right = x >> np.uint64(right_bits), x & np.uint64(2**right_bits - 1)
        for round_index in range(ROUNDS):
            key = keys + np.uint64((round_index + 1) * _GOLDEN % 2**64)
            scrambled = mix(mix(key) ^ right) & np.uint64(2**left_bits - 1)
            left, right = right, left ^ scrambled
            left_bits, right_bits = right_bits, left_bits
        return (left << np.uint64(right_bits)) | right
