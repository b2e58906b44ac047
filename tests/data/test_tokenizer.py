"""Claims of m2ae.data.tokenizer."""

from pathlib import Path

import pytest
import torch

from m2ae.data.tokenizer import CONTEXT_LENGTH, Tokenizer

LONG = "face " * 100  # one token a word


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The shipped tokenizer."""
    return Tokenizer()


def test_the_shipped_tokenizer_has_the_documented_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 2048
    assert (tokenizer.pad_id, tokenizer.sot_id, tokenizer.eot_id) == (0, 1, 2)
    assert CONTEXT_LENGTH == 77


def test_every_text_stands_between_start_and_end(tokenizer: Tokenizer) -> None:
    texts = ["cat", "a grinning face with big eyes", ""]
    encoding = tokenizer(texts)
    assert encoding.input_ids.dtype == torch.int64
    assert encoding.text_mask.dtype == torch.bool
    assert encoding.input_ids.shape == encoding.text_mask.shape
    for ids, mask in zip(encoding.input_ids, encoding.text_mask, strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [True] * length + [False] * (len(mask) - length)
        assert ids[0] == tokenizer.sot_id
        assert ids[length - 1] == tokenizer.eot_id
        assert (ids[length:] == tokenizer.pad_id).all()
        assert (ids[1 : length - 1] > tokenizer.eot_id).all()
    assert encoding.text_mask[2].sum() == 2  # the empty text
    assert encoding.shortened == 0


def test_padding_goes_to_the_longest_or_to_the_context(tokenizer: Tokenizer) -> None:
    assert tokenizer(["", "cat"]).input_ids.shape[1] == int(tokenizer(["cat"]).text_mask.sum())
    assert tokenizer([""]).input_ids.shape == (1, 2)
    assert tokenizer([""], padding="max_length").input_ids.shape == (1, 77)
    assert tokenizer([""], padding="max_length", context_length=9).text_mask.shape == (1, 9)


def test_truncation_keeps_eot_and_is_counted(tokenizer: Tokenizer) -> None:
    encoding = tokenizer([LONG, "cat", LONG])
    assert encoding.shortened == 2
    assert encoding.input_ids.shape == (3, 77)
    assert encoding.input_ids[[0, 2], -1].tolist() == [tokenizer.eot_id] * 2
    assert encoding.text_mask[0].all()
    assert tokenizer.decode(encoding.input_ids[0]) == LONG[: len("face ") * 75].rstrip()


@pytest.mark.parametrize("words", [74, 75, 76])
def test_a_text_is_shortened_only_beyond_the_limit(tokenizer: Tokenizer, words: int) -> None:
    text = " ".join(["face"] * words)
    assert tokenizer([text]).shortened == (words > 75)
    assert tokenizer([text], padding="max_length").text_mask.sum() == min(words + 2, 77)


def test_without_truncation_a_long_text_is_refused(tokenizer: Tokenizer) -> None:
    tokenizer(["face " * 10], truncate=False)
    text = " ".join(["face"] * 76)
    with pytest.raises(ValueError, match="expected at most 77 tokens, got 78 for text 1: 'face f"):
        tokenizer(["cat", text, LONG], truncate=False)


@pytest.mark.parametrize(
    "text", ["cat", "flag: Åland Islands: AX", "日本 🐱", "a\nb\tc", "", "<eot> <pad>", "x" * 70]
)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    encoding = tokenizer([text], padding="max_length")
    assert tokenizer.decode(encoding.input_ids[0]) == text
    assert tokenizer.decode(encoding.input_ids[0].tolist()) == text


def test_names_of_special_tokens_inside_a_text_are_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer(["a <eot> b <sot> <pad>"]).input_ids[0]
    assert (ids <= tokenizer.eot_id).sum() == 2


def test_bad_texts_and_options_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TypeError, match=r"expected a sequence of strings, got one string"):
        tokenizer("cat")
    with pytest.raises(TypeError, match="expected strings, got int at index 1"):
        tokenizer(["cat", 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="expected at least one text, got none"):
        tokenizer([])
    with pytest.raises(ValueError, match="expected padding to be 'longest' or 'max_length', got"):
        tokenizer(["cat"], padding="left")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected context_length >= 2, got 1"):
        tokenizer(["cat"], context_length=1)


def test_bad_ids_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="expected 0 <= id < 2048, got 2048"):
        tokenizer.decode([1, 2048])
    with pytest.raises(ValueError, match="expected 0 <= id < 2048, got -1"):
        tokenizer.decode([-1])
    with pytest.raises(ValueError, match=r"expected ids of shape \[T\], got \[1, 2\]"):
        tokenizer.decode(torch.tensor([[1, 2]]))


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a tokenizer.json, got .*none\.json"):
        Tokenizer(tmp_path / "none.json")
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected a file of the tokenizers library, got"):
        Tokenizer(path)
    path.write_text(
        '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"<pad>": 0},'
        ' "unk_token": "<pad>"}, "added_tokens": []}'
    )
    with pytest.raises(ValueError, match=r"expected the token <sot> in .*, got none"):
        Tokenizer(path)
