"""How many demonstrations fit: the count agrees with prompts that are really joined."""

import pytest
import torch

from iclgd_lens.data.episodes import Episode, how_many_fit, require_fit
from iclgd_lens.data.prompts import Demonstration, Query, context_tokens

LABELS = (torch.tensor([5]), torch.tensor([6, 7, 8]))
DEMONSTRATIONS = tuple(
    Demonstration(torch.arange(length), 1, torch.zeros(separator, dtype=torch.long))
    for length, separator in [(5, 1), (9, 0), (3, 2), (7, 1)]
)


def queries(*lengths: int, labels: tuple[torch.Tensor, ...] = LABELS) -> tuple[Query, ...]:
    return tuple(Query(torch.arange(length), labels) for length in lengths)


def longest_prompt(n_demonstrations: int, asked: tuple[Query, ...]) -> int:
    """The tokens of the longest input that scoring needs: every label but its last token stands behind the query."""
    context = context_tokens(DEMONSTRATIONS[:n_demonstrations]) if n_demonstrations else asked[0].tokens[:1]
    bodies = [
        len(torch.cat([context, query.tokens[1:], label[:-1]])) for query in asked for label in query.label_tokens or LABELS[:1]
    ]
    return max(bodies)


ASKED = [queries(4, 6, 2), queries(6, labels=LABELS[:1]), queries(6, 3, labels=())]


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("n_ctx", range(8, 40))
def test_as_many_fit_as_a_joined_prompt_holds(asked, n_ctx):
    fitting = [count for count in range(len(DEMONSTRATIONS) + 1) if longest_prompt(count, asked) <= n_ctx]
    assert how_many_fit(DEMONSTRATIONS, asked, n_ctx) == max(fitting, default=0)


@pytest.mark.parametrize("asked", ASKED)
def test_a_prompt_may_fill_the_window_to_the_last_token_and_no_further(asked):
    needed = longest_prompt(len(DEMONSTRATIONS), asked)
    require_fit(DEMONSTRATIONS, asked, needed)
    with pytest.raises(ValueError, match=f"a prompt of {needed} tokens, longer than the model's context window of {needed - 1}"):
        require_fit(DEMONSTRATIONS, asked, needed - 1)


def test_the_message_says_how_many_would_fit_and_offers_fit():
    n_ctx = longest_prompt(2, ASKED[0])
    with pytest.raises(ValueError, match=r"^4 demonstrations .* 2 would fit: pass k=2, or k='fit'"):
        require_fit(DEMONSTRATIONS, ASKED[0], n_ctx)


def test_the_message_says_when_not_even_one_would_fit():
    with pytest.raises(ValueError, match="not even one demonstration would fit"):
        require_fit(DEMONSTRATIONS, ASKED[0], longest_prompt(0, ASKED[0]))


def test_queries_alone_must_fit_too():
    require_fit((), ASKED[0], longest_prompt(0, ASKED[0]))
    with pytest.raises(ValueError, match="context window"):
        require_fit((), ASKED[0], longest_prompt(0, ASKED[0]) - 1)


def test_k_counts_the_demonstrations():
    assert Episode("task", 0, DEMONSTRATIONS, ASKED[0], ("a", "b"), LABELS).k == 4
