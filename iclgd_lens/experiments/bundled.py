"""What the bundled learner can do: accuracy on fresh episodes, beside its untrained twin.

Episodes are drawn from streams of their own, so their sentences are not those of training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

import pandas as pd

from iclgd_lens.data.bundled import bundled_task
from iclgd_lens.metrics.agreement import accuracy
from iclgd_lens.models.bundled.language import Labelling
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.models.untrained import untrained_twin
from iclgd_lens.runs.capture import capture

SETTINGS: tuple[tuple[int, int], ...] = ((2, 12), (2, 2), (2, 4), (2, 8), (3, 12), (4, 12))
"""The numbers of classes and of demonstrations that are measured; the first is the one that the shipped weights must pass."""


def measure_bundled(
    model: HookedModel,
    *,
    episodes: int = 200,
    queries: int = 4,
    settings: Sequence[tuple[int, int]] = SETTINGS,
    on_episode: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Measure zero-shot and in-context accuracy of the bundled learner and of its untrained twin.

    Args:
        model: The bundled learner.
        episodes: Fresh episodes per row.
        queries: Queries per episode.
        settings: Pairs of (classes, demonstrations) to measure.
        on_episode: Called after every episode with the number done and the number in all.

    Returns:
        One row per mapping × setting × model: `mapping`, `n_classes`, `k`, `model`, and the mean accuracies `icl` and `zsl`, scored
        on the label words of the episode.
    """
    subjects = {"trained": model, "untrained": untrained_twin(model)}
    cells = [(mapping, n_classes, k, name) for mapping in get_args(Labelling) for n_classes, k in settings for name in subjects]
    rows = []
    for done, (mapping, n_classes, k, name) in enumerate(cells):
        task = bundled_task(mapping, n_classes)
        scores = []
        for seed in range(episodes):
            episode = task.episode(model, k=k, n_queries=queries, seed=seed)
            runs = {"icl": episode.demonstrations, "zsl": None}
            scores.append(
                {
                    run: accuracy(capture(subjects[name], episode.queries, context=context, keep=["label_log_probs"])).item()
                    for run, context in runs.items()
                }
            )
            if on_episode is not None:
                on_episode(done * episodes + seed + 1, len(cells) * episodes)
        means = pd.DataFrame(scores).mean()
        rows.append({"mapping": mapping, "n_classes": n_classes, "k": k, "model": name, **means.to_dict()})
    return pd.DataFrame(rows)
