"""Tasks: text classification as a source of episodes.

A task knows its rows, its prompt format and its label words, and draws an *episode* for a model: k demonstrations and some
queries, tokenised. Bundled tasks make their rows; others read them from a CSV or JSON-lines file or any `datasets.Dataset`.
The same seed gives the same episode on every machine: all draws go through `random.Random.random`, seeded by a string.

>>> from iclgd_lens.models.loading import load_model
>>> episode = load_task("bundled/remapped").episode(load_model("bundled"), k=4, n_queries=2, seed=0)
>>> episode.k, len(episode.queries), len(episode.label_words)
(4, 2, 2)
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import torch
from transformer_lens import HookedTransformer

from iclgd_lens.data.episodes import Episode, how_many_fit, require_fit
from iclgd_lens.data.prompts import Demonstration, PromptFormat, Query
from iclgd_lens.data.rows import Example, checked_examples, read_csv, read_jsonl
from iclgd_lens.draws import pick, shuffled
from iclgd_lens.models.bundled import language

MOST_DEMONSTRATIONS = 32
"""How many demonstrations `k="fit"` draws before it keeps those that fit; the paper's number."""

Labels = Mapping[Any, str] | Sequence[str]


@dataclass(frozen=True)
class Draw:
    """What a task draws before anything is tokenised: label words, demonstrations in prompt order, queries."""

    label_words: tuple[str, ...]
    demonstrations: tuple[Example, ...]
    queries: tuple[Example, ...]


