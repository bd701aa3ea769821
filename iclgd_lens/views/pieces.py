"""The text of tokens, character by character: tokens that make up one character together are one piece.

A character may be split over tokens: "映" is three bytes, and many tokenizers have no token that holds all of them. A part of a
character decodes to U+FFFD, so a view that decodes tokens one by one shows boxes for most of the world's scripts. Here tokens are
cut apart only where a character ends.

>>> from iclgd_lens.models.loading import load_model
>>> model = load_model("bundled")
>>> pieces(model.tokenizer, model.to_tokens("Words: lion")[0])
[Piece(text='<bos>', start=0, stop=1), Piece(text=' Words:', start=1, stop=2), Piece(text=' lion', start=2, stop=3)]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

BROKEN = "\ufffd"
"""What a decoder writes for bytes that are not a character; a text may also hold this character itself."""

LONGEST = 4
"""The bytes of the longest characters in UTF-8, and so the largest number of tokens that one character is split over."""


class Piece(NamedTuple):
    """The smallest group of tokens that is whole characters, most often one token.

    Attributes:
        text: The characters. A token that adds nothing to the text, as an unused number does, belongs to the next piece, so only
            the last piece's text can be `""`.
        start: The group's first token, counted from 0.
        stop: One more than its last token.
    """

    text: str
    start: int
    stop: int


def pieces(tokenizer: Any, tokens: Int[Tensor, "pos"]) -> list[Piece]:
    """Cut tokens into the smallest groups that are whole characters.

    A character is a Unicode code point: a flag or a letter with a sign above it are several, as in a tokenizer's offsets. The
    pieces' texts joined are what the tokenizer decodes all the tokens to, without "cleaning up" spaces, so each piece has the
    spaces that it has in the text. Special tokens are shown. Bytes that are no character are shown as the tokenizer shows them,
    U+FFFD. The time is linear in the number of tokens: each is decoded a few times, beside few others.

    Args:
        tokenizer: A Hugging Face tokenizer. With None, each token is a piece and its number is the text.
        tokens: The tokens, `[pos]`.

    Returns:
        The pieces in order; every token is in exactly one.
    """
    if tokenizer is None:
        return [Piece(str(token), place, place + 1) for place, token in enumerate(tokens.tolist())]
    numbers = tokens.tolist()

    def decode(start: int, stop: int) -> str:
        return str(tokenizer.decode(numbers[start:stop], clean_up_tokenization_spaces=False)) if start < stop else ""

    whole, found, anchor, shown = decode(0, len(numbers)), list[Piece](), 0, 0
    while (start := found[-1].stop if found else 0) < len(numbers):
        piece = _next_piece(decode, whole, shown, anchor, start, len(numbers))
        found.append(piece)
        shown += len(piece.text)
        # Each is decoded after the last that is more than spaces, as some decoders drop spaces that they begin with.
        if piece.text.strip(" ") or start - anchor >= LONGEST:
            anchor = start
    return found


def summed_over_pieces(values: Float[Tensor, "*axes token"], cut: Sequence[Piece]) -> Float[Tensor, "*axes piece"]:
    """Add up the values of the tokens of each piece, as attention to tokens adds.

    Args:
        values: A number for each token, along the last axis.
        cut: The pieces of these tokens, in order; for several sequences, those of one after those of the other.
    """
    lengths = torch.tensor([piece.stop - piece.start for piece in cut], device=values.device)
    piece_of_token = torch.repeat_interleave(torch.arange(len(cut), device=values.device), lengths)
    return values.new_zeros((*values.shape[:-1], len(cut))).index_add(-1, piece_of_token, values)


Decode = Callable[[int, int], str]


def _next_piece(decode: Decode, whole: str, shown: int, anchor: int, start: int, end: int) -> Piece:
    """Find the piece that begins at token `start` and at character `shown` of the whole text."""
    before = decode(anchor, start)

    def holds(text: str) -> bool:
        return text.startswith(before) and whole.startswith(text[len(before) :], shown)

    for stop in range(start + 1, end + 1):
        text = decode(anchor, stop)
        unfinished = text == before or text.endswith(BROKEN)
        adds = holds(text) and len(text) > len(before)
        if adds and not (unfinished and _goes_on(decode, holds, text, anchor, stop, end)):
            return Piece(text[len(before) :], start, stop)
        if not unfinished:
            break
    # Some tokenizers show a run of bytes, of which one is no part of a character, as U+FFFD for every byte.
    return Piece(BROKEN, start, start + 1) if whole.startswith(BROKEN, shown) else Piece(whole[shown:], start, end)


def _goes_on(decode: Decode, holds: Callable[[str], bool], text: str, anchor: int, stop: int, end: int) -> bool:
    """Whether a text that ends in U+FFFD ends within a character: a few tokens more then add less than they are by themselves."""
    for further in range(stop + 1, min(stop + LONGEST, end + 1)):
        joined, apart = decode(anchor, further), decode(stop, further)
        adds_all = joined.startswith(text) and len(joined) >= len(text) + len(apart)
        if apart.startswith(BROKEN) and not adds_all and holds(joined):
            return True
    return False
