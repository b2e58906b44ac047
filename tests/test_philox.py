"""Philox4x32-10 against its published vectors, and dropout as a function of seed, slot, column."""

import math

import pytest
import torch

from m2ae_kernels.ops._philox import HIDDEN, OUTPUT, dropout_factors, dropout_threshold, philox4x32

# Random123's kat_vectors for philox4x32-10: counter, key, result
KNOWN = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text):
    return [torch.tensor(int(word, 16)) for word in text.split()]


@pytest.mark.parametrize("counter,key,result", KNOWN)
def test_known_answers(counter, key, result):
    assert torch.stack(philox4x32(words(counter), words(key))).equal(torch.stack(words(result)))


def test_words_broadcast():
    table = [[words(text) for text in case] for case in KNOWN]
    counters, keys, results = (
        [torch.stack(column) for column in zip(*part, strict=True)]
        for part in zip(*table, strict=True)
    )
    assert torch.stack(philox4x32(counters, keys)).equal(torch.stack(results))


def python_word(seed, slot, column, which):
    """The word of one element, with Python's integers."""
    a, b, c, d = slot % 2**32, slot >> 32, column // 4, seed[1] % 2**31 * 2 + which
    k, q = seed[0] % 2**32, seed[0] % 2**64 >> 32
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (
            second >> 32 ^ b ^ k,
            second % 2**32,
            first >> 32 ^ d ^ q,
            first % 2**32,
        )
        k, q = (k + 0x9E3779B9) % 2**32, (q + 0xBB67AE85) % 2**32
    return (a, b, c, d)[column % 4]


@pytest.mark.parametrize("seed", [(0, 0), (-1, -1), (2**62 + 12345, 2**31 + 7)])
def test_element_by_element(seed):
    # A slot beyond 32 bits, columns that end within a group of four, both dropouts.
    slots, p = torch.tensor([[0, 1], [77, 2**33 + 5]]), 0.3
    for which in (HIDDEN, OUTPUT):
        factors = dropout_factors(torch.tensor(seed), slots, 7, p, which, torch.float32)
        threshold = round(p * 2**32)
        expected = [
            [
                [(python_word(seed, s, c, which) >= threshold) / (1 - p) for c in range(7)]
                for s in row
            ]
            for row in slots.tolist()
        ]
        assert factors.equal(torch.tensor(expected))
        # int32 slots, and fewer columns: the same values
        some = dropout_factors(torch.tensor(seed), slots[0].int(), 3, p, which, torch.float32)
        assert some.equal(factors[0, :, :3])


def test_seed_offset_and_which_change_the_mask():
    slots = torch.arange(8)
    masks = [
        dropout_factors(torch.tensor(seed), slots, 64, 0.5, which, torch.float32)
        for seed in ((1, 2), (2, 2), (1, 3), (1 + 2**40, 2))
        for which in (HIDDEN, OUTPUT)
    ]
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            # Two independent masks agree on 256 of 512 +- 11.3; by six sigmas one pair in 10^9
            # is outside.
            assert abs((mask == other).sum().item() - 256) < 6 * math.sqrt(512) / 2


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_share_that_is_dropped(p):
    rows, columns = 500, 403
    seed = torch.tensor([20261122, 0])
    factors = dropout_factors(seed, torch.arange(rows), columns, p, HIDDEN, torch.float64)
    kept = factors > 0
    assert torch.unique(factors[kept]).tolist() == [1 / (1 - p)]
    # Six standard deviations of a binomial share, of all, of each row and of each column.
    for share, n in ((kept, rows * columns), (kept.T, rows), (kept, columns)):
        values = share.double().mean() if n > 1000 else share.double().mean(1)
        assert (values - (1 - p)).abs().max() < 6 * math.sqrt(p * (1 - p) / n)
    # Neighbours in a row and in a column are independent: both kept with probability (1 - p)^2.
    for pair in (kept[:, 1:] & kept[:, :-1], kept[1:] & kept[:-1]):
        q = (1 - p) ** 2
        # Pairs overlap, so the variance is up to three times that of independent ones.
        bound = 6 * math.sqrt(3 * q * (1 - q) / pair.numel())
        assert abs(pair.double().mean().item() - q) < bound


def test_threshold():
    assert dropout_threshold(0.0) == 0
    assert dropout_threshold(0.25) == 2**30
    assert dropout_threshold(1 - 2**-53) == 2**32 - 1  # as 32 bits, not 0
