"""How many demonstrations fit: the count agrees with prompts that are really joined."""

import pytest
import torch

from iclgd_lens.data.episodes import Episode, how_many_fit, require_fit, window_note
from iclgd_lens.data.prompts import Demonstration, Query, context_tokens
from iclgd_lens.models.loading import load_model
from tests.hf_zoo import make_hf_model
from tests.models_zoo import require_hooked_transformer

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


# What an episode is made of


@pytest.mark.unchecked_shapes
def test_an_episode_reads_generators_once_and_keeps_what_they_gave():
    given = Episode("task", 0, iter(DEMONSTRATIONS), iter(ASKED[0]), iter(("a", "b")), iter(LABELS))
    listed = Episode("task", 0, DEMONSTRATIONS, ASKED[0], ("a", "b"), LABELS)
    assert (given.demonstrations, given.queries, given.label_words) == (DEMONSTRATIONS, ASKED[0], ("a", "b"))
    assert given.digest == given.digest == listed.digest
    assert given.reordered(3).digest == listed.reordered(3).digest != listed.digest


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_words": {"a", "b"}}, "label_words must be given in an order, and a set"),
        ({"label_words": "ab"}, "label_words must be several items in an order, such as a list; got str 'ab'"),
        ({"demonstrations": set(DEMONSTRATIONS)}, "demonstrations must be given in an order"),
        ({"queries": None}, "queries must be several items in an order"),
        ({"label_words": ("a",)}, "an episode has 1 label words and the tokens of 2"),
        ({"label_tokens": torch.tensor([5, 6])}, r"a row per class, got shape \[2\]"),
        (
            {"demonstrations": [*DEMONSTRATIONS, Demonstration(torch.arange(3), 1, label=2)]},
            "demonstration 4 has the label index 2, and the episode 2 label words",
        ),
    ],
)
def test_what_makes_no_episode_is_refused_by_name(changes, message):
    whole = {"demonstrations": DEMONSTRATIONS, "queries": ASKED[0], "label_words": ("a", "b"), "label_tokens": LABELS}
    with pytest.raises(ValueError, match=message):
        Episode("task", 0, **{**whole, **changes})


# The window


def test_a_note_of_the_window_ends_the_message():
    for demonstrations in (DEMONSTRATIONS, ()):
        with pytest.raises(ValueError, match=r"context window of 5; .*the note$"):
            require_fit(demonstrations, ASKED[0], 5, "the note")


def test_a_window_that_transformer_lens_may_cap_is_said_to_be_so(bundled):
    require_hooked_transformer()
    capped, bridge = (load_model(hf_model=make_hf_model("mistral"), backend=backend) for backend in ("hooked", "bridge"))
    assert 'load_model(..., backend="bridge")' in window_note(capped)
    learned = load_model(hf_model=make_hf_model("gpt2"), backend="hooked")
    assert [window_note(model) for model in (bridge, learned, bundled)] == ["", "", ""]
