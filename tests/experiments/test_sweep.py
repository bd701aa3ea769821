"""Sweeps with real workers: whatever is killed, damaged or interrupted, every cell ends up there, and every row once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from submitit.core.submission import process_job
from submitit.core.utils import UncompletedJobError
from submitit.slurm.test_slurm import mocked_slurm

from iclgd_lens import Study, load_results, run_sweep
from iclgd_lens.experiments.grid import Grid
from iclgd_lens.experiments.sweep import Plan, Progress
from iclgd_lens.experiments.sweep_folder import SweepFolder
from iclgd_lens.experiments.sweep_worker import Worker, work
from tests.experiments.trivial_cells import Trivial

SMALL = {"models": "bundled", "tasks": ["bundled/remapped", "bundled/natural"], "seeds": [0, 1, 2], "k": [2, 4], "lr": [0.01, 0.1]}
HERE = {"kind": "debug"}


def study(**changes: Any) -> Study:
    return Study(**{"executor": HERE, **SMALL, **changes})


def local(workers: int = 1) -> dict[str, Any]:
    return {"kind": "local", "workers": workers, "threads": 1, "gpus": 0}


def begun(file: Path) -> Counter[str]:
    return Counter(file.read_text().split()) if file.exists() else Counter()


def require_whole(out: Path, of: Study) -> None:
    """Every cell is there, and every row exactly once."""
    plan = Plan.of(Grid.of(of), SweepFolder(out))
    assert (plan.failed, plan.damaged, plan.open) == ((), {}, ())
    frame = load_results(out).frame()
    assert len(frame) == len(plan.done) == len(list(out.glob("cells/*/*.parquet")))
    assert not frame.duplicated(["task", "k", "seed", "order", "model", "method", "lr", "control"]).any()
    assert not list(out.rglob("*.partial"))
    assert not list(out.glob("running/*"))


def until(happens: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := happens():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen")


def running_process(out: Path, after: int = 3) -> int | None:
    """The process that is at a cell, when so many are done."""
    if len(list(out.glob("cells/*/*.parquet"))) < after:
        return None
    for file in out.glob("running/*.json"):
        try:
            return json.loads(file.read_text())["process"]
        except (FileNotFoundError, ValueError):
            continue
    return None


class InBackground(threading.Thread):
    """A sweep beside the test."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__()
        self.run_it = partial(run_sweep, *arguments, **options)
        self.start()

    def run(self) -> None:
        self.outcome = self.run_it()


