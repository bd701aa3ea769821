"""Demonstrations that are wrong on purpose: what changes in them, and what does not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from iclgd_lens.data.controls import permuted, shuffled_labels
from iclgd_lens.data.episodes import Episode
from iclgd_lens.data.prompts import Demonstration
from tests.models_zoo import LABEL_WORDS, label_tokens, make_demonstrations, make_queries

SEEDS = range(20)


def make_episode(k: int = 6) -> Episode:
    """Demonstrations whose label words have one, two and three tokens."""
    return Episode("task", 0, tuple(make_demonstrations(k)), tuple(make_queries()), ("a", "b", "c"), label_tokens())


def of_classes(labels: list[int]) -> Episode:
    episode = make_episode(len(labels))
    made = [
        Demonstration(torch.tensor([1, 20 + number, *LABEL_WORDS[label]]), len(LABEL_WORDS[label]), label=label)
        for number, label in enumerate(labels)
    ]
    return replace(episode, demonstrations=tuple(made))


def text(demonstration: Demonstration) -> list[int]:
    return demonstration.tokens[: -demonstration.n_label_tokens].tolist()


def same(a: Demonstration, b: Demonstration) -> bool:
    tensors = torch.equal(a.tokens, b.tokens) and torch.equal(a.separator, b.separator)
    return tensors and (a.n_label_tokens, a.label) == (b.n_label_tokens, b.label)


def labels(demonstrations: tuple[Demonstration, ...]) -> list[int | None]:
    return [demonstration.label for demonstration in demonstrations]


@pytest.mark.parametrize("seed", SEEDS)
def test_shuffled_labels_keep_every_class_as_frequent_and_texts_and_separators_in_place(seed: int):
    episode = make_episode()
    dealt = shuffled_labels(episode, seed)
    assert Counter(labels(dealt)) == Counter(labels(episode.demonstrations))
    assert labels(dealt) != labels(episode.demonstrations)
    for before, after in zip(episode.demonstrations, dealt, strict=True):
        assert text(after) == text(before)
        assert torch.equal(after.separator, before.separator)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_relabelled_demonstration_ends_with_the_word_of_its_new_label_and_no_other(seed: int):
    episode = make_episode()
    lengths = set()
    for before, after in zip(episode.demonstrations, shuffled_labels(episode, seed), strict=True):
        word = list(LABEL_WORDS[after.label])
        assert after.tokens.tolist() == text(before) + word
        assert after.n_label_tokens == len(word)
        lengths.add(len(after.tokens) - len(before.tokens))
    assert len(lengths) > 1


def test_at_least_one_label_differs_even_where_most_deals_change_nothing():
    episode = of_classes([0, 1])
    assert all(labels(shuffled_labels(episode, seed)) == [1, 0] for seed in SEEDS)
    lone = of_classes([0, 0, 0, 0, 2])
    assert {labels(shuffled_labels(lone, seed)).index(2) for seed in SEEDS} == {0, 1, 2, 3}


def test_labels_that_are_all_alike_have_no_shuffle():
    assert shuffled_labels(of_classes([1, 1, 1])) is None
    assert shuffled_labels(of_classes([1])) is None


def test_an_unknown_label_is_refused_by_its_number():
    episode = make_episode(3)
    unknown = (*episode.demonstrations[:2], replace(episode.demonstrations[2], label=None))
    with pytest.raises(ValueError, match="demonstration 2 has no label index"):
        shuffled_labels(replace(episode, demonstrations=unknown))


@pytest.mark.parametrize("seed", SEEDS)
def test_permuted_demonstrations_are_the_same_ones_in_another_order(seed: int):
    episode = make_episode()
    moved = permuted(episode, seed)
    assert sorted(map(id, moved)) == sorted(map(id, episode.demonstrations))
    assert [id(demonstration) for demonstration in moved] != [id(demonstration) for demonstration in episode.demonstrations]


def test_two_demonstrations_can_only_swap_and_one_cannot_move():
    two = make_episode(2)
    assert all(permuted(two, seed) == two.demonstrations[::-1] for seed in SEEDS)
    assert permuted(make_episode(1)) is None


@pytest.mark.parametrize("control", [shuffled_labels, permuted])
def test_a_seed_means_the_same_again_and_another_seed_something_else(control):
    again = [[d.tokens.tolist() for d in control(make_episode(), seed)] for seed in (3, 3, *SEEDS)]
    assert again[0] == again[1]
    assert len({str(tokens) for tokens in again}) > 10


@pytest.mark.parametrize("control", [shuffled_labels, permuted])
def test_the_true_episode_is_untouched(control):
    episode, fresh = make_episode(), make_episode()
    for seed in SEEDS:
        control(episode, seed)
    assert episode.digest == fresh.digest
    assert all(map(same, episode.demonstrations, fresh.demonstrations))
