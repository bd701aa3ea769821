"""Pieces are the characters of a text: as a tokenizer's offsets have them, and as Python's own decoder of bytes does."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from iclgd_lens.models.bundled.learner import build_tokenizer
from iclgd_lens.views.pieces import Piece, pieces, summed_over_pieces
from tests.tokenizers_zoo import characters_by_offsets, gpt2_style, llama_style, wordless_style

TEXTS = [
    "映画は最高だ",
    "great film 😀👍🏽 emoji🙂glued",
    "flag 🇩🇪 family 👨‍👩‍👧",
    "मूवी अच्छी है, 한국어 текст عربى",
    "naïve café — déjà vu\n\ttwo\u200bwords\u00a0",
    '<b>bold</b> & "quoted" </script>',
    "real \ufffd, \ufffd\ufffd twice, 映\ufffd画",
    "   many   spaces  \n\n\n",
]


def word_pieces() -> PreTrainedTokenizerFast:
    """As BERT's: parts of words begin with `##`, and the decoder drops spaces in front of punctuation."""
    words = ["[UNK]", "[CLS]", "play", "##ing", "do", "n't", ",", ".", "映", "##画", "\ufffd", "##\ufffd"]
    backend = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]")


def word_ends() -> PreTrainedTokenizerFast:
    """As the first GPT's: words end with `</w>`, which the decoder makes a space but for the last."""
    words = ["<unk>", "play", "ing</w>", "play</w>", "映</w>", ",</w>"]
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], end_of_word_suffix="</w>"))
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def as_t5() -> PreTrainedTokenizerFast:
    """Pieces that begin with `▁`, without bytes."""
    words = ["<unk>", "</s>", "▁", "▁play", "ing", "映", "▁映", "\ufffd", "▁\ufffd"]
    backend = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def without_spaces_in_front() -> PreTrainedTokenizerFast:
    """As `as_t5`, with a decoder that drops all spaces that it begins with, as sentencepiece's own does for some models."""
    tokenizer = as_t5()
    strip = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 99, 0)]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(strip)
    return tokenizer


STYLES = (gpt2_style, llama_style, wordless_style, word_pieces, word_ends, as_t5, without_spaces_in_front, build_tokenizer)


def cut(tokenizer, numbers) -> list[Piece]:
    """Cut, and see that every token is in one piece and that the texts are the whole's."""
    found = pieces(tokenizer, torch.tensor(numbers, dtype=torch.long))
    assert [piece.start for piece in found] + [len(numbers)] == [0] + [piece.stop for piece in found]
    assert "".join(piece.text for piece in found) == tokenizer.decode(numbers, clean_up_tokenization_spaces=False)
    return found


