"""A protocol fills in the paper's settings and refuses what cannot be run, before anything is."""

import json
from dataclasses import asdict

import pytest

from iclgd_lens.experiments.drawing import load_tasks
from iclgd_lens.experiments.learning_rate import UPDATE_OPTIONS
from iclgd_lens.experiments.paper import PAPER, reported
from iclgd_lens.experiments.protocol import TWINS, Protocol
from tests.tokenizers_zoo import FIXTURES


def test_defaults_of_the_paper_s_tasks_are_the_paper_s():
    protocol = Protocol(tuple(PAPER), lr="paper", controls=())
    plans = {task: protocol.plan(task) for task in PAPER}
    seeds = {"sst2": (2, 3, 4), "sst5": (5, 6, 7), "mr": (5, 6, 7), "subj": (4, 5, 6), "agnews": (3, 4, 5), "cb": (3, 4, 5)}
    assert {task: plan.seeds for task, plan in plans.items()} == seeds
    assert {(plan.k, plan.n_queries) for plan in plans.values()} == {("fit", 2000)}
    rates = {"sst2": 0.0005, "sst5": 0.00016, "mr": 0.003, "subj": 0.003, "agnews": 0.2, "cb": 0.08}
    assert {task: PAPER[task].lr for task in PAPER} == rates


def test_reported_figures_are_the_paper_s():
    assert reported("agnews", "sim_am_delta") == (0.505, 0.432)
    assert reported("cb", "sim_aou_norm") == (0.205, 0.344)
    assert reported("cb", "sim_aou") is None
    assert reported("bundled/natural", "sim_am_delta") is None


def test_bundled_and_other_tasks_have_defaults_of_their_own():
    protocol = Protocol(("bundled/natural", "rte"))
    assert protocol.plan("bundled/natural").seeds == tuple(range(10))
    assert (protocol.plan("bundled/natural").k, protocol.plan("bundled/natural").n_queries) == (12, 32)
    assert protocol.plan("rte").seeds == (0, 1, 2)


def test_what_is_given_wins_over_defaults():
    plan = Protocol(("sst2",), seeds=(9,), k=4, n_queries=7, n_tuning_seeds=2).plan("sst2")
    assert (plan.seeds, plan.k, plan.n_queries, plan.tuning_seeds) == ((9,), 4, 7, (1000, 1001))


def test_options_that_are_not_given_are_the_defaults():
    assert Protocol(("sst2",), options={"loss_on": "label"}).options == {**UPDATE_OPTIONS, "loss_on": "label"}


def test_tuning_seeds_are_never_reported_seeds():
    plan = Protocol(("sst2",), seeds=(1000, 1001)).plan("sst2")
    assert not set(plan.tuning_seeds) & set(plan.seeds)


def test_the_other_task_is_the_next_one_or_the_one_named():
    protocol = Protocol(("sst2", "mr"), controls=("other_task",))
    assert (protocol.other("sst2"), protocol.other("mr")) == ("mr", "sst2")
    assert Protocol(("sst2",), controls=("other_task",), other_task="cb").other("sst2") == "cb"
    assert Protocol(("sst2",), other_task="cb").other("sst2") is None


def test_twins_keep_what_the_paper_s_two_baselines_keep():
    assert set(map(frozenset, TWINS.values())) == {frozenset({"embed", "pos_embed", "ln", "unembed"}), frozenset({"ln"})}


def test_a_protocol_reads_generators_once():
    protocol = Protocol(iter(("sst2", "mr")), seeds=iter((1, 2)), methods=iter(("gd",)), controls=iter(()), grid=iter((0.1,)))
    assert (protocol.tasks, protocol.seeds, protocol.methods, protocol.controls) == (("sst2", "mr"), (1, 2), ("gd",), ())


def test_the_separator_and_the_space_are_kept_and_reach_every_task():
    protocol = Protocol(("sst2", "mr"), controls=("other_task",), other_task="cb", separator="\n", space_before_labels=False)
    read = Protocol.from_json(json.loads(json.dumps(asdict(protocol))))
    assert (read.separator, read.space_before_labels) == ("\n", False)
    formats = {name: task.format for name, task in load_tasks(read, FIXTURES).items()}
    assert formats.keys() == {"sst2", "mr", "cb"}
    assert {(each.separator, each.space_before_labels) for each in formats.values()} == {("\n", False)}


def test_a_protocol_of_before_there_were_these_options_is_read():
    written = {
        name: value for name, value in asdict(Protocol(("sst2",))).items() if name not in ("separator", "space_before_labels")
    }
    assert Protocol.from_json(written) == Protocol(("sst2",))


def test_unknown_tasks_are_refused_before_a_run_and_not_where_a_protocol_is_read():
    for options, message in (({"tasks": ("sst3",)}, "unknown task 'sst3'"), ({"other_task": "nope"}, "unknown task 'nope'")):
        read = Protocol.from_json(asdict(Protocol(**{"tasks": ("sst2",), **options})))
        with pytest.raises(ValueError, match=message):
            read.require_tasks()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ()}, "no tasks"),
        ({"tasks": ("sst2", "sst2")}, "tasks names 'sst2' twice"),
        ({"seeds": (1, 1)}, "seeds names 1 twice"),
        ({"controls": ("random", "random")}, "controls names 'random' twice"),
        ({"methods": ("gd", "gd")}, "methods names 'gd' twice"),
        ({"k": 0}, "k must be a number of demonstrations, at least 1, or 'fit'; got 0"),
        ({"k": "all"}, "k must be a number of demonstrations"),
        ({"seeds": ()}, "seeds must be at least one"),
        ({"orders": 0}, "orders must be at least 1, got 0"),
        ({"n_queries": 0}, "n_queries must be at least 1"),
        ({"n_tuning_seeds": 0}, "n_tuning_seeds must be at least 1"),
        ({"lr": "best"}, "lr must be 'auto', 'paper' or a number, got 'best'"),
        ({"lr": -1.0}, "finite and not negative, got -1.0"),
        ({"lr": float("nan")}, "finite and not negative"),
        ({"tasks": ("rte",), "lr": "paper"}, "no learning rate for task 'rte'"),
        ({"grid": ()}, "grid must be learning rates above 0"),
        ({"grid": (0.0,)}, "grid must be learning rates above 0"),
        ({"methods": ()}, "methods must be some of"),
        ({"methods": ("adam",)}, "methods must be some of gd, lcgd; got 'adam'"),
        ({"controls": ("noise",)}, "controls must be some of"),
        ({"controls": ("other_task",)}, "needs a task other than 'sst2'"),
        ({"controls": ("other_task",), "other_task": "sst2"}, "needs a task other than 'sst2'"),
        ({"twins": ("random",)}, "twins must be some of"),
        ({"options": {**UPDATE_OPTIONS, "readout": "labels"}}, "needs loss_on='label'"),
        ({"options": {**UPDATE_OPTIONS, "epochs": 0}}, "epochs must be at least 1"),
        ({"separator": 3}, "the separator must be text, got 3"),
        ({"space_before_labels": "no"}, "space_before_labels must be True or False, got 'no'"),
        ({"tasks": {"sst2", "mr"}}, "tasks must be given in an order"),
        ({"tasks": "sst2"}, "tasks must be several items in an order, .* got str 'sst2'"),
        ({"seeds": 3}, "seeds must be several items in an order"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**{"tasks": ("sst2",), **options})