def test_what_is_there_is_not_run_again(tmp_path):
    started = tmp_path / "started"
    first = run_sweep(study(), tmp_path / "out", maker=partial(Trivial, started=started))
    assert (first.was_done, first.done, first.failed, first.open) == (0, 12 * (9 + 9), 0, 0)
    require_whole(tmp_path / "out", study())
    again = run_sweep(study(), tmp_path / "out", maker=partial(Trivial, started=started))
    assert (again.was_done, again.done) == (12 * 18, 0)
    assert set(begun(started).values()) == {1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    run_sweep(study(), out, maker=Trivial)
    return out


@pytest.mark.parametrize(
    ("change", "n_made"),
    [
        ({"lr": [0.01, 0.1, 1.0]}, 12 * 8),
        ({"lr": [0.1]}, 0),
        ({"controls": ["random", "permuted"]}, 12 * 4),
        ({"seeds": [0, 1, 2, 3]}, 4 * 18),
        ({"k": [2, 4, 8]}, 6 * 18),
        ({"orders": 2}, 12 * 18),
        ({"twins": ["untrained", "untrained, ln kept"]}, 12 * 9),
        ({"queries": 3}, 12 * 18),
        ({"updates": {"loss_on": "label"}}, 12 * 18),
        ({"batch_size": 3}, 0),
        ({"executor": {"kind": "local"}}, 0),
    ],
    ids=str,
)
def test_only_what_an_option_touches_is_made(finished, change, n_made):
    plan = Plan.of(Grid.of(study(**change)), SweepFolder(finished))
    assert len(plan.open) == n_made


def test_cells_are_the_comparison_s_rows(bundled, tmp_path):
    """Cell by cell, the numbers of `compare` on the same episode."""
    from iclgd_lens import compare, load_task

    chosen = study(
        tasks="bundled/remapped", seeds=[3], k=[4], queries=6, lr=[0.1], controls=["random", "shuffled_labels"], twins=[]
    )
    outcome = run_sweep(chosen, tmp_path)
    assert outcome.failed == 0
    episode = load_task("bundled/remapped").episode(bundled, k=4, n_queries=6, seed=3)
    expected = compare(bundled, episode, lr=0.1, controls=("random", "shuffled_labels"))
    found = load_results(tmp_path)
    for part in ("frame", "queries", "gradients", "heads", "per_query"):
        want = getattr(expected, part)
        by = [column for column in want if column not in ("value", "probability", "gradient_norm")]
        got = found.frame(part)[list(want)].sort_values(by, ignore_index=True)
        want = want.sort_values(by, ignore_index=True)
        assert len(got) == len(want) > 0
        for column in want:
            if column in ("value", "probability", "gradient_norm"):
                assert got[column].to_numpy() == pytest.approx(want[column].to_numpy(), abs=1e-6, nan_ok=True)
            else:
                assert got[column].astype(object).fillna("–").tolist() == want[column].astype(object).fillna("–").tolist()


def test_a_group_runs_its_queries_in_context_once(tmp_path, monkeypatch):
    from iclgd_lens.experiments import cell_runs

    made = Counter()

    def counting(name, function):
        def counted(*arguments, **options):
            made[name] += 1
            return function(*arguments, **options)

        return counted

    monkeypatch.setattr(cell_runs.Reference, "of", counting("runs", cell_runs.Reference.of))
    monkeypatch.setattr(cell_runs.Reference, "_update", counting("updates", cell_runs.Reference._update))
    monkeypatch.setattr(cell_runs, "load_model", counting("models", cell_runs.load_model))
    monkeypatch.setattr(cell_runs, "untrained_twin", counting("twins", cell_runs.untrained_twin))
    chosen = study(seeds=[0], k=[4], queries=2, controls=["random", "shuffled_labels"])
    run_sweep(chosen, tmp_path)
    groups = 2
    # Two rates of two methods; shuffled labels, of the trained model alone, are updates of their own.
    assert made == {"models": 1, "twins": 1, "runs": 2 * groups, "updates": groups * (4 + 4) + groups * 4}


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(tmp_path):
    # At this rate updates become non-finite.
    chosen = study(tasks="bundled/remapped", seeds=[0], k=[4], queries=2, lr=[0.01, 1e30], twins=[])
    told: list[Progress] = []
    outcome = run_sweep(chosen, tmp_path, on_progress=told.append)
    assert (outcome.done, outcome.failed) == (5, 4)
    assert (told[-1].done, told[-1].failed, told[-1].open) == (5, 4, 0)
    failures = SweepFolder(tmp_path).failures()
    assert all("DivergedError" in failure.reason and "1e+30" in failure.about for failure in failures)
    assert all("Traceback" in failure.trace for failure in failures)
    again = run_sweep(chosen, tmp_path, maker=Trivial)
    assert (again.was_done, again.done, again.failed) == (5, 0, 4)
    retried = run_sweep(chosen, tmp_path, maker=Trivial, retry_failed=True)
    assert (retried.was_done, retried.done, retried.failed) == (5, 4, 0)


def test_running_out_of_memory_fails_a_cell_and_lets_go_of_what_was_kept(tmp_path, monkeypatch):
    from iclgd_lens.experiments import cell_runs

    def too_large(self, rows, finetuned, gd_run=None):
        raise MemoryError

    monkeypatch.setattr(cell_runs.Reference, "add_finetuned", too_large)
    outcome = run_sweep(study(tasks="bundled/remapped", seeds=[0], k=[4], queries=2, lr=[0.01], twins=[]), tmp_path)
    assert (outcome.done, outcome.failed) == (3, 2)  # what is there without an update, and two controls
    assert {failure.reason for failure in SweepFolder(tmp_path).failures()} == {"MemoryError"}


def test_a_model_that_does_not_load_fails_its_cells_alone(tmp_path, monkeypatch):
    from iclgd_lens.experiments import cell_runs

    load, asked = cell_runs.load_model, []

    def unless_double(name, **options):
        asked.append(str(options["dtype"]))
        if str(options["dtype"]) == "torch.float64":
            raise OSError("the hub is away")
        return load(name, **options)

    monkeypatch.setattr(cell_runs, "load_model", unless_double)
    models = [{"name": "bundled", "dtype": "float64"}, {"name": "bundled"}]
    outcome = run_sweep(study(models=models, tasks="bundled/remapped", seeds=[0], k=[4], queries=2, lr=[0.01]), tmp_path)
    assert (outcome.done, outcome.failed) == (10, 10)
    assert asked == ["torch.float64", "torch.float32"]  # once, and not for every cell
    assert "OSError: the hub is away" in {failure.reason for failure in SweepFolder(tmp_path).failures()}


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:60] + b"\0\0" + data[62:], lambda data: b"PAR1"])
def test_damaged_files_are_reported_left_out_and_made_anew(tmp_path, caplog, damage):
    run_sweep(study(), tmp_path, maker=Trivial)
    files = sorted(tmp_path.glob("cells/*/*.parquet"))
    for file in files[:2]:
        file.write_bytes(damage(file.read_bytes()))
    files[2].write_bytes(files[3].read_bytes())  # another cell's
    results = load_results(tmp_path)
    assert len(results.damaged) == 3
    assert len(results.frame()) == results.cells == len(files) - 3
    outcome = run_sweep(study(), tmp_path, maker=Trivial)
    assert set(outcome.damaged) == {file.stem for file in files[:3]}
    assert outcome.done == 3
    assert "is made anew" in caplog.text
    require_whole(tmp_path, study())


