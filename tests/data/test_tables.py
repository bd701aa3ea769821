"""Rows in any form give one episode, are read once, and what cannot be a prompt or a label is named with its row and column."""

import subprocess
import sys

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from iclgd_lens.data.tasks import Task

WORDS = ["lion bear", "rain snow", "tiger wolf", "bread cake"] * 3
RAW = {"text": WORDS, "label": [0, 1] * 6}
ROWS = [{"text": text, "label": label} for text, label in zip(RAW["text"], RAW["label"], strict=True)]
OPTIONS = {"name": "t", "template": "Words: {text} Label:", "labels": ["alpha", "beta"]}
SET = datasets.Dataset.from_dict(RAW)
NAMED = SET.cast_column("label", datasets.ClassLabel(names=["neg", "pos"]))


class Streamed:
    """A table of another library, as far as it offers itself to Arrow."""

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return pa.table(RAW).__arrow_c_stream__(requested_schema)


def drawn(rows, **options):
    return Task.from_rows(rows, **{**OPTIONS, **options}).draw(4, 4, 1)


FORMS = {
    "generator": lambda: (row for row in ROWS),
    "series": lambda: [row for _, row in pd.DataFrame(RAW).iterrows()],
    "data frame": lambda: pd.DataFrame(RAW, index=range(5, 17)),
    "nullable data frame": lambda: pd.DataFrame(RAW).convert_dtypes(),
    "categories": lambda: pd.DataFrame(RAW).astype({"text": "category"}),
    "float labels": lambda: pd.DataFrame(RAW).astype({"label": "float64"}),
    "float labels as text": lambda: [{**row, "label": f"{row['label']}.0"} for row in ROWS],
    "truth values": lambda: [{**row, "label": bool(row["label"])} for row in ROWS],
    "arrow table": lambda: pa.table(RAW),
    "arrow stream": Streamed,
    "numpy scalars": lambda: [{"text": np.str_(row["text"]), "label": np.int8(row["label"])} for row in ROWS],
    "tensors": lambda: [{**row, "label": torch.tensor(row["label"])} for row in ROWS],
    **{f"data set, {kind}": lambda kind=kind: SET.with_format(kind) for kind in ("torch", "numpy", "pandas", "arrow", "python")},
    "data set with few columns": lambda: SET.with_format("torch", columns=["text"]),
    "data set with a transform": lambda: SET.with_transform(lambda batch: batch),
    "data set, chosen": lambda: SET.select(range(12)).filter(lambda row: True),
    "iterable data set": SET.to_iterable_dataset,
    **{
        f"iterable data set, {kind}": lambda kind=kind: SET.to_iterable_dataset().with_format(kind)
        for kind in ("torch", "pandas", "arrow")
    },
    "class labels": lambda: NAMED,
    "booleans": lambda: SET.cast_column("label", datasets.Value("bool")),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_in_any_form_are_the_same_rows(form):
    assert drawn(FORMS[form]()) == drawn(ROWS)


@pytest.mark.parametrize("rows", [NAMED, NAMED.with_format("torch"), NAMED.to_iterable_dataset()])
def test_class_labels_may_be_named(rows):
    assert (
        drawn(rows, labels={"pos": "beta", "neg": "alpha"}).demonstrations
        == drawn(ROWS, labels={1: "beta", 0: "alpha"}).demonstrations
    )


def test_names_of_classes_that_are_numbers_are_names_and_not_numbers():
    stars = SET.cast_column("label", datasets.ClassLabel(names=["1", "2"]))
    assert drawn(stars, labels={"1": "alpha", "2": "beta"}) == drawn(ROWS)


def test_a_generator_for_queries_is_read_once_and_serves_every_episode():
    task = Task.from_rows(iter(ROWS), query_rows=iter(ROWS[:5]), **OPTIONS)
    assert len(task.draw(2, 9, 0).queries) == len(task.draw(2, 9, 1).queries) == 5


def test_one_generator_for_rows_and_queries_is_refused():
    rows = iter(ROWS)
    with pytest.raises(ValueError, match="rows and query_rows are one generator"):
        Task.from_rows(rows, query_rows=rows, **OPTIONS)


@pytest.mark.parametrize(
    "labels", [iter(["alpha", "beta"]), {"alpha": 0, "beta": 1}.keys(), pd.Series(["alpha", "beta"]), np.array(["alpha", "beta"])]
)
def test_label_words_are_taken_once_from_anything_in_order(labels):
    assert drawn(ROWS, labels=labels) == drawn(ROWS)


def test_a_series_of_label_words_is_read_by_its_index():
    assert drawn(ROWS, labels=pd.Series(["beta", "alpha"], index=[1, 0])) == drawn(ROWS, labels={1: "beta", 0: "alpha"})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"alpha", "beta"}, "labels must be given in an order, and a set has another one in every process"),
        (frozenset(["alpha", "beta"]), "labels must be given in an order"),
        ("alpha", "labels must be several items in an order, such as a list; got str 'alpha'"),
        (None, "labels must be several items in an order"),
        ([], "labels must be at least one word; got none"),
        ({1: "alpha", "1": "beta"}, "labels names 1 and '1', which a row may write alike"),
        ({True: "alpha", "true": "beta"}, "labels names True and 'true', which a row may write alike"),
    ],
)
def test_label_words_in_no_order_or_for_the_same_value_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        drawn(ROWS, labels=labels)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (["lion", "bear"], r"t, row 2: the text in column 'text' must be text, got list \['lion', 'bear'\]; join its parts"),
        (("lion", "bear"), "row 2: .* got tuple .*; join its parts"),
        ({"en": "lion"}, r"row 2: .* got dict \{'en': 'lion'\}"),
        (b"lion", r"row 2: .* got bytes b'lion'; decode it"),
        (np.bytes_(b"lion"), "row 2: .* got bytes"),
        (np.array(["lion", "bear"]), "row 2: .* got ndarray"),
        (torch.tensor([1, 2]), "row 2: .* got Tensor"),
        (pd.NA, "row 2: the value in column 'text' is missing"),
        (pd.NaT, "row 2: the value in column 'text' is missing"),
        (np.float32("nan"), "row 2: the value in column 'text' is missing"),
        (torch.tensor(float("nan")), "row 2: the value in column 'text' is missing"),
    ],
)
def test_what_is_no_text_never_stands_in_a_prompt(text, message):
    with pytest.raises(ValueError, match=message):
        drawn([ROWS[0], {"text": text, "label": 0}, *ROWS[2:]])


