"""Prompts as tokens: what a demonstration and a query are, and how they are joined.

A *demonstration* is BOS, a text put into the task's template, and its label. A *query* is BOS and such a text without its
label, with the label words it is to be scored on. An in-context prompt is

    BOS · demonstration · separator · … · demonstration · separator · query

with a single BOS in front (Deutch et al. 2024, section 3.1). Texts, labels and separators are tokenised apart from each other,
so the position of every label is known, and a query's tokens are the same with and without demonstrations. The name of a special
token in a text is that token, as wherever a tokenizer reads texts. A text that begins with the name of BOS, as a chat template may,
has the prompt's one BOS by that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from iclgd_lens.checks import as_whole, in_order
from iclgd_lens.digests import digest_of


def require_tokens(tokens: object, what: str) -> None:
    """Check that something is one sequence of tokens, as embeddings are looked up by.

    Args:
        tokens: Maybe tokens, `[pos]`.
        what: What messages call it.

    Raises:
        ValueError: If it is no tensor, has another number of dimensions than one, or holds numbers of another dtype than int64.
    """
    if not isinstance(tokens, Tensor):
        raise ValueError(f"{what} must be a tensor of token numbers, [pos]; got {type(tokens).__name__} {tokens!r}")
    if tokens.ndim != 1:
        raise ValueError(f"{what} must be one sequence, [pos]; got shape {list(tokens.shape)}")
    if tokens.dtype != torch.long:
        raise ValueError(f"{what} must be whole numbers of dtype torch.int64, got {tokens.dtype}")


def as_label_tokens(given: Iterable[Int[Tensor, "_label_pos"]] | Int[Tensor, "label label_pos"]) -> tuple[Tensor, ...]:
    """Take the tokens of label words in any of their forms.

    Args:
        given: One `[label_pos]` tensor per class, in the order of the classes; or, for words of equally many tokens, one
            `[label, label_pos]` tensor with a row per class.

    Returns:
        One `[label_pos]` tensor per class.

    Raises:
        ValueError: If it is something else, in no order, or a word has no tokens.
    """
    if isinstance(given, Tensor):
        if given.ndim != 2:
            advice = "; give words of one token each as label_tokens[:, None]" if given.ndim == 1 else ""
            raise ValueError(f"label_tokens as one tensor must have a row per class, got shape {list(given.shape)}{advice}")
        given = given.unbind()
    words = in_order("label_tokens", given)
    for number, tokens in enumerate(words):
        require_tokens(tokens, f"the tokens of label word {number}")
        if not len(tokens):
            raise ValueError(f"label word {number} has no tokens")
    return words


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
        ValueError: If `tokens` or `separator` is not one-dimensional or of another dtype than int64, `tokens` is too short for BOS
            and the label, or `n_label_tokens` or `label` is no whole number or too small.
    """

    tokens: Int[Tensor, "pos"]
    n_label_tokens: int
    separator: Int[Tensor, "separator_pos"] = field(default_factory=_no_tokens)
    label: int | None = None

    def __post_init__(self) -> None:
        require_tokens(self.tokens, "tokens")
        require_tokens(self.separator, "the tokens of a separator")
        _put(self, n_label_tokens=as_whole("n_label_tokens", self.n_label_tokens, least=1), label=_class_index(self.label))
        if self.n_label_tokens >= len(self.tokens):
            raise ValueError(
                f"n_label_tokens={self.n_label_tokens} does not fit a demonstration of {len(self.tokens)} tokens, "
                "which begins with BOS and ends with its label"
            )


@dataclass(frozen=True, eq=False)
class Query:
    """A text to be labelled, as tokens.

    Attributes:
        tokens: `[pos]`: BOS, text. The last token is the one that predicts the label.
        label_tokens: One `[label_pos]` tensor per class: the tokens of its label word. May be given as `as_label_tokens` takes it.
        label: The gold class index, where it is known.

    Raises:
        ValueError: If `tokens` is not one-dimensional, of another dtype than int64 or holds nothing after BOS, `label_tokens` is
            not what `as_label_tokens` takes, or `label` is no whole number, negative, or not among the label words.
    """

    tokens: Int[Tensor, "pos"]
    label_tokens: tuple[Int[Tensor, "_label_pos"], ...] = ()
    label: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tokens, Tensor) and (self.tokens.ndim != 1 or len(self.tokens) < 2):
            raise ValueError(
                f"a query's tokens must be one sequence of BOS and at least one more token; got shape {list(self.tokens.shape)}"
            )
        require_tokens(self.tokens, "a query's tokens")
        _put(self, label_tokens=as_label_tokens(self.label_tokens), label=_class_index(self.label))
        if self.label is not None and self.label_tokens and self.label >= len(self.label_tokens):
            raise ValueError(
                f"label must be the index of one of the {len(self.label_tokens)} label words, 0 to {len(self.label_tokens) - 1}; "
                f"got {self.label}"
            )

    @property
    def digest(self) -> str:
        """What a model sees of it and its gold label, in 12 hex digits."""
        return digest_of([self.tokens.tolist(), self.label], digits=12)


def _put(example: Demonstration | Query, **values: object) -> None:
    """Set what a frozen value was given in another form."""
    for name, value in values.items():
        object.__setattr__(example, name, value)


def _class_index(label: object) -> int | None:
    return None if label is None else as_whole("label", label)


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