def require_one_cell_lost(tmp_path: Path, number: signal.Signals) -> None:
    """A sweep whose worker gets a signal in the middle of a cell ends whole, and begins one cell at most twice."""
    started, out, chosen = tmp_path / "started", tmp_path / "out", study(executor=local())
    sweep = InBackground(chosen, out, maker=partial(Trivial, started=started, pause=0.02))
    os.kill(until(lambda: running_process(out)), number)
    sweep.join()
    assert sweep.outcome.failed == 0
    require_whole(out, chosen)
    assert sorted(begun(started).values())[-2:] in ([1, 1], [1, 2])


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_only_the_cell_that_it_was_at(tmp_path):
    require_one_cell_lost(tmp_path, signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_that_is_told_to_stop_is_queued_again_and_goes_on(tmp_path):
    require_one_cell_lost(tmp_path, signal.SIGUSR2)
    assert any("Requeued" in log.read_text() for log in (tmp_path / "out").glob("jobs/*/*log*"))


@pytest.mark.slow
def test_a_cell_that_kills_every_worker_fails_and_the_others_are_made(tmp_path):
    chosen = study(tasks="bundled/remapped", seeds=[0], k=[2], executor=local(), twins=[])
    outcome = run_sweep(chosen, tmp_path, maker=partial(Trivial, deadly="gd at 0.1"))
    assert (outcome.done, outcome.failed) == (8, 1)
    (failure,) = SweepFolder(tmp_path).failures()
    assert "gd at 0.1" in failure.about
    assert "killed 2 times" in failure.reason


@pytest.mark.slow
def test_two_sweeps_in_one_folder_share_the_work(tmp_path):
    started, out = tmp_path / "started", tmp_path / "out"
    make = partial(Trivial, started=started, pause=0.01)
    one, other = study(executor=local()), study(executor=local(), seeds=[1, 2, 3])
    sweeps = [InBackground(chosen, out, name=name, maker=make) for name, chosen in (("one", one), ("other", other))]
    for sweep in sweeps:
        sweep.join()
        assert (sweep.outcome.failed, sweep.outcome.open) == (0, 0)
    assert set(begun(started).values()) == {1}
    require_whole(out, study(seeds=[0, 1, 2, 3]))
    assert len(load_results(out, "one").frame()) == len(load_results(out, "other").frame()) == 12 * 18
    assert len(load_results(out).frame()) == 16 * 18


SCRIPT = """
import sys
from functools import partial
from pathlib import Path
from iclgd_lens import Study, run_sweep
from tests.experiments.trivial_cells import Trivial
study = Study.model_validate_json(sys.argv[1])
run_sweep(study, sys.argv[2], maker=partial(Trivial, started=Path(sys.argv[3]), pause=0.02))
"""


@pytest.mark.slow
def test_an_interrupt_ends_the_workers_and_a_second_run_goes_on(tmp_path):
    started, out, chosen = tmp_path / "started", tmp_path / "out", study(executor=local(2))
    arguments = [sys.executable, "-c", SCRIPT, chosen.model_dump_json(), str(out), str(started)]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE) as process:
        worker = until(lambda: running_process(out))
        process.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in process.communicate()[1]
    until(lambda: not os.path.exists(f"/proc/{worker}"))
    before = {file: file.stat().st_mtime_ns for file in out.glob("cells/*/*.parquet")}
    assert 3 <= len(before) < 12 * 18
    run_sweep(chosen.model_copy(update={"executor": study().executor}), out, maker=partial(Trivial, started=started))
    require_whole(out, chosen)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    # Two workers lose a cell each.
    assert sum(begun(started).values()) - len(begun(started)) <= 2


