"""Demonstrations that are wrong on purpose: what an update is made of when its likeness to ICL ought to be gone.

Every control takes the place of the demonstrations that an update is made on, while in-context learning keeps the true ones.
"""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from iclgd_lens.data.episodes import Episode
from iclgd_lens.data.prompts import Demonstration
from iclgd_lens.draws import reordered


def shuffled_labels(episode: Episode, seed: int = 0) -> tuple[Demonstration, ...] | None:
    """Deal the labels of the demonstrations out among them anew, so that each class stays as frequent.

    Args:
        episode: The episode; its demonstrations must know their class.
        seed: Seeds the shuffle.

    Returns:
        The demonstrations with other labels than before, or None where all labels are alike and no shuffle changes them.

    Raises:
        ValueError: If a demonstration has no class index.
    """
    labels: list[int] = []
    for number, demonstration in enumerate(episode.demonstrations):
        if demonstration.label is None:
            raise ValueError(f"demonstration {number} has no label index, so labels cannot be shuffled")
        labels.append(demonstration.label)
    if len(set(labels)) < 2:
        return None
    dealt = reordered(random.Random(f"shuffled labels/{seed}"), labels)

    def relabelled(demonstration: Demonstration, label: int) -> Demonstration:
        word = episode.label_tokens[label]
        body = demonstration.tokens[: -demonstration.n_label_tokens]
        return replace(demonstration, tokens=torch.cat([body, word.to(body)]), n_label_tokens=len(word), label=label)

    return tuple(relabelled(*pair) for pair in zip(episode.demonstrations, dealt, strict=True))


def permuted(episode: Episode, seed: int = 0) -> tuple[Demonstration, ...] | None:
    """Put the demonstrations in another order.

    Returns:
        The same demonstrations, reordered, or None where there is only one.
    """
    if episode.k < 2:
        return None
    order = reordered(random.Random(f"permuted/{seed}"), range(episode.k))
    return tuple(episode.demonstrations[index] for index in order)
