"""Text to token ids: a byte-level BPE between a start and an end token."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import tokenizers
import torch
from torch import Tensor

CONTEXT_LENGTH = 77

_PAD, _SOT, _EOT = "<pad>", "<sot>", "<eot>"


@dataclass(frozen=True, eq=False)
class Encoding:
    """Token ids of a batch of texts.

    Attributes:
        input_ids: int64 [B, T]: start token, text, end token, padding.
        text_mask: bool [B, T], True where there is no padding.
        shortened: how many texts lost tokens.
    """

    input_ids: Tensor
    text_mask: Tensor
    shortened: int


class Tokenizer:
    """Byte-level BPE with the special tokens `<pad>`, `<sot>` and `<eot>`.

    Every text has tokens, whatever its language, and comes back from them unchanged (but for one
    space at its start). The names of special tokens have no meaning inside a text.

    Args:
        path: a `tokenizer.json` of the `tokenizers` library; None: the shipped one, of 2,048
            tokens, learned from the training captions of the emoji data set.

    Attributes:
        vocab_size: number of tokens.
        pad_id: id of `<pad>`.
        sot_id: id of `<sot>`.
        eot_id: id of `<eot>`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no tokenizer, or lacks a special token.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        if path is None:
            path = str(resources.files("m2ae.data").joinpath("emoji", "tokenizer.json"))
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"Tokenizer: expected a tokenizer.json, got {path}, which is no file"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(
                f"Tokenizer: expected a file of the tokenizers library, got {path} ({error})"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # A caption that spells "<eot>" is text: it must not end the sequence.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.pad_id, self.sot_id, self.eot_id = (
            self._special(token, path) for token in (_PAD, _SOT, _EOT)
        )

    def _special(self, token: str, path: str | Path) -> int:
        index: int | None = self._tokenizer.token_to_id(token)
        if index is None:
            raise ValueError(f"Tokenizer: expected the token {token} in {path}, got none")
        return index

    def __call__(
        self,
        texts: Sequence[str],
        truncate: bool = True,
        padding: Literal["longest", "max_length"] = "longest",
        context_length: int = CONTEXT_LENGTH,
    ) -> Encoding:
        """Encode a batch of texts.

        Args:
            texts: B texts, at least one. An empty text has the start and the end token.
            truncate: shorten texts that are too long, keeping the end token, and count them;
                otherwise they are an error.
            padding: "longest" pads to the longest text of the batch, "max_length" to
                `context_length`.
            context_length: the most tokens a text may have, with start and end; at least 2.

        Returns:
            Ids and mask of shape [B, T], T <= context_length, and the count of shortened texts.

        Raises:
            TypeError: `texts` is one string, or holds something else than strings.
            ValueError: `texts` is empty, `padding` is unknown, `context_length` is below 2, or a
                text is too long and `truncate` is False.
        """
        _check_texts(texts)
        if padding not in ("longest", "max_length"):
            raise ValueError(
                f"Tokenizer: expected padding to be 'longest' or 'max_length', got {padding!r}"
            )
        if context_length < 2:
            raise ValueError(f"Tokenizer: expected context_length >= 2, got {context_length}")
        room = context_length - 2  # without start and end
        # One by one: encode_batch starts threads, which a forked loader worker must not inherit.
        bodies = [self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        too_long = [index for index, body in enumerate(bodies) if len(body) > room]
        if too_long and not truncate:
            index = too_long[0]
            raise ValueError(
                f"Tokenizer: expected at most {context_length} tokens, got "
                f"{len(bodies[index]) + 2} for text {index}: {texts[index]!r}; "
                "truncate=True shortens it"
            )
        T = context_length if padding == "max_length" else min(room, max(map(len, bodies))) + 2
        input_ids = torch.full((len(bodies), T), self.pad_id, dtype=torch.int64)  # [B, T]
        text_mask = torch.zeros((len(bodies), T), dtype=torch.bool)  # [B, T]
        for row, body in enumerate(bodies):
            ids = [self.sot_id, *body[:room], self.eot_id]
            input_ids[row, : len(ids)] = torch.tensor(ids)
            text_mask[row, : len(ids)] = True
        return Encoding(input_ids, text_mask, shortened=len(too_long))

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of token ids, without special tokens.

        Args:
            ids: T ids, as numbers or as an integer tensor [T], 0 <= id < vocab_size.

        Returns:
            The text.

        Raises:
            ValueError: an id is out of range, or a tensor has not one axis.
        """
        if isinstance(ids, Tensor):
            if ids.ndim != 1:
                raise ValueError(f"decode: expected ids of shape [T], got {list(ids.shape)}")
            ids = ids.tolist()
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise ValueError(f"decode: expected 0 <= id < {self.vocab_size}, got {index}")
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.removeprefix(" ")  # added before the first word, to be a word like the others


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise TypeError("Tokenizer: expected a sequence of strings, got one string; use [text]")
    if len(texts) == 0:
        raise ValueError("Tokenizer: expected at least one text, got none")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"Tokenizer: expected strings, got {type(text).__name__} at index {index}"
            )