def test_a_worker_whose_model_changed_since_the_plan_says_so(tmp_path):
    with pytest.raises(RuntimeError, match="weights of a model have changed"):
        Worker(study(), ("another",), tmp_path, tmp_path / "open.txt", index=0, of=1)()


@pytest.mark.slow
def test_workers_that_end_without_a_cell_are_not_started_for_ever(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)ended without having run a cell.*ZeroDivisionError"):
        run_sweep(study(executor=local()), tmp_path, maker=_broken)


def _broken(grid: Grid) -> Any:
    return 1 // 0


def test_a_job_whose_time_is_up_fails_no_cell(tmp_path):
    grid, folder = Grid.of(study()), SweepFolder(tmp_path)

    def stopped(group, cell):
        raise UncompletedJobError("timed out too many times")

    wanted = frozenset(cell.digest for group in grid.groups for cell in group.cells)
    with pytest.raises(UncompletedJobError):
        work(grid, folder, wanted, stopped)
    assert folder.failures() == []
    assert not list(tmp_path.glob("running/*"))


SLURM = {"kind": "slurm", "workers": 3, "parallel": 2, "partition": "gpu", "account": "mine", "gpus": 1, "cpus": 6, "mem_gb": 48}
SLURM |= {"timeout_min": 90, "setup": ["source activate lens"], "more": {"exclude": "node7"}, "requeues": 4}


def test_the_submission_script_asks_for_what_the_study_says(tmp_path):
    with mocked_slurm():
        outcome = run_sweep(study(executor=SLURM), tmp_path, maker=Trivial, wait=False)
    assert outcome.open == 12 * 18
    (script,) = tmp_path.glob("jobs/*/*submission.sh")
    text = script.read_text()
    for line in (
        "#SBATCH --array=0-2%2",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=mine",
        "#SBATCH --gpus-per-node=1",
        "#SBATCH --cpus-per-task=6",
        "#SBATCH --mem=48GB",
        "#SBATCH --time=90",
        "#SBATCH --exclude=node7",
        "#SBATCH --signal=USR2@90",
        "#SBATCH --job-name=iclgd",
        "source activate lens",
    ):
        assert line in text.splitlines(), text


def test_jobs_of_an_array_run_the_cells_and_are_requeued_when_their_time_is_up(tmp_path):
    chosen = study(executor={**SLURM, "cpus": 1})
    with mocked_slurm() as mock:
        run_sweep(chosen, tmp_path, maker=Trivial, wait=False)
        (folder,) = tmp_path.glob("jobs/*")
        for index in range(3):
            with mock.job_context(f"12_{index}"):
                process_job(folder)
    require_whole(tmp_path, chosen)


def test_without_a_cluster_the_executor_says_what_it_needs(tmp_path):
    with pytest.raises(ValueError, match="needs a machine of a SLURM cluster"):
        run_sweep(study(executor=SLURM), tmp_path, maker=Trivial)


def test_a_hundred_cells_more_are_planned_without_a_model(tmp_path, monkeypatch):
    from iclgd_lens.experiments import cell_runs

    monkeypatch.setattr(cell_runs, "load_model", None)
    assert len(Plan.of(Grid.of(study(seeds=range(20))), SweepFolder(tmp_path)).open) == 80 * 18
