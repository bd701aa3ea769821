"""Prompts as tokens: what a demonstration and a query are, and how they are joined.

A *demonstration* is BOS, a text put into the task's template, and its label. A *query* is BOS and such a text without its
label, with the label words it is to be scored on. An in-context prompt is

    BOS · demonstration · separator · … · demonstration · separator · query

with a single BOS in front (Deutch et al. 2024, section 3.1). Texts, labels and separators are tokenised apart from each other,
so the position of every label is known, and a query's tokens are the same with and without demonstrations. The name of a special
token in a text is that token, as wherever a tokenizer reads texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from string import Formatter

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from iclgd_lens.digests import digest_of


def require_text(text: object, what: str) -> None:
    """Check that something is text that can be written.

    Args:
        text: Maybe a text.
        what: What messages call it.

    Raises:
        ValueError: If it is no string, or holds half of a character, as JSON can escape one and no tokenizer reads.
    """
    if not isinstance(text, str):
        raise ValueError(f"{what} must be text, got {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"{text[error.start]!r} at position {error.start}"
        raise ValueError(f"{what} holds half of a character, {half}; write the whole character") from None


def require_token_numbers(tokens: Int[Tensor, "pos"], what: str) -> None:
    """Check that tokens are what embeddings are looked up by.

    Raises:
        ValueError: If they are numbers of another kind.
    """
    if tokens.dtype != torch.long:
        raise ValueError(f"{what} must be whole numbers of dtype torch.int64, got {tokens.dtype}")


def _no_tokens() -> Int[Tensor, "0"]:
    return torch.empty(0, dtype=torch.long)


@dataclass(frozen=True, eq=False)
class Demonstration:
    """A labelled example, as tokens.

    Attributes:
        tokens: `[pos]`: BOS, text, label.
        n_label_tokens: How many tokens at the end are the label's.
        separator: `[separator_pos]`: what follows the demonstration in an in-context prompt. It is not part of `tokens`: the loss
            of a gradient step is taken without it.
        label: The class index, where it is known.

    Raises:
        ValueError: If `tokens` is not one-dimensional, of another dtype than int64, or too short for BOS and the label.
    """

    tokens: Int[Tensor, "pos"]
    n_label_tokens: int
    separator: Int[Tensor, "separator_pos"] = field(default_factory=_no_tokens)
    label: int | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1:
            raise ValueError(f"tokens must be one sequence, [pos]; got shape {list(self.tokens.shape)}")
        require_token_numbers(self.tokens, "tokens")
        require_token_numbers(self.separator, "the tokens of a separator")
        if not 1 <= self.n_label_tokens < len(self.tokens):
            raise ValueError(
                f"n_label_tokens={self.n_label_tokens} does not fit a demonstration of {len(self.tokens)} tokens, "
                "which begins with BOS and ends with its label"
            )


@dataclass(frozen=True, eq=False)
class Query:
    """A text to be labelled, as tokens.

    Attributes:
        tokens: `[pos]`: BOS, text. The last token is the one that predicts the label.
        label_tokens: One `[label_pos]` tensor per class: the tokens of its label word.
        label: The gold class index, where it is known.

    Raises:
        ValueError: If `tokens` is not one-dimensional, of another dtype than int64 or holds nothing after BOS, or a label word has
            no tokens.
    """

    tokens: Int[Tensor, "pos"]
    label_tokens: tuple[Int[Tensor, "_label_pos"], ...] = ()
    label: int | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or len(self.tokens) < 2:
            raise ValueError(
                f"a query's tokens must be one sequence of BOS and at least one more token; got shape {list(self.tokens.shape)}"
            )
        require_token_numbers(self.tokens, "a query's tokens")
        for number, tokens in enumerate(self.label_tokens):
            require_token_numbers(tokens, f"the tokens of label word {number}")
        if any(len(tokens) == 0 for tokens in self.label_tokens):
            raise ValueError(f"label word {[len(tokens) for tokens in self.label_tokens].index(0)} of a query has no tokens")

    @property
    def digest(self) -> str:
        """What a model sees of it and its gold label, in 12 hex digits."""
        return digest_of([self.tokens.tolist(), self.label], digits=12)


def context_tokens(demonstrations: Sequence[Demonstration]) -> Int[Tensor, "pos"]:
    """Join demonstrations to the part of an in-context prompt that stands before the query: one BOS, then each without it.

    Raises:
        ValueError: If there are no demonstrations, or they begin with different tokens.
    """
    if not demonstrations:
        raise ValueError("no demonstrations: an in-context prompt needs at least one; for zero-shot leave the context out")
    starts = {int(demonstration.tokens[0]) for demonstration in demonstrations}
    if len(starts) > 1:
        raise ValueError(f"every demonstration must begin with the same BOS token; got {sorted(starts)}")
    bodies = [torch.cat([demonstration.tokens[1:], demonstration.separator]) for demonstration in demonstrations]
    return torch.cat([demonstrations[0].tokens[:1], *bodies])


def demonstrations_digest(demonstrations: Sequence[Demonstration]) -> str:
    """Tell demonstrations apart, in 16 hex digits: equal for equal tokens in equal order."""
    return digest_of([(each.tokens.tolist(), each.n_label_tokens, each.separator.tolist()) for each in demonstrations])


@dataclass(frozen=True, eq=False)
class ContextLayout:
    """Which demonstration each token of a context belongs to. BOS is left out, as it belongs to none.

    Attributes:
        demonstration: `[context_pos]`: the index of the demonstration, also for the tokens of its separator.
        position: `[context_pos]`: the token's position in that demonstration, BOS being 0; -1 in a separator.
        is_label: `[context_pos]`: whether it is a token of the label.
    """

    demonstration: Int[Tensor, "context_pos"]
    position: Int[Tensor, "context_pos"]
    is_label: Bool[Tensor, "context_pos"]

    @classmethod
    def of(cls, demonstrations: Sequence[Demonstration]) -> ContextLayout:
        """Lay out the tokens of `context_tokens(demonstrations)[1:]`."""
        lengths = torch.tensor([len(d.tokens) - 1 + len(d.separator) for d in demonstrations])
        position = torch.cat(
            [torch.cat([torch.arange(1, len(d.tokens)), torch.full((len(d.separator),), -1)]) for d in demonstrations]
        )
        first_label = torch.tensor([len(d.tokens) - d.n_label_tokens for d in demonstrations]).repeat_interleave(lengths)
        return cls(torch.arange(len(demonstrations)).repeat_interleave(lengths), position, position >= first_label)


@dataclass(frozen=True)
class PromptFormat:
    """How a task's rows are written.

    Attributes:
        template: The text around a row's fields, such as `"Sentence: {sentence} Label:"`. The label follows it after a space.
        separator: What stands between demonstrations; `{eos}` is the tokenizer's end-of-text token.

    Raises:
        ValueError: If the template has no field, a field without a name or with a format of its own, or unbalanced braces.
    """

    template: str
    separator: str = "{eos}"

    def __post_init__(self) -> None:
        require_text(self.template, "the template")
        require_text(self.separator, "the separator")
        try:
            parts = [part for part in Formatter().parse(self.template) if part[1] is not None]
        except ValueError as error:
            raise ValueError(f"the template {self.template!r} cannot be read: {error}") from error
        names = [str(name) for _, name, _, _ in parts]
        if not names or not all(name.isidentifier() for name in names):
            raise ValueError(
                f"the template {self.template!r} must name one or more columns in braces, as in 'Review: {{text}} Label:'"
            )
        if formatted := [str(name) for _, name, style, conversion in parts if style or conversion]:
            raise ValueError(
                f"the template {self.template!r} gives the field {formatted[0]!r} a format, and texts are put in as they are; "
                f"write {{{formatted[0]}}}"
            )

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the template's fields, in order."""
        return tuple(name for _, name, _, _ in Formatter().parse(self.template) if name)

    @property
    def _tail(self) -> str:
        """What the template says behind its last field."""
        parts = list(Formatter().parse(self.template))
        last = max(index for index, (_, name, _, _) in enumerate(parts) if name is not None)
        return "".join(literal for literal, *_ in parts[last + 1 :])

    def prompt(self, tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> Int[Tensor, "pos"]:
        """Tokenise BOS and the template filled with a row's fields.

        Raises:
            ValueError: If nothing is left of the text, as where a tokenizer drops characters that it does not know.
        """
        text = self.template.format_map(row)
        if not (tokens := _encode(tokenizer, text)):
            raise ValueError(f"this model's tokenizer makes no tokens of the prompt {text!r}")
        return torch.tensor([bos_token(tokenizer), *tokens])

    def separator_tokens(self, tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, "pos"]:
        """Tokenise the separator as it stands behind a label.

        Raises:
            ValueError: If the separator is to hold the end-of-text token and the tokenizer has none.
        """
        if "{eos}" in self.separator and tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no end-of-text token for the separator '{eos}'; give the task another separator")
        text = self.separator.replace("{eos}", tokenizer.eos_token or "")
        return torch.tensor(_encode_behind(tokenizer, "x", text), dtype=torch.long)

    def label_tokens(self, tokenizer: PreTrainedTokenizerBase, label_words: Sequence[str]) -> tuple[Int[Tensor, "_label_pos"], ...]:
        """Tokenise label words as they stand after the template, with a leading space.

        They are tokenised behind the template's last words, since some tokenizers write the beginning of a text differently.

        Raises:
            ValueError: If a word comes to no tokens or to the unknown token, or two words come to the same tokens.
        """
        # A letter stands for the field, so that the label is never the beginning of a text.
        tail = f"x{self._tail}"
        tokenised: dict[tuple[int, ...], str] = {}
        for word in label_words:
            tokens = tuple(_encode_behind(tokenizer, tail, f" {word}"))
            if not word.strip() or not tokens:
                raise ValueError(f"the label word {word!r} tokenises to nothing; give every class a word")
            if tokenizer.unk_token_id in tokens:
                raise ValueError(f"this model's tokenizer does not know the label word {word!r}")
            if tokens in tokenised:
                raise ValueError(
                    f"the label words {tokenised[tokens]!r} and {word!r} tokenise to the same tokens, {list(tokens)}, with this "
                    "model's tokenizer; choose words that it tells apart"
                )
            tokenised[tokens] = word
        return tuple(torch.tensor(tokens) for tokens in tokenised)


def bos_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that prompts begin with: BOS, or end-of-text where a tokenizer has no BOS.

    Raises:
        ValueError: If it has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has neither a BOS nor an end-of-text token; set tokenizer.bos_token")


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []


def _encode_behind(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> list[int]:
    """Tokenise a text as it stands behind another, apart from it: some tokenizers put a space in front of what they begin with.

    Where a token would reach over the boundary, they are the text's own tokens, that space taken off if that gives the text back.
    """
    if not text:
        return []
    first, whole, alone = _encode(tokenizer, before), _encode(tokenizer, before + text), _encode(tokenizer, text)
    if whole[: len(first)] == first and len(whole) > len(first):
        return whole[len(first) :]
    shown = tokenizer.decode(whole)
    found = (tokens for tokens in (alone, _encode(tokenizer, text.lstrip(" "))) if tokenizer.decode(first + tokens) == shown)
    return next(found, alone)
