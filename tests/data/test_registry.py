"""Tasks by name: others may add theirs; and what every task by name keeps to: orders, tuning, digests, refusals."""

import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import normalizers

from iclgd_lens.data import registry
from iclgd_lens.data.registry import BUNDLED_TASKS, SOURCES, load_task, register_task, require_tasks, task_names
from iclgd_lens.data.tasks import Task
from tests.tokenizers_zoo import FIXTURES, gpt2_style, llama_style

ROWS = [{"text": text, "label": index % 2} for index, text in enumerate(["one", "two", "three", "four", "five", "six"])]

on_all_tasks = pytest.mark.parametrize("name", list(SOURCES))


@pytest.fixture(autouse=True)
def registry_of_its_own(monkeypatch):
    monkeypatch.setattr(registry, "_MAKERS", dict(registry._MAKERS))


@pytest.fixture(scope="module")
def model():
    return stand_in()


def stand_in(tokenizer=None, n_ctx: int = 2048) -> SimpleNamespace:
    return SimpleNamespace(tokenizer=tokenizer or gpt2_style(), cfg=SimpleNamespace(n_ctx=n_ctx))


def mine(labels=("up", "down")) -> Task:
    return Task.from_rows(ROWS, name="mine", template="{text}:", labels=labels)


def texts(model, examples) -> list[str]:
    return [model.tokenizer.decode(example.tokens) for example in examples]


# Registering


def test_the_names_are_the_bundled_tasks_and_those_of_the_data_sets():
    assert task_names() == [*BUNDLED_TASKS, *SOURCES]
    require_tasks(task_names())


def test_a_registered_task_is_known_and_its_maker_is_given_the_folder(model):
    given = []

    def make(data):
        given.append(data)
        return mine()

    register_task("mine", make)
    assert task_names()[-1] == "mine"
    assert load_task("mine").episode(model, k=2).k == 2
    load_task("mine", data="somewhere")
    assert given == [None, "somewhere"]


def test_a_name_of_this_package_is_refused_and_one_s_own_may_come_again():
    def make(data):
        return mine()

    for name in (*BUNDLED_TASKS, *SOURCES):
        with pytest.raises(ValueError, match=f"there is a task '{name}' already; choose another name"):
            register_task(name, make)
    register_task("mine", lambda data: ROWS)
    register_task("mine", make)
    assert load_task("mine").name == "mine"
    assert task_names().count("mine") == 1


def test_a_maker_that_gives_something_else_is_refused_by_name():
    register_task("mine", lambda data: ROWS)
    with pytest.raises(TypeError, match="the maker of task 'mine' returned list, not a Task"):
        load_task("mine")