def byte_alphabet() -> dict[str, int]:
    """The byte that each character stands for in the vocabulary of a byte-level tokenizer."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(others)}


def decoded(some: bytes) -> str:
    return some.decode("utf-8", errors="replace")


@pytest.mark.parametrize("style", [gpt2_style, llama_style, wordless_style], ids=lambda style: style.__name__)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_characters_of_a_tokenizer_s_offsets(style, text):
    tokenizer = style()
    numbers, groups = characters_by_offsets(tokenizer, text)
    found = cut(tokenizer, numbers)
    assert [(piece.start, piece.stop) for piece in found] == [(group[0], group[-1] + 1) for group in groups]
    assert "".join(piece.text for piece in found) == text


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
def test_pieces_joined_are_the_whole_wherever_tokens_are_cut(style):
    tokenizer, drawn = style(), random.Random(0)
    for text in TEXTS:
        numbers = tokenizer.encode(text, add_special_tokens=False)
        for start, stop in (sorted(drawn.choices(range(len(numbers) + 1), k=2)) for _ in range(4)):
            cut(tokenizer, numbers[start:stop])
    broken = [number for number in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([number])] or [0]
    for _ in range(60):
        # Some have no meaning at all, as where a model's vocabulary is larger than its tokenizer's.
        cut(tokenizer, [drawn.choice([*broken, drawn.randrange(len(tokenizer) + 3)]) for _ in range(drawn.randrange(12))])


def test_bytes_are_cut_where_both_sides_decode_to_what_they_are_together():
    tokenizer, drawn = gpt2_style(), random.Random(1)
    tokens = {byte: tokenizer.convert_tokens_to_ids(letter) for letter, byte in byte_alphabet().items()}
    for _ in range(150):
        spelled = [bytes([byte]) for byte in drawn.choices(b"\xe6\xef\xf0\x98\xa0\xbf\xbd\x9fa", k=drawn.randrange(1, 12))]
        numbers = [tokens[byte] for byte in b"".join(spelled)]
        whole = decoded(b"".join(spelled))
        halves = [(b"".join(spelled[:place]), b"".join(spelled[place:])) for place in range(1, len(numbers))]
        ends = [place for place, (left, right) in enumerate(halves, 1) if decoded(left) + decoded(right) == whole]
        assert [piece.stop for piece in cut(tokenizer, numbers)] == [*ends, len(numbers)]


def test_tokens_that_end_one_character_and_begin_the_next_hold_both_together():
    words = ["æ", "ĺłç", "Ķ", "»", "a"]  # 映 is e6 98 a0 and 画 is e7 94 bb
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    backend.decoder = decoders.ByteLevel()
    assert cut(PreTrainedTokenizerFast(tokenizer_object=backend), [4, 0, 1, 2, 3, 4]) == [
        ("a", 0, 1),
        ("映画", 1, 5),
        ("a", 5, 6),
    ]


@pytest.mark.parametrize(
    ("style", "tokens", "expected"),
    [
        # The end of the text is within a character: one for what there is of it, as the decoder shows it.
        (gpt2_style, lambda t: t.encode("a映")[:-1], [("a", 0, 1), ("\ufffd", 1, 3)]),
        (gpt2_style, lambda t: t.encode("映")[1:], None),
        # U+FFFD itself is three bytes, and each of them by itself is shown by the same character.
        (gpt2_style, lambda t: t.encode("\ufffd\ufffd"), [("\ufffd", 0, 3), ("\ufffd", 3, 6)]),
        (llama_style, lambda t: t.encode("映\ufffd"), [("映", 0, 4), ("\ufffd", 4, 7)]),
        # A decoder that falls back to bytes shows none of the characters of a run that has a broken one, nor its line break.
        (llama_style, lambda t: [*t.convert_tokens_to_ids(["<0xC3>", "<0xA9>", "<0x0A>", "<0xC3>"])], None),
        (llama_style, lambda t: [1, 1, *t.encode("a")], [("<s>", 0, 1), ("<s>", 1, 2), (" a", 2, 3)]),
        (word_pieces, lambda _: [1, 2, 3, 6, 10, 3],
         [("[CLS]", 0, 1), (" play", 1, 2), ("ing", 2, 3), (",", 3, 4), (" \ufffd", 4, 5), ("ing", 5, 6)]),
        (word_ends, lambda _: [3, 1, 2], [("play", 0, 1), (" play", 1, 2), ("ing", 2, 3)]),
        (as_t5, lambda _: [2, 5, 7, 8, 3, 99, 4],
         [("映", 0, 2), ("\ufffd", 2, 3), (" \ufffd", 3, 4), (" play", 4, 5), ("ing", 5, 7)]),
        (without_spaces_in_front, lambda _: [3, 2, 2, 3], [("play", 0, 1), (" ", 1, 2), (" ", 2, 3), (" play", 3, 4)]),
        (as_t5, lambda _: [3, 99], [("play", 0, 1), ("", 1, 2)]),
    ],
)  # fmt: skip
def test_a_piece_is_a_character_and_no_less(style, tokens, expected):
    tokenizer = style()
    numbers = tokens(tokenizer)
    # Without another expectation, each token is a broken byte.
    each = [("\ufffd", place, place + 1) for place in range(len(numbers))]
    assert cut(tokenizer, numbers) == (expected or each)


def test_no_tokens_are_no_pieces_and_without_a_tokenizer_each_is_its_number():
    assert cut(gpt2_style(), []) == []
    assert pieces(None, torch.tensor([7, 40])) == [("7", 0, 1), ("40", 1, 2)]


@pytest.mark.parametrize("text", ["映画は最高だ", "plain words ", "\ufffd", "😀", "    "])
@pytest.mark.parametrize("style", [gpt2_style, llama_style], ids=lambda style: style.__name__)
def test_time_is_linear_in_the_number_of_tokens(style, text):
    tokenizer, decoded_tokens = style(), []

    def decode(numbers, **options):
        decoded_tokens.append(len(numbers))
        return tokenizer.decode(numbers, **options)

    numbers = tokenizer.encode(text * 60, add_special_tokens=False)[:-1]
    pieces(SimpleNamespace(decode=decode), torch.tensor(numbers))
    assert sum(decoded_tokens) < 60 * len(numbers)


def test_values_of_a_piece_s_tokens_are_added():
    found = summed_over_pieces(torch.arange(10.0).reshape(2, 5), [Piece("a", 0, 1), Piece("映", 1, 4), Piece("b", 0, 1)])
    assert found.tolist() == [[0, 6, 4], [5, 21, 9]]
