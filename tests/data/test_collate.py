"""Claims of m2ae.data.collate."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader, RandomSampler, Subset

from m2ae.data.collate import Batch, Collator
from m2ae.data.dataset import Item
from m2ae.data.emoji import emoji
from m2ae.data.tokenizer import Tokenizer
from m2ae.data.transforms import center_square, crop_and_jitter, resize


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The shipped tokenizer."""
    return Tokenizer()


def item(name: str = "a", H: int = 10, W: int = 14, text: tuple[str, ...] = ("cat", "pet")) -> Item:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, H, W), dtype=torch.uint8, generator=generator)
    return Item(name, image, text, label=None)


def caption(batch: Batch, row: int, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(batch.inputs["input_ids"][row])


def assert_same(one: Batch, other: Batch) -> None:
    assert one.ids == other.ids
    assert one.shortened == other.shortened
    assert_close(one.inputs, other.inputs)
    assert_close(one.present, other.present)


def test_a_batch_has_the_documented_tensors(tokenizer: Tokenizer) -> None:
    batch = Collator(tokenizer, 8, train=False)([item("a"), item("b", 20, 5)])
    assert batch.ids == ["a", "b"]
    pixels, ids, mask = (batch.inputs[k] for k in ("pixel_values", "input_ids", "text_mask"))
    assert (pixels.shape, pixels.dtype) == ((2, 3, 8, 8), torch.uint8)
    assert (ids.shape, ids.dtype) == (mask.shape, torch.int64)
    assert mask.dtype == torch.bool
    assert set(batch.inputs) == {"pixel_values", "input_ids", "text_mask"}
    assert {name: value.tolist() for name, value in batch.present.items()} == {
        "image": [True, True],
        "text": [True, True],
    }


def test_evaluation_takes_the_first_caption_and_the_middle_square(tokenizer: Tokenizer) -> None:
    sample = item()
    assert sample.image is not None
    collator = Collator(tokenizer, 8, train=False, augment=crop_and_jitter)
    for epoch in range(3):
        collator.set_epoch(epoch)
        batch = collator([sample])
        assert caption(batch, 0, tokenizer) == "cat"
        expected = resize(center_square(sample.image), 8)
        assert torch.equal(batch.inputs["pixel_values"][0], expected)


def test_training_draws_every_caption_and_the_first_most_often(tokenizer: Tokenizer) -> None:
    collator = Collator(tokenizer, 8, train=True)
    sample = item(text=("cat", "pet", "animal"))
    drawn = []
    for epoch in range(60):
        collator.set_epoch(epoch)
        drawn.append(caption(collator([sample]), 0, tokenizer))
    # The first has odds 1/2 + 1/6: of 60 draws 40, deviation 3.7; the others 10, deviation 2.9.
    # Four deviations leave 25 to 55, and at most 22.
    assert 25 <= drawn.count("cat") <= 55
    assert all(1 <= drawn.count(text) <= 22 for text in ("pet", "animal"))


def test_training_augments_images_only_if_asked(tokenizer: Tokenizer) -> None:
    plain = Collator(tokenizer, 8, train=False)([item()]).inputs["pixel_values"]
    resized = Collator(tokenizer, 8, train=True)([item()]).inputs["pixel_values"]
    changed = Collator(tokenizer, 8, train=True, augment=crop_and_jitter)([item()])
    assert torch.equal(plain, resized)
    assert not torch.equal(plain, changed.inputs["pixel_values"])


def test_absent_modalities_are_zeros_padding_and_not_present(tokenizer: Tokenizer) -> None:
    words = Item("words", None, ("only words",), None)
    picture = item("picture", text=())
    batch = Collator(tokenizer, 8, train=True, augment=crop_and_jitter)([words, picture])
    assert batch.present["image"].tolist() == [False, True]
    assert batch.present["text"].tolist() == [True, False]
    assert not batch.inputs["pixel_values"][0].any()
    assert batch.inputs["pixel_values"][1].any()
    assert (batch.inputs["input_ids"][1] == tokenizer.pad_id).all()
    assert not batch.inputs["text_mask"][1].any()
    assert batch.inputs["text_mask"][0].any()


def test_an_empty_caption_is_present(tokenizer: Tokenizer) -> None:
    batch = Collator(tokenizer, 8, train=False)([item(text=("",))])
    assert batch.present["text"].tolist() == [True]
    assert batch.inputs["input_ids"].tolist() == [[tokenizer.sot_id, tokenizer.eot_id]]


def test_shortened_captions_are_counted(tokenizer: Tokenizer) -> None:
    items = [item(text=("word " * 20,)), item(text=("cat",))]
    batch = Collator(tokenizer, 8, train=False, context_length=10)(items)
    assert batch.shortened == 1
    assert batch.inputs["input_ids"].shape == (2, 10)
    assert Collator(tokenizer, 8, train=False)(items).shortened == 0


def test_a_sample_does_not_depend_on_its_batch(tokenizer: Tokenizer) -> None:
    collator = Collator(tokenizer, 8, train=True, augment=crop_and_jitter)
    together = collator([item("a"), item("b")]).inputs["pixel_values"]
    assert_close(collator([item("b")]).inputs["pixel_values"][0], together[1])
    assert not torch.equal(together[0], together[1])  # the same image, another id


def two_epochs(workers: int, persistent: bool = False) -> Iterator[Batch]:
    data = Subset(emoji("train"), range(40))
    collator = Collator(Tokenizer(), 16, train=True, seed=3, augment=crop_and_jitter)
    batches: DataLoader[Item] = DataLoader(
        data,
        batch_size=16,
        # A generator of its own: persistent workers change how often the loader draws.
        sampler=RandomSampler(data, generator=torch.Generator().manual_seed(0)),
        num_workers=workers,
        persistent_workers=persistent,
        collate_fn=collator,
    )
    for epoch in range(2):
        collator.set_epoch(epoch)
        yield from batches


@pytest.mark.parametrize("workers, persistent", [(1, False), (2, False), (2, True)])
def test_batches_do_not_depend_on_the_number_of_workers(workers: int, persistent: bool) -> None:
    expected = list(two_epochs(0))
    assert len(expected) == 6
    for one, other in zip(expected, two_epochs(workers, persistent), strict=True):
        assert_same(one, other)


def test_epochs_differ() -> None:
    collator = Collator(Tokenizer(), 16, train=True, augment=crop_and_jitter)
    first = collator([item()]).inputs["pixel_values"]
    collator.set_epoch(1)
    assert not torch.equal(first, collator([item()]).inputs["pixel_values"])


def test_to_moves_every_tensor(tokenizer: Tokenizer) -> None:
    batch = Collator(tokenizer, 8, train=False)([item()])
    moved = batch.to("meta")
    tensors: list[Tensor] = [*moved.inputs.values(), *moved.present.values()]
    assert len(tensors) == 5
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.ids, moved.shortened) == (batch.ids, batch.shortened)


def test_bad_arguments_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="expected img_size >= 1, got 0"):
        Collator(tokenizer, 0, train=False)
    with pytest.raises(ValueError, match="expected context_length >= 2, got 1"):
        Collator(tokenizer, 8, train=False, context_length=1)
    with pytest.raises(ValueError, match="expected epoch >= 0, got -1"):
        Collator(tokenizer, 8, train=False).set_epoch(-1)
    with pytest.raises(ValueError, match="expected at least one item, got none"):
        Collator(tokenizer, 8, train=False)([])