@pytest.mark.parametrize(("name", "nearest"), [("sst-2", "sst2"), ("ag_news", "agnews"), ("boolqs", "boolq"), ("minne", "mine")])
def test_an_unknown_name_suggests_the_nearest_and_lists_all(name, nearest):
    register_task("mine", lambda data: mine())
    with pytest.raises(ValueError, match=rf"unknown task '{name}'; did you mean '{nearest}'\? Known tasks: ") as error:
        load_task(name)
    assert all(known in str(error.value).partition("Known tasks: ")[2].split(", ") for known in task_names())


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A package with two tasks, installed where Python finds it."""
    (tmp_path / "some_tasks.py").write_text(
        "from iclgd_lens import Task\n"
        "def make(data):\n"
        "    rows = [{'text': text, 'label': len(text) % 2} for text in ('one', 'four', 'six', 'nine')]\n"
        "    return Task.from_rows(rows, name='its own name', template=f'{data} {{text}}:', labels=['even', 'odd'])\n"
        "def broken(data):\n"
        "    return {'data': data}\n",
        encoding="utf-8",
    )
    info = tmp_path / "some_tasks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-tasks\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        "[iclgd_lens.tasks]\nsome/numbers = some_tasks:make\nsome/broken = some_tasks:broken\nsst2 = some_tasks:broken\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("some_tasks", None)


@pytest.mark.usefixtures("installed")
def test_a_task_of_an_installed_package_is_known_and_loaded_when_asked_for(model):
    assert task_names() == [*BUNDLED_TASKS, *SOURCES, "some/numbers", "some/broken"]
    require_tasks(["some/numbers"])
    assert "some_tasks" not in sys.modules
    task = load_task("some/numbers", data="here")
    assert task.name == "some/numbers"
    assert task.format.template == "here {text}:"
    assert task.episode(model, k=2, n_queries=2).label_words == ("even", "odd")
    with pytest.raises(TypeError, match="the maker of task 'some/broken' returned dict, not a Task"):
        load_task("some/broken")
    with pytest.raises(ValueError, match="did you mean 'some/numbers'"):
        load_task("some/number")


@pytest.mark.usefixtures("installed")
def test_an_installed_package_takes_no_name_of_this_one(model):
    assert load_task("sst2", data=FIXTURES).name == "sst2"


# Orders


@on_all_tasks
def test_an_order_permutes_the_demonstrations_and_keeps_the_queries(model, name):
    task = load_task(name, data=FIXTURES)
    drawn = task.episode(model, k=6, n_queries=4, seed=2)
    orders = [task.episode(model, k=6, n_queries=4, seed=2, order=order) for order in range(6)]
    shown = [texts(model, episode.demonstrations) for episode in orders]
    assert [episode.order for episode in orders] == list(range(6))
    assert shown[0] == texts(model, drawn.demonstrations)
    assert all(Counter(written) == Counter(shown[0]) for written in shown)
    assert len({tuple(written) for written in shown}) > 4
    for episode in orders:
        assert texts(model, episode.queries) == texts(model, drawn.queries)
        for demonstration in episode.demonstrations:
            assert demonstration.tokens[-demonstration.n_label_tokens :].equal(episode.label_tokens[demonstration.label])


def test_an_order_is_the_same_each_time_and_another_for_another_seed(model):
    task = load_task("sst2", data=FIXTURES)
    first, again = (task.episode(model, k=6, seed=3, order=2) for _ in range(2))
    assert first.digest == again.digest
    permutations = set()
    for seed in range(4):
        drawn, ordered = (texts(model, task.episode(model, k=6, seed=seed, order=order).demonstrations) for order in (0, 1))
        permutations.add(tuple(drawn.index(text) for text in ordered))
    assert len(permutations) > 1


def test_golden_order_on_every_machine(model):
    episode = load_task("trec", data=FIXTURES).episode(model, k=4, n_queries=1)
    assert [d.label for d in episode.demonstrations] == [2, 4, 3, 1]
    places = {id(demonstration): place for place, demonstration in enumerate(episode.demonstrations)}
    assert [[places[id(d)] for d in episode.reordered(order).demonstrations] for order in (0, 1, 2)] == [
        [0, 1, 2, 3],
        [0, 2, 3, 1],
        [1, 3, 2, 0],
    ]


def test_orders_differ_from_each_other_as_long_as_there_are_any(model):
    episode = load_task("trec", data=FIXTURES).episode(model, k=3, n_queries=1)
    orders = [tuple(id(d) for d in episode.reordered(order).demonstrations) for order in range(6)]
    assert len(set(orders)) == 6
    with pytest.raises(ValueError, match="order=6, but 3 demonstrations have only 6 orders"):
        episode.reordered(6)


def test_only_an_episode_in_its_first_order_can_be_reordered(model):
    episode = load_task("trec", data=FIXTURES).episode(model, k=3, n_queries=1, order=2)
    assert episode.reordered(2) is episode
    with pytest.raises(ValueError, match="in order 2; reorder the one in order 0"):
        episode.reordered(1)


def test_fit_keeps_the_same_demonstrations_in_every_order():
    model = stand_in(n_ctx=120)
    task = load_task("sst2", data=FIXTURES)
    episodes = [task.episode(model, k="fit", n_queries=3, order=order) for order in range(4)]
    assert 1 < episodes[0].k < 12
    assert all(Counter(texts(model, e.demonstrations)) == Counter(texts(model, episodes[0].demonstrations)) for e in episodes)


@pytest.mark.parametrize("order", [-1, 1.0, None, "1"])
def test_what_is_no_order_is_refused(model, order):
    with pytest.raises(ValueError, match="order must be a number, 0 for the order of the draw; got"):
        load_task("sst2", data=FIXTURES).episode(model, k=2, order=order)


# Tuning


@on_all_tasks
@pytest.mark.parametrize("seed", range(3))
def test_queries_to_tune_on_come_from_the_demonstrations_split_and_are_not_shown(name, seed):
    task = load_task(name, data=FIXTURES)
    reported = {str(example.fields) for example in task.draw(1, 100, 0).queries}
    pool = {str(example.fields) for example in task.draw(100, 1, 0).demonstrations}
    assert not reported & pool
    draw = task.for_tuning().draw(6, 100, seed)
    shown, asked = ([str(example.fields) for example in part] for part in (draw.demonstrations, draw.queries))
    assert not set(asked) & set(shown)
    assert sorted(asked + shown) == sorted(pool)
    assert draw.demonstrations == task.draw(6, 100, seed).demonstrations


def test_a_task_to_tune_on_is_otherwise_the_same(model):
    task = load_task("sst2", data=FIXTURES)
    tuned = task.for_tuning()
    assert (tuned.name, tuned.format) == (task.name, task.format)
    assert tuned.episode(stand_in(n_ctx=2000), k="fit").k == 6  # half of the rows are left for queries
    first, other = (texts(model, tuned.episode(model, k=6, n_queries=6, seed=seed).queries) for seed in (0, 1))
    assert first != other
    bundled = load_task("bundled/remapped")
    assert bundled.for_tuning() == bundled


@pytest.mark.parametrize("rows", [6, 30])
def test_without_a_query_split_tuning_and_reporting_share_no_row(model, rows):
    table = [{"text": f"{ROWS[0]['text']} {number}", "label": number % 2} for number in range(rows)]
    task = Task.from_rows(table, name="t", template="T: {text} L:", labels=["alpha", "beta"])
    seen = []
    for part in (task.for_tuning(), task.for_reporting()):
        drawn = [part.draw(1, rows, seed) for seed in range(3)]
        seen.append({example.fields["text"] for draw in drawn for example in (*draw.demonstrations, *draw.queries)})
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == rows
    assert len(task.draw(1, rows, 0).queries) == rows - 1


def test_demonstrations_for_an_update_need_not_fit_the_window_together():
    task, small = load_task("sst2", data=FIXTURES), stand_in(n_ctx=40)
    with pytest.raises(ValueError, match="longer than the model's context window of 40"):
        task.episode(small, k=6, n_queries=1)
    drawn = task.demonstrations(small, k=6)
    assert drawn.queries == ()
    assert all(len(each.tokens) <= 40 for each in drawn.demonstrations)
    assert 0 < drawn.k <= 6


# Digests


def test_a_digest_changes_with_tokens_labels_and_order_and_with_nothing_else(model):
    task = load_task("sst2", data=FIXTURES)
    episode = task.episode(model, k=4, n_queries=4)
    demonstration, query = episode.demonstrations[0], episode.queries[0]
    other_tokens = query.tokens.clone()
    other_tokens[1] += 1
    changed = {
        "order": episode.reordered(1),
        "seed": task.episode(model, k=4, n_queries=4, seed=1),
        "k": replace(episode, demonstrations=episode.demonstrations[:-1]),
        "queries": replace(episode, queries=episode.queries[:-1]),
        "query order": replace(episode, queries=episode.queries[::-1]),
        "query tokens": replace(episode, queries=(replace(query, tokens=other_tokens), *episode.queries[1:])),
        "gold label": replace(episode, queries=(replace(query, label=1 - query.label), *episode.queries[1:])),
        "shown label": replace(
            episode,
            demonstrations=(
                replace(
                    demonstration,
                    tokens=torch.cat(
                        [demonstration.tokens[: -demonstration.n_label_tokens], episode.label_tokens[1 - demonstration.label]]
                    ),
                ),
                *episode.demonstrations[1:],
            ),
        ),
        "what is label": replace(episode, demonstrations=(replace(demonstration, n_label_tokens=1), *episode.demonstrations[1:])),
        "separator": replace(
            episode, demonstrations=(replace(demonstration, separator=torch.tensor([5])), *episode.demonstrations[1:])
        ),
        "label words": replace(episode, label_tokens=episode.label_tokens[::-1]),
        "tokenizer": task.episode(stand_in(llama_style()), k=4, n_queries=4),
    }
    assert demonstration.n_label_tokens > 1
    assert len({episode.digest, *(other.digest for other in changed.values())}) == 1 + len(changed)
    same = [
        task.episode(stand_in(n_ctx=1000), k=4, n_queries=4),
        replace(episode, task="other"),
        replace(episode, seed=7),
        replace(episode, label_words=("a", "b")),
    ]
    assert {other.digest for other in same} == {episode.digest}
    assert len(episode.digest) == 16
    assert int(episode.digest, 16) >= 0


# Refusals


@pytest.mark.parametrize("style", [gpt2_style, llama_style])
def test_label_words_that_a_tokenizer_does_not_tell_apart_are_refused_by_name(style):
    task = mine(labels=["Up", "up"])
    assert task.episode(stand_in(style()), k=2).label_words == ("Up", "up")
    tokenizer = style()
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([part for part in (backend.normalizer, normalizers.Lowercase()) if part])
    with pytest.raises(ValueError, match="the label words 'Up' and 'up' tokenise to the same tokens"):
        task.episode(stand_in(tokenizer), k=2)


@pytest.mark.parametrize("k", [1, 3, "fit"])
def test_a_window_too_small_for_one_demonstration_is_refused(k):
    with pytest.raises(ValueError, match="context window of 20; not even one demonstration would fit"):
        load_task("agnews", data=FIXTURES).episode(stand_in(n_ctx=20), k=k)


def test_more_demonstrations_than_a_file_has_rows_are_refused(model):
    with pytest.raises(ValueError, match="task 'cb' has 12 rows for demonstrations, fewer than k=13"):
        load_task("cb", data=FIXTURES).episode(model, k=13)


# Separator and the space before labels


@on_all_tasks
def test_a_separator_and_the_space_are_options_of_every_task_and_of_its_parts(model, name):
    plain, other = load_task(name, data=FIXTURES), load_task(name, data=FIXTURES, separator="\n", space_before_labels=False)
    line_break = model.tokenizer.encode("\n", add_special_tokens=False)
    for task in (other, other.for_tuning(), other.for_reporting()):
        episode = task.episode(model, k=2, n_queries=2)
        assert all(demonstration.separator.tolist() == line_break for demonstration in episode.demonstrations)
        assert not any(model.tokenizer.decode(tokens).startswith(" ") for tokens in episode.label_tokens)
    first, again = (task.episode(model, k=2, n_queries=2) for task in (plain, other))
    assert texts(model, first.queries) == texts(model, again.queries)
    assert first.digest != again.digest


def test_other_prompts_are_other_tasks_and_what_a_task_has_itself_changes_nothing():
    def digest(**written) -> str:
        return load_task("sst2", data=FIXTURES, **written).digest

    found = [digest(), digest(separator="\n"), digest(space_before_labels=False), digest(separator="\n", space_before_labels=False)]
    assert len(set(found)) == 4
    assert digest(separator="{eos}", space_before_labels=True) == found[0]


def test_golden_digests_of_tasks_whose_prompts_are_written_as_ever():
    assert load_task("bundled/remapped").digest == "962db9c892c7a80c"
    assert load_task("sst2", data=FIXTURES).digest == "917f3c639b6837ee"


@pytest.mark.parametrize(
    ("written", "message"),
    [({"separator": 3}, "the separator must be text, got 3"), ({"space_before_labels": "no"}, "must be True or False, got 'no'")],
)
def test_what_is_no_separator_or_no_choice_is_refused(written, message):
    with pytest.raises(ValueError, match=message):
        load_task("sst2", data=FIXTURES, **written)
