"""Data sets from a folder, the hub or its cache: the same episode from each, and what is wrong is named."""

import csv
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features, Value
from datasets.data_files import DataFilesDict
from datasets.load import configure_builder_class
from datasets.packaged_modules.json.json import Json

from iclgd_lens.data.registry import SOURCES, load_task
from iclgd_lens.data.rows import read_csv, read_jsonl
from tests.tokenizers_zoo import FIXTURES, gpt2_style

STRING, INT = Value("string"), Value("int32")
FIFTY = ClassLabel(names=[f"fine{number}" for number in range(50)])
COARSE = ClassLabel(names=["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"])
SETFIT = Features(text=STRING, label=Value("int64"), label_text=STRING)
ENTAILED = ["entailment", "contradiction", "neutral"]

HUB = {
    "sst2": ("nyu-mll/glue", "sst2", Features(sentence=STRING, label=ClassLabel(names=["negative", "positive"]), idx=INT)),
    "sst5": ("SetFit/sst5", None, SETFIT),
    "mr": ("cornell-movie-review-data/rotten_tomatoes", None, Features(text=STRING, label=ClassLabel(names=["neg", "pos"]))),
    "subj": ("SetFit/subj", None, SETFIT),
    "agnews": (
        "fancyzhx/ag_news",
        None,
        Features(text=STRING, label=ClassLabel(names=["World", "Sports", "Business", "Sci/Tech"])),
    ),
    "cb": (
        "aps/super_glue",
        "cb",
        Features(premise=STRING, hypothesis=STRING, idx=INT, label=ClassLabel(names=ENTAILED)),
    ),
    "trec": ("CogComp/trec", None, Features(text=STRING, coarse_label=COARSE, fine_label=FIFTY)),
    "rte": (
        "nyu-mll/glue",
        "rte",
        Features(sentence1=STRING, sentence2=STRING, label=ClassLabel(names=["entailment", "not_entailment"]), idx=INT),
    ),
    "dbpedia": ("fancyzhx/dbpedia_14", None, Features(label=ClassLabel(num_classes=14), title=STRING, content=STRING)),
    "boolq": ("google/boolq", None, Features(question=STRING, answer=Value("bool"), passage=STRING)),
}
"""Where each data set is on the hub: its path, its configuration, its columns."""

QUERY_SPLITS = {name: "test" if name in ("subj", "agnews", "trec", "dbpedia") else "validation" for name in SOURCES}

on_all_tasks = pytest.mark.parametrize("name", list(SOURCES))


@pytest.fixture(autouse=True)
def no_folder_by_default(monkeypatch):
    monkeypatch.delenv("ICLGD_DATA", raising=False)


@pytest.fixture(scope="module")
def model():
    return SimpleNamespace(tokenizer=gpt2_style(), cfg=SimpleNamespace(n_ctx=2048))


def digests(task, model) -> list[str]:
    return [task.episode(model, k=5, n_queries=12, seed=seed).digest for seed in range(3)]


def rows_of(name: str, split: str) -> list[dict]:
    """The fixture's rows with the types that the hub's columns have."""
    [path] = (FIXTURES / name).glob(f"{split}.*")
    rows = read_csv(path) if path.suffix == ".csv" else read_jsonl(path)
    columns = HUB[name][2]
    assert all(list(row) == list(columns) for row in rows)
    return [{column: row[column] if columns[column] == STRING else int(row[column]) for column in columns} for row in rows]


def on_the_hub(name: str, split: str) -> datasets.Dataset:
    rows, columns = rows_of(name, split), HUB[name][2]
    values = {column: [bool(row[column]) if columns[column].dtype == "bool" else row[column] for row in rows] for column in columns}
    return datasets.Dataset.from_dict(values, features=columns)


def written(folder: Path, name: str, kind: str, splits=None) -> Path:
    """A folder of data that holds a task's splits in one kind of file."""
    (folder / name).mkdir(parents=True)
    for split in splits or (SOURCES[name].train, SOURCES[name].queries):
        path = folder / name / f"{split}.{kind}"
        if kind == "parquet":
            pq.write_table(on_the_hub(name, split).with_format("arrow")[:], path)
        else:
            write(path, on_the_hub(name, split).to_list())
    return folder


def write(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)


# A folder


@on_all_tasks
def test_csv_jsonl_and_parquet_give_the_same_episode(model, tmp_path, name):
    given = digests(load_task(name, data=FIXTURES), model)
    for kind in ("csv", "jsonl", "parquet"):
        assert digests(load_task(name, data=written(tmp_path / kind, name, kind)), model) == given
        assert digests(load_task(name, data=str(tmp_path / kind)), model) == given
    assert len(set(given)) == 3


