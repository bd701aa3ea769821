"""Tasks by name: the bundled ones, the six of the paper, four more, and those that others register.

A package of your own adds tasks without this one knowing, through an entry point in its `pyproject.toml`:

    [project.entry-points."iclgd_lens.tasks"]
    mine = "my_package:make_task"

where `make_task(data)` is given the folder of local data, or None, and returns a `Task`. In a script or notebook,
`register_task("mine", make_task)` does the same.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from iclgd_lens.data.bundled import bundled_task
from iclgd_lens.data.sources import Source
from iclgd_lens.data.tasks import Task

Maker = Callable[[str | Path | None], Task]
"""Makes a task, given the folder of local data, or None."""

ENTRY_POINTS = "iclgd_lens.tasks"

SOURCES: dict[str, Source] = {
    # Deutch et al. 2024, with the prompts and label words of Dai et al. 2023.
    "sst2": Source("nyu-mll/glue", "Sentence: {sentence} Label:", ("Negative", "Positive"), config="sst2"),
    "sst5": Source("SetFit/sst5", "Sentence: {text} Label:", ("terrible", "bad", "neutral", "good", "great")),
    "mr": Source("cornell-movie-review-data/rotten_tomatoes", "Review: {text} Sentiment:", ("Negative", "Positive")),
    "subj": Source("SetFit/subj", "Input: {text} Type:", ("objective", "subjective"), queries="test"),
    "agnews": Source(
        "fancyzhx/ag_news",
        "Classify the news articles into the categories of World, Sports, Business, and Technology. Article: {text} Answer:",
        ("World", "Sports", "Business", "Technology"),
        queries="test",
    ),
    "cb": Source(
        "aps/super_glue",
        "{premise} Question: {hypothesis}. True, False, or Neither? Answer:",
        ("True", "False", "Neither"),
        config="cb",
    ),
    # Further tasks; prompts are this project's.
    "trec": Source(
        "CogComp/trec",
        "Question: {text} Answer type:",
        ("Abbreviation", "Entity", "Description", "Person", "Location", "Number"),
        label_column="coarse_label",
        queries="test",
    ),
    "rte": Source("nyu-mll/glue", "{sentence1} Question: {sentence2} True or False? Answer:", ("True", "False"), config="rte"),
    "dbpedia": Source(
        "fancyzhx/dbpedia_14",
        "Article: {content} Category:",
        (
            "Company",
            "School",
            "Artist",
            "Athlete",
            "Politician",
            "Transportation",
            "Building",
            "Nature",
            "Village",
            "Animal",
            "Plant",
            "Album",
            "Film",
            "Book",
        ),
        queries="test",
    ),
    "boolq": Source("google/boolq", "{passage} Question: {question}? Answer:", {False: "No", True: "Yes"}, label_column="answer"),
}
"""The data sets of the tasks that are classified by a label word, by task name."""

PAPER_TASKS = ("sst2", "sst5", "mr", "subj", "agnews", "cb")
"""The tasks of Deutch et al. 2024."""

BUNDLED_TASKS = ("bundled/remapped", "bundled/natural")
"""The tasks that the bundled model has learned."""

_MAKERS: dict[str, Maker] = {
    "bundled/remapped": lambda data: bundled_task("remapped"),
    "bundled/natural": lambda data: bundled_task("natural"),
    **{name: partial(source.task, name) for name, source in SOURCES.items()},
}


def register_task(name: str, make: Maker) -> None:
    """Make a task known by name, to `load_task` and `Protocol` in this process; registering it again replaces it.

    Args:
        name: What it is called.
        make: Given the folder of local data, or None, makes the task.

    Raises:
        ValueError: If the name is that of a task of this package or of an installed one.
    """
    if name in (*BUNDLED_TASKS, *SOURCES, *_entry_points()):
        raise ValueError(f"there is a task {name!r} already; choose another name")
    _MAKERS[name] = make


def task_names() -> list[str]:
    """The names that `load_task` knows, those of installed packages included."""
    return [*_MAKERS, *(name for name in _entry_points() if name not in _MAKERS)]


def require_tasks(names: list[str]) -> None:
    """Check that tasks are known, without loading them.

    Raises:
        ValueError: If one is not; the message suggests the nearest and lists them all.
    """
    known = task_names()
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"unknown task {name!r}{hint} Known tasks: {', '.join(known)}")


def load_task(
    name: str, data: str | Path | None = None, *, separator: str | None = None, space_before_labels: bool | None = None
) -> Task:
    r"""Load a task by name.

    Args:
        name: One of `task_names()`.
        data: A folder of local files in the data sets' own columns, one folder per task and one file per split (see
            `data/sources.py`); by default that in the environment variable `ICLGD_DATA`, or else the hub. Bundled tasks need none.
        separator: What stands between demonstrations, such as `"\n"`; by default the task's own. `{eos}` is the tokenizer's
            end-of-text token.
        space_before_labels: Whether a space stands between the template and the label word; by default as the task has it.

    Raises:
        ValueError: If there is no such task, or a file has a wrong column or label (the message names file, row and column), or as
            `PromptFormat`.
        OSError: If a file is missing, or the hub cannot be reached and its cache does not hold the data set.
        TypeError: If what another package registered under the name makes no task.
    """
    require_tasks([name])
    make = _MAKERS.get(name) or _entry_points()[name].load()
    task = make(data)
    if not isinstance(task, Task):
        raise TypeError(f"the maker of task {name!r} returned {type(task).__name__}, not a Task")
    named = task if task.name == name else replace(task, name=name)
    return named.with_format(separator=separator, space_before_labels=space_before_labels)


def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}
