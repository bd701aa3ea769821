"""Random prompts: tokens from all over the vocabulary, drawn by a seed, and as long as a check needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from iclgd_lens.data.prompts import Demonstration, Query
from iclgd_lens.models.hooked import HookedModel, is_bridge
from iclgd_lens.models.lengths import lengths_of_change

_NUMBERS_OF_TOKENS = ("token_id", "token_ids", "token_index")
"""How configurations call the numbers of special tokens."""

LABEL_WORDS = (1, 2)
"""How many tokens each label word has."""

SHORT, EVERYDAY = 12, 192
"""How many tokens a short prompt has at most, and a long one where nothing changes with length."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """Draws prompts for one model.

    Attributes:
        bos: What prompts begin with.
        known: The numbers of the tokens that are drawn.
        n_ctx: The context window in tokens.
        changes: The lengths at which something changes, in tokens, that are no longer than a prompt may be.
        beyond: Such lengths that are longer.
    """

    bos: int
    known: Int[Tensor, "token"]
    n_ctx: int
    changes: tuple[int, ...]
    beyond: tuple[int, ...]

    @classmethod
    def of(cls, model: HookedModel, longest: int) -> Prompts:
        """Read what a model's prompts may be from its configuration and its tokenizer.

        Args:
            model: The model.
            longest: How many tokens a prompt may have.
        """
        n_ctx = int(model.cfg.n_ctx)
        lengths = [length for length in _changes(model) if length < n_ctx]
        special = {token for token in _special_tokens(model) if 0 <= token < model.cfg.d_vocab}
        n_tokens = min(int(model.cfg.d_vocab), math.inf if model.tokenizer is None else len(model.tokenizer))
        known = torch.tensor([token for token in range(int(n_tokens)) if token not in special])
        within = tuple(length for length in lengths if length + SHORT <= longest)
        return cls(_bos(model, special), known, min(n_ctx, longest), within, tuple(sorted({*lengths} - {*within})))

    @property
    def short(self) -> tuple[int, ...]:
        """Lengths of prompts, in tokens, at which nothing has changed yet, where there are such."""
        most = min(SHORT, self.n_ctx, *(max(length, 4) for length in self.changes))
        return tuple(sorted({2, max(2, most // 2), most}))

    @property
    def long(self) -> int:
        """The length of a prompt, in tokens, beyond all lengths at which something changes."""
        return min(self.n_ctx, max(self.changes) + SHORT if self.changes else EVERYDAY)

    def draw(self, length: int, seed: int) -> Int[Tensor, "pos"]:
        """Draw a prompt of so many tokens, BOS included."""
        return torch.cat([torch.tensor([self.bos]), self._body(length - 1, seed)])

    def demonstrations(self, length: int, seed: int) -> list[Demonstration]:
        """Draw demonstrations that make a context of so many tokens, BOS and separators included."""
        made: list[Demonstration] = []
        for number, size in enumerate(_parts(length - 1)):
            n_label = min(LABEL_WORDS[number % len(LABEL_WORDS)], size - 1) or 1
            body = self.draw(size, seed + number)
            made.append(Demonstration(body, n_label, self._body(1, seed + 1000 + number)))
        return made

    def queries(self, lengths: Sequence[int], seed: int) -> list[Query]:
        """Draw queries of so many tokens, BOS included, with label words of one and of more tokens."""
        words = tuple(self._body(length, seed + 2000 + number) for number, length in enumerate(LABEL_WORDS))
        return [Query(self.draw(length, seed + number), words, number % len(words)) for number, length in enumerate(lengths)]

    def _body(self, length: int, seed: int) -> Int[Tensor, "pos"]:
        generator = torch.Generator().manual_seed(seed)
        return self.known[torch.randint(len(self.known), (length,), generator=generator, device="cpu")]


def _parts(length: int) -> Iterator[int]:
    """Cut so many tokens into demonstrations of 4 to 12 tokens, in each of which BOS stands in for the separator."""
    number = 0
    while length:
        size = 5 + 3 * (number % 3)
        size = length if length < size + 4 else size
        yield size
        length -= size
        number += 1


def _changes(model: Any) -> tuple[int, ...]:
    if is_bridge(model):
        return tuple(sorted({int(length) for length in lengths_of_change(model.original_model.config)}))
    return (int(model.cfg.window_size),) if model.cfg.use_local_attn else ()


def _special_tokens(model: Any) -> set[int]:
    found = {int(token) for token in getattr(model.tokenizer, "all_special_ids", ())}
    configs = [model.original_model.config.to_dict()] if is_bridge(model) else []
    while configs:
        for name, value in configs.pop().items():
            if isinstance(value, dict):
                configs.append(value)
            elif str(name).endswith(_NUMBERS_OF_TOKENS):
                found |= {int(token) for token in (value if isinstance(value, (list, tuple)) else [value]) if token is not None}
    return found


def _bos(model: Any, special: set[int]) -> int:
    """The token that the tokenizer or the configuration begins a text with, or else the first one."""
    holders = [model.tokenizer, *([model.original_model.config.get_text_config()] if is_bridge(model) else [])]
    for name in ("bos_token_id", "eos_token_id"):
        for holder in holders:
            token = getattr(holder, name, None)
            token = token[0] if isinstance(token, (list, tuple)) else token
            if token is not None and 0 <= int(token) < model.cfg.d_vocab:
                return int(token)
    return min(special, default=0)
