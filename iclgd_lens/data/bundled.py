"""Tasks of the bundled language: every episode has topics, label words and sentences of its own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import get_args

from iclgd_lens.checks import require_one_of
from iclgd_lens.data.formats import PromptFormat
from iclgd_lens.data.rows import Example
from iclgd_lens.data.tasks import Draw, Task
from iclgd_lens.draws import pick, shuffled
from iclgd_lens.models.bundled import language


def bundled_task(mapping: language.Labelling, n_classes: int = 2) -> Task:
    """Make a task of the bundled language, whose every episode has topics, label words and sentences of its own.

    Demonstrations hold every class equally often, as near as k allows, and those for a smaller k are the first of those for a
    larger one, with the same queries. A query's class is drawn at random.

    Args:
        mapping: `"natural"`: topics are labelled by their names; `"remapped"`: by words drawn at random.
        n_classes: The number of topics in an episode, 2 to 16.

    Raises:
        ValueError: If `mapping` is unknown or `n_classes` out of range.
    """
    require_one_of("mapping", mapping, get_args(language.Labelling))
    language.require_n_classes(n_classes)
    name = f"bundled/{mapping}" + ("" if n_classes == 2 else f"-{n_classes}")

    def draw(k: int, n_queries: int, seed: int) -> Draw:
        # A stream each, so that neither k nor the number of queries changes what is drawn for the other.
        of_assignment, of_demonstrations, of_queries = (
            random.Random(f"{name}/{seed}/{part}") for part in ("assignment", "demonstrations", "queries")
        )
        assignment = language.draw_assignment(of_assignment, n_classes=n_classes, mapping=mapping)

        def example(rng: random.Random, label: int) -> Example:
            return Example({"text": language.draw_sentence(rng, assignment.topics[label])}, label)

        def demonstrations() -> Iterator[Example]:
            while True:
                for label in shuffled(of_demonstrations, range(n_classes)):
                    yield example(of_demonstrations, label)

        return Draw(
            assignment.label_words,
            tuple(islice(demonstrations(), k)),
            tuple(example(of_queries, pick(of_queries, range(n_classes))) for _ in range(n_queries)),
        )

    return Task(name, PromptFormat(language.TEMPLATE, language.SEPARATOR), draw)
