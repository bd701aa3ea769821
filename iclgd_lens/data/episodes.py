"""Episodes: the demonstrations and queries that one comparison is made on, as tokens of one model's tokenizer."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Int
from torch import Tensor

from iclgd_lens.checks import in_order
from iclgd_lens.data.prompts import Demonstration, Query, as_label_tokens
from iclgd_lens.digests import digest_of
from iclgd_lens.draws import shuffled
from iclgd_lens.models.converting import longer_window
from iclgd_lens.models.hooked import HookedModel, is_hooked_transformer


@dataclass(frozen=True, eq=False)
class Episode:
    """One draw of a task: the same demonstrations, in one order, for all queries.

    Attributes:
        task: The task's name.
        seed: The seed it was drawn with.
        demonstrations: In prompt order.
        queries: In draw order.
        label_words: One word per class.
        label_tokens: The tokens of each label word, one `[label_pos]` tensor per class. May be given as `as_label_tokens` takes it.
        order: Which order of these demonstrations it is; 0 is that of the draw.

    Several items may be given by any list, tuple or generator, which is read once.

    Raises:
        ValueError: If several items are a set or one text, `label_words` and `label_tokens` are not equally many, or a
            demonstration has a label index that is not among them.
    """

    task: str
    seed: int
    demonstrations: tuple[Demonstration, ...]
    queries: tuple[Query, ...]
    label_words: tuple[str, ...]
    label_tokens: tuple[Int[Tensor, "_label_pos"], ...]
    order: int = 0

    def __post_init__(self) -> None:
        for name in ("demonstrations", "queries", "label_words"):
            object.__setattr__(self, name, in_order(name, getattr(self, name)))
        object.__setattr__(self, "label_tokens", as_label_tokens(self.label_tokens))
        if len(self.label_words) != len(self.label_tokens):
            raise ValueError(f"an episode has {len(self.label_words)} label words and the tokens of {len(self.label_tokens)}")
        for number, demonstration in enumerate(self.demonstrations):
            if demonstration.label is not None and demonstration.label >= len(self.label_words):
                raise ValueError(
                    f"demonstration {number} has the label index {demonstration.label}, and the episode {len(self.label_words)} "
                    "label words, counted from 0"
                )

    @property
    def k(self) -> int:
        """The number of demonstrations."""
        return len(self.demonstrations)

    def reordered(self, order: int) -> Episode:
        """The same demonstrations in another of their orders: those of numbers 1, 2, … differ from each other and from order 0.

        Raises:
            ValueError: If the demonstrations have no more orders, or are not in order 0.
        """
        if order == self.order:
            return self
        if self.order:
            raise ValueError(f"this episode is in order {self.order}; reorder the one in order 0")
        if order >= math.factorial(self.k):
            raise ValueError(f"order={order}, but {self.k} demonstrations have only {math.factorial(self.k)} orders, from 0")
        rng = random.Random(f"{self.task}/{self.seed}/order")
        seen = [list(range(self.k))]
        while len(seen) <= order:
            drawn = shuffled(rng, range(self.k))
            if drawn not in seen:
                seen.append(drawn)
        return replace(self, demonstrations=tuple(self.demonstrations[index] for index in seen[order]), order=order)

    @property
    def digest(self) -> str:
        """What a model sees of it, in 16 hex digits: equal for equal tokens and gold labels in equal order."""
        parts = [
            *((d.tokens.tolist(), d.n_label_tokens, d.separator.tolist()) for d in self.demonstrations),
            *((q.tokens.tolist(), q.label) for q in self.queries),
            [tokens.tolist() for tokens in self.label_tokens],
        ]
        return digest_of(parts)


def how_many_fit(demonstrations: Sequence[Demonstration], queries: Sequence[Query], n_ctx: int) -> int:
    """How many demonstrations, from the first, fit a context window of `n_ctx` tokens with BOS and the longest query."""
    room = n_ctx - 1 - _longest_body(queries)
    for count, demonstration in enumerate(demonstrations):
        room -= len(demonstration.tokens) - 1 + len(demonstration.separator)
        if room < 0:
            return count
    return len(demonstrations)


def window_note(model: HookedModel) -> str:
    """A clause for messages about a window that may be smaller than that of the model's weights; empty where it cannot be.

    TransformerLens gives some architectures a `HookedTransformer` whose `cfg.n_ctx` is a number of its own, such as 2048 for
    Mistral and Qwen 3. Where positions are learned, the window is as long as the table of positions.
    """
    cfg = model.cfg
    if (own := longer_window(model)) is not None:
        return f'TransformerLens has capped this window: load_model(..., backend="bridge") has the model\'s own of {own}'
    if not is_hooked_transformer(model) or cfg.original_architecture is None or cfg.positional_embedding_type == "standard":
        return ""
    return (
        'TransformerLens may have capped this window (at 2048 for Mistral and Qwen 3): load_model(..., backend="bridge") has the '
        "model's own"
    )


def require_fit(demonstrations: Sequence[Demonstration], queries: Sequence[Query], n_ctx: int, note: str = "") -> None:
    """Check that the demonstrations and the longest query fit a context window together.

    Args:
        demonstrations: The demonstrations, in prompt order.
        queries: The queries.
        n_ctx: The context window, in tokens.
        note: What else the message says of the window; see `window_note`.

    Raises:
        ValueError: If they do not, saying how many demonstrations would.
    """
    context = sum(len(demonstration.tokens) - 1 + len(demonstration.separator) for demonstration in demonstrations)
    needed = 1 + context + _longest_body(queries)
    if needed <= n_ctx:
        return
    more = f"; {note}" if note else ""
    if not demonstrations:
        raise ValueError(
            f"the longest query makes a prompt of {needed} tokens, longer than the model's context window of {n_ctx}{more}"
        )
    fitting = how_many_fit(demonstrations, queries, n_ctx)
    advice = f"{fitting} would fit: pass k={fitting}, or k='fit'" if fitting else "not even one demonstration would fit"
    raise ValueError(
        f"{len(demonstrations)} demonstrations and the longest query make a prompt of {needed} tokens, longer than the model's "
        f"context window of {n_ctx}; {advice}{more}"
    )


def require_known_tokens(
    examples: Sequence[Demonstration | Query], d_vocab: int, label_tokens: Sequence[Int[Tensor, "_label_pos"]] = ()
) -> None:
    """Check that examples, their separators and label words, and more label words, were tokenised for a vocabulary of this size, or
    a smaller one.

    Raises:
        ValueError: If a token lies beyond it.
    """
    # Queries share their label words' tensors, which are looked at once.
    parts = {id(tokens): tokens for tokens in label_tokens}
    for example in examples:
        others = example.label_tokens if isinstance(example, Query) else (example.separator,)
        parts |= {id(tokens): tokens for tokens in (example.tokens, *others)}
    for tokens in parts.values():
        if not len(tokens):
            continue
        for token in map(int, tokens.aminmax()):
            if not 0 <= token < d_vocab:
                raise ValueError(
                    f"token {token} is not in the model's vocabulary of {d_vocab}; was the episode drawn for another model?"
                )


def _longest_body(queries: Sequence[Query]) -> int:
    """The tokens that the longest query needs after a context: its text without BOS, and its longest label but the last
    token, which is only predicted.
    """
    return max(len(query.tokens) - 1 + max((len(tokens) for tokens in query.label_tokens), default=1) - 1 for query in queries)