def test_the_folder_may_be_given_by_the_environment_and_an_argument_wins_over_it(monkeypatch, model, tmp_path):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    monkeypatch.setenv("ICLGD_DATA", str(FIXTURES))
    assert digests(load_task("sst2"), model) == digests(load_task("sst2", data=FIXTURES), model)
    monkeypatch.setenv("ICLGD_DATA", str(tmp_path / "absent"))
    with pytest.raises(NotADirectoryError, match=r"the data folder .*absent is not there"):
        load_task("sst2")
    assert load_task("sst2", data=FIXTURES).name == "sst2"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_wrong_column_is_named_with_file_and_row(tmp_path, kind, split):
    folder = written(tmp_path, "sst2", kind)
    path = folder / "sst2" / f"{split}.{kind}"
    rows = [{"text": row["sentence"], "label": row["label"]} for row in rows_of("sst2", split)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write(path, rows)
    with pytest.raises(ValueError, match=rf"sst2.{split}\.{kind}, row 1: no column 'sentence'; it has text, label"):
        load_task("sst2", data=folder)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(("name", "column", "value"), [("cb", "label", -1), ("sst2", "label", 2), ("trec", "coarse_label", 6)])
def test_a_label_out_of_range_is_named_with_file_row_column_and_value(tmp_path, kind, name, column, value):
    folder = written(tmp_path, name, kind)
    path = folder / name / f"train.{kind}"
    rows = rows_of(name, "train")
    rows[4][column] = value
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write(path, rows)
    with pytest.raises(
        ValueError, match=rf"{name}.train\.{kind}, row 5: unknown label '?{value}'? in column '{column}'; known: 0, 1"
    ):
        load_task(name, data=folder)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(NotADirectoryError, match=r"the data folder .*absent is not there"):
        load_task("sst2", data=tmp_path / "absent")
    wanted = r"task 'sst2' needs train\.csv or train\.jsonl or train\.parquet in .*sst2, which "
    with pytest.raises(FileNotFoundError, match=wanted + "is not there"):
        load_task("sst2", data=tmp_path)
    (tmp_path / "sst2").mkdir()
    with pytest.raises(FileNotFoundError, match=wanted + "holds nothing"):
        load_task("sst2", data=tmp_path)
    (tmp_path / "sst2" / "train.tsv").touch()
    with pytest.raises(FileNotFoundError, match=wanted + r"holds train\.tsv"):
        load_task("sst2", data=tmp_path)
    written(tmp_path / "one", "sst2", "csv", splits=["train"])
    with pytest.raises(FileNotFoundError, match=r"needs validation\.csv or .*which holds train\.csv"):
        load_task("sst2", data=tmp_path / "one")


def test_two_files_of_one_split_are_refused(tmp_path):
    folder = written(tmp_path, "sst2", "csv")
    write(folder / "sst2" / "train.jsonl", rows_of("sst2", "train"))
    with pytest.raises(ValueError, match=r"sst2 holds train\.csv and train\.jsonl; keep one of them"):
        load_task("sst2", data=folder)


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    folder = written(tmp_path, "sst2", "parquet")
    (folder / "sst2" / "train.parquet").write_text("sentence,label\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train\.parquet cannot be read as parquet"):
        load_task("sst2", data=folder)


# The hub


class Hub:
    """Stands in for `datasets.load_dataset`: answers from the fixtures and remembers what it was asked."""

    def __init__(self, name: str, scripted: bool = False) -> None:
        self.name, self.scripted, self.asked = name, scripted, []

    def __call__(self, path, config=None, *, split, revision=None):
        self.asked.append((path, config, split, revision))
        if self.scripted and revision is None:
            raise RuntimeError(f"Dataset scripts are no longer supported, but found {path.split('/')[-1]}.py")
        return on_the_hub(self.name, split)


@on_all_tasks
def test_the_hub_is_asked_for_the_data_set_and_gives_the_episode_that_a_folder_gives(monkeypatch, model, name):
    hub = Hub(name)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    task = load_task(name)
    path, config, _ = HUB[name]
    assert hub.asked == [(path, config, split, None) for split in ("train", QUERY_SPLITS[name])]
    assert digests(task, model) == digests(load_task(name, data=FIXTURES), model)


def test_a_data_set_that_is_a_script_is_asked_for_again_as_the_hub_converted_it(monkeypatch, model):
    hub = Hub("trec", scripted=True)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    task = load_task("trec")
    revisions = [("train", None), ("train", "refs/convert/parquet"), ("test", None), ("test", "refs/convert/parquet")]
    assert hub.asked == [("CogComp/trec", None, *asked) for asked in revisions]
    assert digests(task, model) == digests(load_task("trec", data=FIXTURES), model)


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), ConnectionError("no route to a script")])
def test_other_failures_are_not_asked_for_again(monkeypatch, error):
    asked = []

    def fail(path, config, **options):
        asked.append(options)
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(OSError, match=str(error)) as raised:
        load_task("trec")
    assert asked == [{"split": "train"}]
    assert raised.value.__cause__ is error


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records = []

    def emit(self, record) -> None:
        self.records.append(record.getMessage())


