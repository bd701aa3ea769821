"""Tasks: text classification as a source of episodes.

A task knows its rows, its prompt format and its label words, and draws an *episode* for a model: k demonstrations and some
queries, tokenised. Its rows come from memory, from CSV or JSON-lines files or from any `datasets.Dataset`; tasks that are known by
name are in `data/registry.py`. The same seed gives the same episode on every machine: all draws go through
`random.Random.random`, seeded by a string.

>>> from iclgd_lens.models.loading import load_model
>>> rows = [{"text": "lion bear", "label": 0}, {"text": "rain snow", "label": 1}] * 4
>>> task = Task.from_rows(rows, name="mine", template="Words: {text} Label:", labels=["alpha", "beta"])
>>> episode = task.episode(load_model("bundled"), k=4, n_queries=2, seed=0)
>>> episode.k, len(episode.queries), len(episode.label_words)
(4, 2, 2)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, TypeAlias

import datasets
import torch

from iclgd_lens.checks import require_count
from iclgd_lens.data.episodes import Episode, how_many_fit, require_fit, window_note
from iclgd_lens.data.formats import PromptFormat
from iclgd_lens.data.prompts import Demonstration, Query
from iclgd_lens.data.rows import Example, Labels, checked_examples, label_table, read_csv, read_jsonl
from iclgd_lens.data.tables import Rows, rows_of
from iclgd_lens.digests import digest_of
from iclgd_lens.draws import shuffled
from iclgd_lens.models.hooked import HookedModel

MOST_DEMONSTRATIONS = 32
"""How many demonstrations `k="fit"` draws before it keeps those that fit; the paper's number."""

AnyDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset

