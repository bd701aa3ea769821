"""Studies are checked before anything runs: every problem with its line and reason."""

from pathlib import Path

import pytest
import torch

from iclgd_lens import Study
from iclgd_lens.experiments.grid import Grid
from iclgd_lens.experiments.sweep_worker import threads_of
from tests.tokenizers_zoo import FIXTURES

GOOD = "models: bundled\ntasks: bundled/remapped\nseeds: [0, 1]\nlr: 0.1\n"
EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "studies").glob("*.yaml"))


def read(tmp_path: Path, text: str) -> Study:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    return Study.read(file)


def test_what_is_left_out_has_defaults_and_lists_of_one_need_no_brackets(tmp_path):
    study = read(tmp_path, GOOD)
    assert (study.lr, study.k, study.methods, study.controls) == ((0.1,), ("fit",), ("gd", "lcgd"), ("random",))
    assert study.models[0].name == "bundled"
    assert study.executor.kind == "local"


@pytest.mark.parametrize(
    ("more", "line", "message"),
    [
        ("colour: red", 5, "colour: there is no such key"),
        ("k: [4, many]", 5, "k: .*got 'many'"),
        ("k: 0", 5, "k: .*got 0"),
        ("seeds: 3", 5, "seeds: this key is there twice"),
        ("methods: [gd, adam]", 5, "methods: .*'gd' or 'lcgd', got 'adam'"),
        ("methods: [gd, gd]", 5, "methods: 'gd' is named twice"),
        ("controls: [shuffle]", 5, "controls: .*'shuffled_labels'.*got 'shuffle'"),
        ("twins: untrain", 5, "twins must be some of untrained, .*'untrain'"),
        ("controls: other_task", 1, "other_task: .*needs a task other than 'bundled/remapped'"),
        ("other_task: bundled/natural", 5, "which is not among the controls"),
        ("controls: other_task\nother_task: bundled/remapped", 6, "is one of the tasks itself"),
        ("controls: other_task\nother_task: bundled/natral", 6, "did you mean 'bundled/natural'"),
        ("updates: {readout: labels}", 5, "needs loss_on='label'"),
        ("updates:\n  - {epochs: 0}", 6, "updates.epochs: .*got 0"),
        ("executor: {kind: slrum}", 5, "'local', 'slurm', 'debug'"),
        ("executor:\n  kind: local\n  wrokers: 2", 7, "executor.wrokers: there is no such key"),
        ("executor: {kind: local, gpus: 99}", 5, "gpus is 99, but this machine has"),
        ("queries: -1", 5, "queries: .*got -1"),
        ("separator: 3", 5, "separator: .*got 3"),
        (r"separator: a\d", 5, r"separator: the separator has \\d"),
        ("space_before_labels: maybe", 5, "space_before_labels: .*got 'maybe'"),
    ],
)
def test_every_problem_has_its_line_and_reason(tmp_path, more, line, message):
    with pytest.raises(ValueError, match=rf"study\.yaml, line {line}: .*{message}"):
        read(tmp_path, GOOD + more)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("bundled\n", "gtp2\n", 1), r"line 1: models: unknown model 'gtp2'; did you mean"),
        (GOOD.replace("bundled/remapped", "sts2"), r"line 2: tasks: unknown task 'sts2'; did you mean 'sst2'"),
        (GOOD.replace("0.1", "paper"), r"line 4: lr: the paper has no learning rate for task 'bundled/remapped'"),
        (GOOD.replace("0.1", "-1"), "line 4: lr: .*got -1"),
        (GOOD.replace("0.1", ".nan"), "line 4: lr: "),
        (GOOD.replace("[0, 1]", "[0, 1, 0]"), "line 3: seeds: 0 is named twice"),
        (GOOD.replace("lr: 0.1", ""), "lr: this is needed"),
        (GOOD.replace("bundled\n", "{name: bundled, dtype: float7}\n", 1), "line 1: models.dtype: .*got 'float7'"),
        (GOOD.replace("bundled\n", "{name: bundled, device: 'cuda:99'}\n", 1), "cuda:99' is not available"),
        ("a: b: c", "line 1: this is not YAML"),
        ("- bundled", "a study is a mapping"),
        ("", "a study is a mapping"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_all_problems_are_said_at_once(tmp_path):
    with pytest.raises(ValueError, match="colour") as caught:
        read(tmp_path, GOOD + "colour: red\nk: 0\nqueries: 0\n")
    assert str(caught.value).count("study.yaml, line") == 3


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_documentation_s_examples_are_studies(file, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert len(Study.read(file).tasks) > 1


def test_there_are_examples():
    assert {file.stem for file in EXAMPLES} == {"laptop", "gpu-box", "cluster"}


@pytest.mark.parametrize(
    ("executor", "threads"),
    [({"kind": "slurm", "cpus": 6}, 6), ({"kind": "local", "threads": 3}, 3), ({"kind": "local"}, 1), ({"kind": "debug"}, 1)],
)
def test_workers_have_threads_for_their_share(executor, threads):
    study = Study(models="bundled", tasks="bundled/remapped", seeds=0, lr=0.1, executor=executor)
    assert threads_of(study) == threads


def test_other_rows_labels_or_prompts_make_other_cells(tmp_path):
    def digests(text: str) -> set[str]:
        (tmp_path / "sst2").mkdir(exist_ok=True)
        for split in ("train", "validation"):
            (tmp_path / "sst2" / f"{split}.csv").write_text("sentence,label\n" + text)
        study = Study(models="bundled", tasks="sst2", seeds=0, k=1, lr=0.1, data=str(tmp_path))
        return {cell.digest for group in Grid.of(study).groups for cell in group.cells}

    rows = "good,1\nbad,0\n"
    first = digests(rows)
    assert digests(rows) == first
    assert not digests(rows.replace("bad,0", "bad,1")) & first
    assert not digests(rows.replace("bad", "poor")) & first


def test_every_cell_has_a_digest_of_its_own():
    study = Study(
        models=["bundled", {"name": "bundled", "dtype": "float64"}],
        tasks=["bundled/remapped", "bundled/natural"],
        seeds=[0, 1],
        orders=2,
        k=[1, 4, "fit"],
        lr=[0.1, 1],
        controls=["random", "other_task"],
        updates=[{}, {"loss_on": "label"}],
    )
    groups = Grid.of(study).groups
    digests = [cell.digest for group in groups for cell in group.cells]
    assert len(set(digests)) == len(digests)
    # One demonstration has one order.
    assert {group.order for group in groups if group.k == 1} == {0}
    assert {group.order for group in groups if group.k == 4} == {0, 1}


@pytest.mark.parametrize("written", ['"\\n"', r"'\n'", r"\n"])
def test_a_line_break_is_read_in_every_way_that_yaml_writes_it(tmp_path, written):
    assert read(tmp_path, f"{GOOD}separator: {written}").separator == "\n"


def test_other_prompts_make_other_cells_and_the_task_s_own_make_the_same():
    def digests(**written) -> list[str]:
        study = Study(models="bundled", tasks=["bundled/remapped", "sst2"], seeds=0, k=2, lr=0.1, data=str(FIXTURES), **written)
        return [cell.digest for group in Grid.of(study).groups for cell in group.cells]

    variants = [{}, {"separator": " ,"}, {"space_before_labels": False}, {"separator": " ,", "space_before_labels": False}]
    found = [digest for written in variants for digest in digests(**written)]
    assert len(set(found)) == len(found)
    assert digests(space_before_labels=True) == digests()
    assert set(digests(separator="{eos}")) & set(digests())  # sst2's own, and not that of the bundled task


def test_golden_digests_of_cells_whose_prompts_are_written_as_ever():
    study = Study(models="bundled", tasks="bundled/remapped", seeds=0, k=2, lr=0.1)
    assert Grid.of(study).groups[0].digest == "f73d4ef0846f54cd31b3"