@pytest.mark.parametrize(
    ("name", "what", "columns"),
    [
        ("sst2", r"nyu-mll/glue \(sst2\)", "splits 'train' and 'validation', with the columns sentence, label"),
        ("subj", "SetFit/subj", "splits 'train' and 'test', with the columns text, label"),
    ],
)
def test_a_hub_out_of_reach_gives_one_error_that_says_what_to_do(monkeypatch, name, what, columns):
    def fail(*args, **kwargs):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        logging.getLogger("datasets.load").warning("Using the latest cached version")
        raise ConnectionError("Couldn't reach the hub\nand a long story")

    heard, loggers = Records(), [logging.getLogger(name) for name in ("huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    monkeypatch.setattr(datasets, "load_dataset", fail)
    for logger in loggers:
        monkeypatch.setattr(logger, "handlers", [heard])
    with pytest.raises(OSError, match=rf"cannot load the data set {what} from the hub or its local cache: Couldn't reach") as error:
        load_task(name)
    message = str(error.value)
    assert columns in message
    assert "as data= or in ICLGD_DATA" in message
    assert "\n" not in message
    assert isinstance(error.value.__cause__, ConnectionError)
    assert heard.records == []
    assert [logger.level for logger in loggers] == levels
    logging.getLogger("datasets.load").warning("heard again")
    assert heard.records == ["heard again"]


def test_a_column_that_the_hub_s_data_set_lacks_is_named(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: on_the_hub("sst2", "train").remove_columns("sentence"))
    with pytest.raises(ValueError, match=r"nyu-mll/glue \(sst2\), train: no column 'sentence'; it has label, idx"):
        load_task("sst2")


def test_an_unlabelled_split_of_the_hub_is_refused_by_name(monkeypatch):
    def unlabelled(*args, split, **kwargs):
        return on_the_hub("sst2", split).map(lambda row: {"label": -1}, load_from_cache_file=False)

    monkeypatch.setattr(datasets, "load_dataset", unlabelled)
    with pytest.raises(ValueError, match=r"nyu-mll/glue \(sst2\), train, row 1: unknown label -1 in column 'label'"):
        load_task("sst2")


# The cache of `datasets`

ASK_OFFLINE = """
import sys
from iclgd_lens.data.registry import load_task
for name in sys.argv[1:]:
    try:
        draw = load_task(name).draw(6, 4, 1)
        print([(example.fields, example.label) for example in (*draw.demonstrations, *draw.queries)])
    except OSError as error:
        print(error)
"""


def fill_cache(cache: Path, scratch: Path, name: str, place: str) -> None:
    """Prepare a task's data set as `datasets` does with one from the hub, and put it into its place in a cache."""
    path, config, columns = HUB[name]
    files = {split: scratch / f"{name}-{split}.jsonl" for split in ("train", QUERY_SPLITS[name])}
    for split, file in files.items():
        write(file, rows_of(name, split))
    data_files = DataFilesDict.from_patterns({split: [str(file)] for split, file in files.items()})
    configs = [Json.BUILDER_CONFIG_CLASS(config or "default", data_files=data_files)]
    named = path.split("/")[-1]
    builder = configure_builder_class(Json, configs, default_config_name=None, dataset_name=named)(
        cache_dir=str(scratch / "prepared"),
        dataset_name=named,
        config_name=config,
        hash="0" * 40,
        info=datasets.DatasetInfo(features=columns),
    )
    builder.download_and_prepare()
    shutil.copytree(builder.cache_dir, cache / place / "0.0.0" / ("0" * 40))


def test_a_data_set_in_the_cache_is_read_without_a_connection_or_a_word(tmp_path):
    cache, names = tmp_path / "cache", ["subj", "sst2", "mr"]
    fill_cache(cache, tmp_path, "subj", "SetFit___subj/default")
    fill_cache(cache, tmp_path, "sst2", "nyu-mll___glue/sst2")
    done = subprocess.run(
        [sys.executable, "-c", ASK_OFFLINE, *names],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "HF_DATASETS_CACHE": str(cache)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    *found, refused = done.stdout.splitlines()
    for name, shown in zip(names, found, strict=False):
        draw = load_task(name, data=FIXTURES).draw(6, 4, 1)
        assert shown == str([(example.fields, example.label) for example in (*draw.demonstrations, *draw.queries)])
    assert refused.startswith(
        "cannot load the data set cornell-movie-review-data/rotten_tomatoes from the hub or its local cache: "
    )
    assert "cache" not in done.stderr
