"""Random numbers that are a function of where they are used: Philox4x32-10, and dropout from it.

A counter of four 32-bit words and a key of two give four 32-bit words, by ten rounds of products,
with no state: the backward makes the mask of the forward again, and neither the order of the rows
nor the size of a tile nor the device changes it. Here in int64, of which no value exceeds 2^50.

Paper: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # what the key grows by per round
HIDDEN, OUTPUT = 0, 1  # which dropout of expert_mlp, the last bit of a counter


def _product(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of multiplier * word. In two halves: int64 must not overflow."""
    low = multiplier * (word & 0xFFFF)
    high = multiplier * (word >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | (low & 0xFFFF)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words per counter; all int64 in [0, 2^32), of shapes that broadcast."""
    a, b, c, d = counter
    k, q = key
    for i in range(10):
        if i > 0:
            k, q = (k + _WEYL[0]) & _WORD, (q + _WEYL[1]) & _WORD
        (high_a, low_a), (high_c, low_c) = (
            _product(_MULTIPLIERS[0], a),
            _product(_MULTIPLIERS[1], c),
        )
        a, b, c, d = high_c ^ b ^ k, low_c, high_a ^ d ^ q, low_a
    return a, b, c, d


def dropout_threshold(p: float) -> int:
    """Words below it are dropped. A p that rounds to 1 keeps one of 2^32: the word has 32 bits."""
    return min(round(p * 2**32), _WORD)


def dropout_factors(
    seed: Tensor, slots: Tensor, columns: int, p: float, which: int, dtype: torch.dtype
) -> Tensor:
    """What dropout multiplies by, 0 or 1 / (1 - p): [..., columns] for the slots [...].

    Args:
        seed: [2] int64: the key, and an offset whose last 31 bits tell layers or steps apart.
        slots: flat slot ids, >= 0. Those of a row do not depend on where sorting puts it.
        columns: how many per slot; columns 4 c to 4 c + 3 share a counter.
        p: the share that is dropped, in [0, 1).
        which: HIDDEN or OUTPUT.
        dtype: of the result.
    """
    slots = slots.long()[..., None]
    quads = torch.arange((columns + 3) // 4, device=slots.device)
    key = (seed[0] & _WORD, seed[0] >> 32 & _WORD)
    stream = (seed[1] & 0x7FFFFFFF) * 2 + which
    words = philox4x32((slots & _WORD, slots >> 32, quads, stream), key)
    words_by_column = torch.stack(torch.broadcast_tensors(*words), -1).flatten(-2)[..., :columns]
    return (words_by_column >= dropout_threshold(p)).to(dtype) * (1 / (1 - p))