def test_lists_in_a_column_of_a_data_set_are_refused_by_name():
    rows = datasets.Dataset.from_dict({"text": [text.split() for text in WORDS], "label": RAW["label"]})
    with pytest.raises(ValueError, match="t, row 1: the text in column 'text' must be text, got list"):
        drawn(rows)


def test_numbers_are_texts_as_files_would_write_them():
    rows = [{"text": text, "label": index % 2} for index, text in enumerate([3, np.int64(4), 0.5, torch.tensor(6), 3])]
    draw = drawn(rows)
    assert {example.fields["text"] for example in (*draw.demonstrations, *draw.queries)} <= {"3", "4", "0.5", "6"}


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (-1, r"unknown label -1 in column 'label'; known: 0, 1; -1 marks rows without a label"),
        (np.int64(-1), "-1 marks rows without a label"),
        (torch.tensor(7), "unknown label 7 in column"),
        (0.5, "unknown label 0.5 in column"),
        (b"0", "unknown label b'0'"),
        (torch.tensor([0]), r"unknown label tensor\(\[0\]\)"),
    ],
)
def test_unknown_labels_are_named_as_they_are_written(label, message):
    with pytest.raises(ValueError, match=f"t, row 1: .*{message}|t, row 1: {message}"):
        drawn([{"text": "lion", "label": label}, *ROWS])


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (RAW, TypeError, r"one mapping for each row, got dict; for one of columns give pandas\.DataFrame\(rows\)"),
        (datasets.DatasetDict(train=SET), TypeError, "got DatasetDict; choose one of its splits: train"),
        ("rows.csv", TypeError, "got 'rows.csv'; a file is read by Task.from_csv"),
        (None, TypeError, "one mapping for each row, got None"),
        ([("lion", 0)], ValueError, r"t, row 1 must map column names to values; got tuple \('lion', 0\)"),
        (pd.DataFrame(RAW).itertuples(), ValueError, "row 1 must map column names to values; got Pandas"),
        (pd.DataFrame(RAW).rename(columns={"label": "y"}), ValueError, "t: no column 'label'; it has text, y"),
        (SET.rename_column("label", "y"), ValueError, "t: no column 'label'; it has text, y"),
        (pd.concat([pd.DataFrame(RAW)] * 2, axis=1), ValueError, "t has 2 columns 'text'; rename all but one"),
        (pd.DataFrame(RAW).head(0), ValueError, "t has no rows"),
    ],
)
def test_what_holds_no_rows_is_refused_by_name(rows, error, message):
    with pytest.raises(error, match=message):
        drawn(rows)


@pytest.mark.slow
def test_draws_are_the_same_in_every_process():
    code = f"from iclgd_lens import Task\ntask = Task.from_rows({ROWS!r}, **{OPTIONS!r})\nprint(task.digest, task.draw(3, 3, 0))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1