Drawing = Callable[[int, int, int], "Draw"]
"""`(k, n_queries, seed) -> Draw`: at most k demonstrations and at most `n_queries` queries."""


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
        draw: Draws demonstrations and queries.
        most: How many demonstrations `k="fit"` draws before it keeps those that fit.
        reporting: The same on the rows that are kept for results where options are tuned, too; None for all of them.
        tuning: The same on rows whose queries are kept for tuning; None where every seed has queries of its own.
        rows_digest: Tells its rows apart; empty where it draws from none.
    """

    name: str
    format: PromptFormat
    draw: Drawing
    most: int = MOST_DEMONSTRATIONS
    reporting: Task | None = None
    tuning: Task | None = None
    rows_digest: str = ""

    @cached_property
    def digest(self) -> str:
        """Tells tasks apart, in 16 hex digits: equal for equal names, prompts and rows. Of a task that draws from no rows, what it
        draws for seed 0 stands for all that it draws.
        """
        drawn = self.rows_digest or repr(self.draw(self.most, self.most, 0))
        return digest_of([self.name, self.format.identity, self.most, drawn])

    def with_format(self, *, separator: str | None = None, space_before_labels: bool | None = None) -> Task:
        """The same task with prompts that are written otherwise, on its rows for tuning and reporting, too.

        Args:
            separator: As in `PromptFormat`; None for the task's own.
            space_before_labels: As in `PromptFormat`; None for the task's own.

        Raises:
            ValueError: As `PromptFormat`.
        """
        if separator is None and space_before_labels is None:
            return self
        written = replace(
            self.format,
            separator=self.format.separator if separator is None else separator,
            space_before_labels=self.format.space_before_labels if space_before_labels is None else space_before_labels,
        )

        def changed(task: Task | None) -> Task | None:
            return None if task is None else replace(task, format=written)

        return replace(self, format=written, reporting=changed(self.reporting), tuning=changed(self.tuning))

    def for_tuning(self) -> Task:
        """The task to choose options on, such as a learning rate, whose queries `for_reporting` never has. Take other seeds, too.

        Where there is a split for queries, queries to tune on come from the rows of the demonstrations. Where there is none, a
        third of the rows is kept for tuning. Bundled tasks have queries of their own for every seed.
        """
        return self if self.tuning is None else replace(self.tuning, name=self.name)

    def for_reporting(self) -> Task:
        """The task to report results on if options were chosen on `for_tuning`."""
        return self if self.reporting is None else replace(self.reporting, name=self.name)

    def demonstrations(self, model: HookedModel, k: int, seed: int = 0) -> Episode:
        """Draw demonstrations to make an update on, without queries: they need not fit the context window together.

        Args:
            model: Its tokenizer and context window are used.
            k: The number of demonstrations at most; those that are too long for the window by themselves are left out.
            seed: Seeds the draw.

        Raises:
            ValueError: If the task has too few rows, the model has no tokenizer, or the label words collide under it.
        """
        drawn = self._tokenised(model, k, 1, seed)
        fitting = tuple(each for each in drawn.demonstrations if len(each.tokens) <= model.cfg.n_ctx)
        return replace(drawn, demonstrations=fitting, queries=())

    def episode(
        self, model: HookedModel, k: int | Literal["fit"] = 12, n_queries: int = 64, seed: int = 0, order: int = 0
    ) -> Episode:
        """Draw an episode and tokenise it for a model.

        Args:
            model: Its tokenizer and context window are used.
            k: The number of demonstrations, or `"fit"`: up to `most`, as many as fit the context window with the longest query.
            n_queries: The number of queries, at most; a file may hold fewer.
            seed: Seeds the draw.
            order: 0 for the demonstrations in the order in which they were drawn, 1, 2, … for the same in other orders
                (`Episode.reordered`).

        Raises:
            ValueError: If k or `n_queries` is below 1 or `order` below 0, the task has too few rows, the model has no tokenizer,
                the label words collide under it, or the prompts are longer than the context window (the message says how many
                would fit).
        """
        require_k(k)
        require_count("n_queries", n_queries)
        if not isinstance(order, Integral) or order < 0:
            raise ValueError(f"order must be a number, 0 for the order of the draw; got {order!r}")
        episode = self._tokenised(model, self.most if k == "fit" else k, n_queries, seed)
        if k != "fit" and episode.k < k:
            raise ValueError(f"task {self.name!r} has {episode.k} rows for demonstrations, fewer than k={k}")
        if k == "fit":
            fitting = max(1, how_many_fit(episode.demonstrations, episode.queries, model.cfg.n_ctx))
            episode = replace(episode, demonstrations=episode.demonstrations[:fitting])
        require_fit(episode.demonstrations, episode.queries, model.cfg.n_ctx, window_note(model))
        return episode.reordered(order)

    def _tokenised(self, model: HookedModel, k: int, n_queries: int, seed: int) -> Episode:
        """Draw at most k demonstrations and `n_queries` queries, and tokenise them."""
        tokenizer = model.tokenizer
        if tokenizer is None:
            raise ValueError("the model has no tokenizer; give it one with model.set_tokenizer(...)")
        drawn = self.draw(k, n_queries, seed)
        label_tokens = self.format.label_tokens(tokenizer, drawn.label_words)
        separator = self.format.separator_tokens(tokenizer)

        def demonstrate(example: Example) -> Demonstration:
            label = label_tokens[example.label]
            prompt = self.format.prompt(tokenizer, example.fields)
            return Demonstration(torch.cat([prompt, label]), len(label), separator, example.label)

        return Episode(
            self.name,
            seed,
            tuple(demonstrate(example) for example in drawn.demonstrations),
            tuple(Query(self.format.prompt(tokenizer, example.fields), label_tokens, example.label) for example in drawn.queries),
            drawn.label_words,
            label_tokens,
        )

    @classmethod
    def from_rows(
        cls,
        rows: Rows,
        *,
        name: str,
        template: str,
        labels: Labels,
        label_column: str = "label",
        separator: str = "{eos}",
        space_before_labels: bool = True,
        query_rows: Rows | None = None,
        sources: tuple[str, str] | None = None,
    ) -> Task:
        """Make a task from rows in memory; `from_csv`, `from_jsonl` and `from_dataset` read theirs and come here. Rows are read
        once, at once.

        Demonstrations are the first k rows shuffled with the episode's seed. Queries are the first `query_rows` shuffled once
        with a fixed seed, the same for every episode; without `query_rows` they are the rows that follow the demonstrations.

        Args:
            rows: Mappings from column names to values, a pandas `DataFrame`, a `pyarrow.Table`, or a data set of `datasets`, in any
                of its formats.
            name: The task's name, used in messages and results.
            template: The prompt, with column names in braces, ending where the label follows.
            labels: The label word of every value of the label column: a mapping, or words in the order of values 0, 1, …. Where
                the column is a `datasets.ClassLabel`, a mapping may be from its names.
            label_column: Which column holds the label.
            separator: What stands between demonstrations; `{eos}` is the tokenizer's end-of-text token.
            space_before_labels: Whether a space stands between the template and the label word.
            query_rows: A split of its own for queries.
            sources: What messages call the rows and the query rows; by default the task's name.

        Raises:
            ValueError: If a row lacks a column, has an unknown label, or a text that is empty or no text (the message names the
                row, counted from 1, and the column), there are no rows, `rows` and `query_rows` are one generator, or `labels`
                has no order or two values that are written alike.
            TypeError: If `rows` is nothing that rows can be read from, such as a path or a `DatasetDict` of splits.
        """
        prompt_format = PromptFormat(template, separator, space_before_labels)
        table = label_table(labels)
        label_words = tuple(table.values())
        source, query_source = sources or (name, f"{name} (queries)")
        if query_rows is rows and isinstance(rows, Iterator):
            raise ValueError("rows and query_rows are one generator, of which either would get a part; give lists")

        def examples(given: Rows, source: str) -> list[Example]:
            read = rows_of(given, source, (*prompt_format.fields, label_column), label_column, table)
            return checked_examples(read, source, prompt_format, table, label_column)

        pool = examples(rows, source)

        def on(rows: list[Example]) -> Task:
            """A task whose queries are the rows that follow the demonstrations."""

            def draw(k: int, n_queries: int, seed: int) -> Draw:
                order = shuffled(random.Random(f"{name}/{seed}"), rows)
                if k >= len(rows):
                    raise ValueError(f"task {name!r} has {len(rows)} rows: after k={k} demonstrations none is left for queries")
                return Draw(label_words, tuple(order[:k]), tuple(order[k:][:n_queries]))

            # Half of the rows at least are left for queries.
            return cls(name, prompt_format, draw, most=min(MOST_DEMONSTRATIONS, max(1, len(rows) // 2)))

        if query_rows is None:
            parted, third = shuffled(random.Random(f"{name}/tuning"), pool), len(pool) // 3
            return replace(
                on(pool), reporting=on(parted[third:]), tuning=on(parted[:third]), rows_digest=_rows_digest(label_words, pool)
            )
        queries = shuffled(random.Random(f"{name}/queries"), examples(query_rows, query_source))

        def draw_both(k: int, n_queries: int, seed: int) -> Draw:
            order = shuffled(random.Random(f"{name}/{seed}"), pool)
            return Draw(label_words, tuple(order[:k]), tuple(queries[:n_queries]))

        digest = _rows_digest(label_words, pool, queries)
        return cls(name, prompt_format, draw_both, most=min(MOST_DEMONSTRATIONS, len(pool)), tuning=on(pool), rows_digest=digest)

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
    def from_dataset(cls, dataset: AnyDataset, *, name: str, queries: AnyDataset | None = None, **options: Any) -> Task:
        """Make a task from a `datasets.Dataset` in any format or an `IterableDataset`, which is read to its end, and one for
        queries; `options` are those of `from_rows`.

        Raises:
            TypeError: If given something else, such as a `DatasetDict` of splits.
            ValueError: As `from_rows`.
        """
        for given in (dataset, *([] if queries is None else [queries])):
            if not isinstance(given, AnyDataset):
                splits = f"; choose one of its splits: {', '.join(given)}" if isinstance(given, Mapping) else ""
                raise TypeError(f"need a datasets.Dataset or IterableDataset, got {type(given).__name__}{splits}")
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


def _rows_digest(label_words: tuple[str, ...], *rows: list[Example]) -> str:
    return digest_of([label_words, *([(sorted(row.fields.items()), row.label) for row in part] for part in rows)])


def require_k(k: object) -> None:
    """Check a number of demonstrations.

    Raises:
        ValueError: If it is neither a whole number of at least 1 nor `"fit"`.
    """
    if k != "fit" and (not isinstance(k, Integral) or k < 1):
        raise ValueError(f"k must be a number of demonstrations, at least 1, or 'fit'; got {k!r}")
