"""Prompts as tokens: what a demonstration and a query are, and how they are joined.

A *demonstration* is BOS, a text put into the task's template, and its label. A *query* is BOS and such a text without its
label, with the label words it is to be scored on. An in-context prompt is

    BOS · demonstration · separator · … · demonstration · separator · query

with a single BOS in front (Deutch et al. 2024, section 3.1). Texts, labels and separators are tokenised apart from each other,
so the position of every label is known, and a query's tokens are the same with and without demonstrations.
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
        ValueError: If `tokens` is not one-dimensional, or too short for BOS and the label.
    """

    tokens: Int[Tensor, "pos"]
    n_label_tokens: int
    separator: Int[Tensor, "separator_pos"] = field(default_factory=_no_tokens)
    label: int | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1:
            raise ValueError(f"tokens must be one sequence, [pos]; got shape {list(self.tokens.shape)}")
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
        ValueError: If `tokens` is not one-dimensional or holds nothing after BOS, or a label word has no tokens.
    """

    tokens: Int[Tensor, "pos"]
    label_tokens: tuple[Int[Tensor, "_label_pos"], ...] = ()
    label: int | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or len(self.tokens) < 2:
            raise ValueError(
                f"a query's tokens must be one sequence of BOS and at least one more token; got shape {list(self.tokens.shape)}"
            )
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
        ValueError: If the template has no field, a field without a name, or unbalanced braces.
    """

    template: str
    separator: str = "{eos}"

    def __post_init__(self) -> None:
        try:
            names = [name for _, name, _, _ in Formatter().parse(self.template) if name is not None]
        except ValueError as error:
            raise ValueError(f"the template {self.template!r} cannot be read: {error}") from error
        if not names or not all(name.isidentifier() for name in names):
            raise ValueError(
                f"the template {self.template!r} must name one or more columns in braces, as in 'Review: {{text}} Label:'"
            )

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the template's fields, in order."""
        return tuple(name for _, name, _, _ in Formatter().parse(self.template) if name)

    def prompt(self, tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> Int[Tensor, "pos"]:
        """Tokenise BOS and the template filled with a row's fields."""
        text = self.template.format_map(row)
        return torch.tensor([bos_token(tokenizer), *_encode(tokenizer, text)])

    def separator_tokens(self, tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, "pos"]:
        """Tokenise the separator.

        Raises:
            ValueError: If the separator is to hold the end-of-text token and the tokenizer has none.
        """
        if "{eos}" in self.separator and tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no end-of-text token for the separator '{eos}'; give the task another separator")
        text = self.separator.replace("{eos}", tokenizer.eos_token or "")
        return torch.tensor(_encode(tokenizer, text), dtype=torch.long)

    def label_tokens(self, tokenizer: PreTrainedTokenizerBase, label_words: Sequence[str]) -> tuple[Int[Tensor, "_label_pos"], ...]:
        """Tokenise label words as they stand after the template, with a leading space.

        They are tokenised behind the template's last words, since some tokenizers write the beginning of a text differently.

        Raises:
            ValueError: If a word comes to no tokens or to the unknown token, or two words come to the same tokens.
        """
        # A letter stands for the field, so that the label is never the beginning of a text.
        tail = "x" + self.template.rpartition("}")[2]
        before = _encode(tokenizer, tail)
        tokenised: dict[tuple[int, ...], str] = {}
        for word in label_words:
            whole = _encode(tokenizer, f"{tail} {word}")
            tokens = tuple(whole[len(before) :] if whole[: len(before)] == before else _encode(tokenizer, f" {word}"))
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