@dataclass(frozen=True)
class Task:
    """A source of episodes.

    Attributes:
        name: What results are filed under.
        format: How rows are written as prompts.
        draw: `(k, n_queries, seed) -> Draw`: at most k demonstrations and at most `n_queries` queries.
        most: How many demonstrations `k="fit"` draws before it keeps those that fit.
    """

    name: str
    format: PromptFormat
    draw: Callable[[int, int, int], Draw]
    most: int = MOST_DEMONSTRATIONS

    def episode(self, model: HookedTransformer, k: int | Literal["fit"] = 12, n_queries: int = 64, seed: int = 0) -> Episode:
        """Draw an episode and tokenise it for a model.

        Args:
            model: Its tokenizer and context window are used.
            k: The number of demonstrations, or `"fit"`: up to `most`, as many as fit the context window with the longest query.
            n_queries: The number of queries, at most; a file may hold fewer.
            seed: Seeds the draw.

        Raises:
            ValueError: If k or `n_queries` is below 1, the task has too few rows, the model has no tokenizer, the label words
                collide under it, or the prompts are longer than the context window (the message says how many would fit).
        """
        if k != "fit" and (not isinstance(k, Integral) or k < 1):
            raise ValueError(f"k must be a number of demonstrations, at least 1, or 'fit'; got {k!r}")
        if not isinstance(n_queries, Integral) or n_queries < 1:
            raise ValueError(f"n_queries must be at least 1, got {n_queries!r}")
        tokenizer = model.tokenizer
        if tokenizer is None:
            raise ValueError("the model has no tokenizer; give it one with model.set_tokenizer(...)")
        drawn = self.draw(self.most if k == "fit" else k, n_queries, seed)
        if k != "fit" and len(drawn.demonstrations) < k:
            raise ValueError(f"task {self.name!r} has {len(drawn.demonstrations)} rows for demonstrations, fewer than k={k}")
        label_tokens = self.format.label_tokens(tokenizer, drawn.label_words)
        separator = self.format.separator_tokens(tokenizer)

        def demonstrate(example: Example) -> Demonstration:
            label = label_tokens[example.label]
            prompt = self.format.prompt(tokenizer, example.fields)
            return Demonstration(torch.cat([prompt, label]), len(label), separator, example.label)

        demonstrations = tuple(demonstrate(example) for example in drawn.demonstrations)
        queries = tuple(
            Query(self.format.prompt(tokenizer, example.fields), label_tokens, example.label) for example in drawn.queries
        )
        if k == "fit":
            demonstrations = demonstrations[: max(1, how_many_fit(demonstrations, queries, model.cfg.n_ctx))]
        require_fit(demonstrations, queries, model.cfg.n_ctx)
        return Episode(self.name, seed, demonstrations, queries, drawn.label_words, label_tokens)

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Mapping[str, Any]],
        *,
        name: str,
        template: str,
        labels: Labels,
        label_column: str = "label",
        separator: str = "{eos}",
        query_rows: Iterable[Mapping[str, Any]] | None = None,
    ) -> Task:
        """Make a task from rows in memory; `from_csv`, `from_jsonl` and `from_dataset` read theirs and come here.

        Demonstrations are the first k rows shuffled with the episode's seed. Queries are the first `query_rows` shuffled once
        with a fixed seed, the same for every episode; without `query_rows` they are the rows that follow the demonstrations.

        Args:
            rows: Each maps column names to values.
            name: The task's name, used in messages and results.
            template: The prompt, with column names in braces, ending where the label follows after a space.
            labels: The label word of every value of the label column: a mapping, or a sequence for values 0, 1, ….
            label_column: Which column holds the label.
            separator: What stands between demonstrations; `{eos}` is the tokenizer's end-of-text token.
            query_rows: A split of its own for queries.

        Raises:
            ValueError: If a row lacks a column, has an unknown label or an empty text (the message names the row, counted
                from 1), or there are no rows.
        """
        prompt_format = PromptFormat(template, separator)
        table = dict(labels.items() if isinstance(labels, Mapping) else enumerate(labels))
        label_words = tuple(table.values())
        pool = checked_examples(rows, name, prompt_format, table, label_column)
        query_pool = (
            None
            if query_rows is None
            else shuffled(
                random.Random(f"{name}/queries"),
                checked_examples(query_rows, f"{name} (queries)", prompt_format, table, label_column),
            )
        )

        def draw(k: int, n_queries: int, seed: int) -> Draw:
            order = shuffled(random.Random(f"{name}/{seed}"), pool)
            queries = (order[k:] if query_pool is None else query_pool)[:n_queries]
            if not queries:
                raise ValueError(f"task {name!r} has {len(pool)} rows: after k={k} demonstrations none is left for queries")
            return Draw(label_words, tuple(order[:k]), tuple(queries))

        # Without rows of their own, half of the rows at least are left for queries.
        room = len(pool) if query_pool is not None else max(1, len(pool) // 2)
        return cls(name, prompt_format, draw, most=min(MOST_DEMONSTRATIONS, room))

    @classmethod
    def from_csv(cls, path: str | Path, *, query_path: str | Path | None = None, **options: Any) -> Task:
        """Make a task from a CSV file with a header line; `options` are those of `from_rows`, `name` defaulting to the
        file's name.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: As `from_rows`.
        """
        return cls._from_files(path, query_path, read_csv, options)

    @classmethod
    def from_jsonl(cls, path: str | Path, *, query_path: str | Path | None = None, **options: Any) -> Task:
        """Make a task from a file with one JSON object per line; `options` are those of `from_rows`, `name` defaulting to the
        file's name.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: As `from_rows`, or if a line is not a JSON object.
        """
        return cls._from_files(path, query_path, read_jsonl, options)

    @classmethod
    def from_dataset(cls, dataset: datasets.Dataset, *, name: str, queries: datasets.Dataset | None = None, **options: Any) -> Task:
        """Make a task from a `datasets.Dataset`, and one for queries; `options` are those of `from_rows`.

        Raises:
            TypeError: If given something else, such as a `DatasetDict` of splits.
            ValueError: As `from_rows`.
        """
        for given in (dataset, *([] if queries is None else [queries])):
            if not isinstance(given, datasets.Dataset):
                splits = f"; choose one of its splits: {', '.join(given)}" if isinstance(given, Mapping) else ""
                raise TypeError(f"need a datasets.Dataset, got {type(given).__name__}{splits}")
        return cls.from_rows(dataset, name=name, query_rows=queries, **options)

    @classmethod
    def _from_files(
        cls,
        path: str | Path,
        query_path: str | Path | None,
        read: Callable[[Path], list[dict[str, Any]]],
        options: dict[str, Any],
    ) -> Task:
        options.setdefault("name", Path(path).name)
        query_rows = None if query_path is None else read(Path(query_path))
        return cls.from_rows(read(Path(path)), query_rows=query_rows, **options)


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
    if mapping not in get_args(language.Labelling):
        raise ValueError(f"mapping must be one of {', '.join(map(repr, get_args(language.Labelling)))}; got {mapping!r}")
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


TASKS: dict[str, Callable[[], Task]] = {
    "bundled/remapped": lambda: bundled_task("remapped"),
    "bundled/natural": lambda: bundled_task("natural"),
}
"""The tasks that `load_task` knows, by name."""


def load_task(name: str) -> Task:
    """Load a task by name.

    Raises:
        ValueError: If there is no such task; the message lists the known ones.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"unknown task {name!r}{hint} Known tasks: {', '.join(TASKS)}")
    return TASKS[name]()
