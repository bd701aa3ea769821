"""Small tokenizers, trained on the fixtures' text: one that writes text as GPT-2's does, one as Llama's does, one without words."""

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from iclgd_lens.data.registry import SOURCES
from iclgd_lens.data.rows import read_csv, read_jsonl

FIXTURES = Path(__file__).parent / "data" / "fixtures"
VOCABULARY = 800
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def fixture_text() -> list[str]:
    """All texts of the fixtures, each with a space in front of it, and the templates and label words around them."""
    written = [text for source in SOURCES.values() for text in (source.template, *label_words(source))]
    for path in sorted([*FIXTURES.rglob("*.csv"), *FIXTURES.rglob("*.jsonl")]):
        rows = read_csv(path) if path.suffix == ".csv" else read_jsonl(path)
        written += [value for row in rows for value in row.values() if isinstance(value, str)]
    return [f" {text.strip()}" for text in written]


def label_words(source) -> list[str]:
    return list(source.labels.values() if isinstance(source.labels, dict) else source.labels)


@cache
def gpt2_backend() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(fixture_text(), trainer)
    return backend.to_str()


def gpt2_style() -> PreTrainedTokenizerFast:
    """Byte-level BPE without a prefix space; one special token that is BOS, end of text and unknown."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(gpt2_backend()),
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
        clean_up_tokenization_spaces=False,
    )


@cache
def llama_backend() -> str:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - len(BYTES), special_tokens=specials, show_progress=False)
    # Other characters are left to their bytes.
    trained.train_from_iterator(["".join(filter(str.isascii, text)) for text in fixture_text()], trainer)
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().get)[len(specials) :]
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    vocabulary = {piece: number for number, piece in enumerate([*specials, *BYTES, *pieces])}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    # A prefix space and every other space become part of the pieces, as in the files of Llama 2.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return backend.to_str()


def llama_style() -> PreTrainedTokenizerFast:
    """BPE on pieces that begin with `▁`, with a prefix space in front of every text and bytes for unknown characters."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(llama_backend()),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@cache
def wordless_backend() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    labelled = [f"{source.template} {word}" for source in SOURCES.values() for word in label_words(source)]
    backend.train_from_iterator([*fixture_text(), *labelled * 20], trainer)
    return backend.to_str()


def wordless_style() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose tokens reach over spaces and punctuation, from a template into a label word."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(wordless_backend()),
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def characters_by_offsets(tokenizer, text: str) -> tuple[list[int], list[list[int]]]:
    """A text's tokens, and the places of those that share characters by the tokenizer's offsets, group by group."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    groups: list[list[int]] = []
    reached = 0
    for place, (first, last) in enumerate(encoded["offset_mapping"]):
        if first < reached:
            groups[-1].append(place)
        else:
            groups.append([place])
        reached = max(reached, last)
    return encoded["input_ids"], groups
