"""Tasks: the same seed gives the same episode from any source, and bad input is named."""

import csv
import json
import random
from collections import Counter
from dataclasses import replace

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from iclgd_lens.data.bundled import bundled_task
from iclgd_lens.data.episodes import Episode
from iclgd_lens.data.prompts import Query, context_tokens
from iclgd_lens.data.registry import BUNDLED_TASKS, load_task
from iclgd_lens.data.tasks import MOST_DEMONSTRATIONS, Draw, Task
from iclgd_lens.models.bundled.language import LABEL_POOL, NEUTRAL_LABELS, TOPIC_WORDS
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.models.loading import load_model

TOPIC_OF = {word: topic for topic, words in TOPIC_WORDS.items() for word in words}
WORDS = ["lion", "bread", "shirt", "rain", "violin", "tennis", "hammer", "airport", "tiger", "cheese", "jacket", "snow"]
CLASS_COUNTS = range(2, len(TOPIC_WORDS) + 1)
ROWS = [{"text": word, "label": index % 2} for index, word in enumerate(WORDS)]
FORMAT = {"template": "Words: {text} Label:", "labels": ["alpha", "beta"]}


@pytest.fixture(scope="module")
def model() -> HookedModel:
    """The bundled learner: episodes need its tokenizer and the size of its window."""
    return load_model("bundled", device="cpu")


def from_rows(rows, **options) -> Task:
    return Task.from_rows(rows, **{"name": "rows", **FORMAT, **options})


def tokens_of(episode: Episode) -> list[list[int]]:
    parts = [*(d.tokens for d in episode.demonstrations), *(q.tokens for q in episode.queries), *episode.label_tokens]
    return [part.tolist() for part in parts]


def texts(model: HookedModel, examples) -> list[str]:
    return [model.tokenizer.decode(example.tokens) for example in examples]


# Draws


@pytest.mark.parametrize("name", BUNDLED_TASKS)
def test_the_same_seed_gives_the_same_tokens(model, name):
    first, again = (load_task(name).episode(model, k=12, n_queries=8, seed=3) for _ in range(2))
    assert tokens_of(first) == tokens_of(again)
    assert [e.label for e in (*first.demonstrations, *first.queries)] == [e.label for e in (*again.demonstrations, *again.queries)]


@pytest.mark.parametrize("name", BUNDLED_TASKS)
def test_another_seed_gives_another_episode(model, name):
    drawn = {str(tokens_of(load_task(name).episode(model, k=2, n_queries=1, seed=seed))) for seed in range(20)}
    assert len(drawn) == 20


@pytest.mark.unchecked_shapes  # checks look at random items
def test_draws_leave_torch_s_and_python_s_random_state_alone(model):
    torch.manual_seed(987)
    before = torch.get_rng_state(), random.getstate()
    load_task("bundled/remapped").episode(model, k=2, n_queries=1)
    from_rows(ROWS).episode(model, k=2, n_queries=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def written_out(draw: Draw) -> list[str]:
    """The demonstrations with their labels, then the queries with theirs in brackets."""
    shown = [f"{example.fields['text']}: {draw.label_words[example.label]}" for example in draw.demonstrations]
    asked = [f"{example.fields['text']} ({draw.label_words[example.label]})" for example in draw.queries]
    return shown + asked


def test_golden_remapped_episode_on_every_machine():
    assert written_out(load_task("bundled/remapped").draw(2, 2, 0)) == [
        "cheek eyebrow forehead ankle table: travel",
        "eraser lamp crib sofa table: delta",
        "drawer nephew lamp bookcase crib (delta)",
        "drawer textbook wardrobe sofa mattress (delta)",
    ]


def test_golden_natural_episode_on_every_machine():
    assert written_out(load_task("bundled/natural").draw(2, 2, 0)) == [
        "fencing chord tuba choir opera: music",
        "hammer chisel guitar pliers saw: tools",
        "lung violin harp melody opera (music)",
        "flute banjo drum cello golf (music)",
    ]


def test_golden_order_of_a_file_s_rows_on_every_machine(model):
    episode = from_rows(ROWS, name="golden").episode(model, k=3, n_queries=3, seed=0)
    assert [text.split()[2] for text in texts(model, episode.demonstrations)] == ["hammer", "bread", "tennis"]
    assert [text.split()[2] for text in texts(model, episode.queries)] == ["cheese", "snow", "lion"]


# Bundled tasks


def topic_counts(text: str) -> Counter[str]:
    return Counter(TOPIC_OF[word] for word in text.split() if word in TOPIC_OF)


@pytest.mark.parametrize("n_classes", CLASS_COUNTS)
def test_natural_labels_are_the_names_of_the_topics(model, n_classes):
    episode = bundled_task("natural", n_classes).episode(model, k=n_classes, n_queries=8, seed=1)
    for example, text in zip(episode.queries, texts(model, episode.queries), strict=True):
        topic, count = topic_counts(text).most_common(1)[0]
        assert (topic, count) == (episode.label_words[example.label], 4)


@pytest.mark.parametrize("n_classes", CLASS_COUNTS)
def test_remapped_labels_are_distinct_words_of_the_pool(model, n_classes):
    episode = bundled_task("remapped", n_classes).episode(model, k=n_classes, n_queries=1, seed=1)
    assert len(set(episode.label_words)) == len(episode.label_words) == n_classes
    assert set(episode.label_words) <= set(LABEL_POOL)


def test_remapped_labels_are_drawn_from_the_whole_pool_and_rarely_fit_their_topic():
    drawn = [load_task("bundled/remapped").draw(2, 1, seed) for seed in range(200)]
    words = Counter(word for draw in drawn for word in draw.label_words)
    assert set(words) == set(LABEL_POOL)
    neutral = sum(words[word] for word in NEUTRAL_LABELS) / words.total()
    assert neutral == pytest.approx(len(NEUTRAL_LABELS) / len(LABEL_POOL), abs=0.1)
    named = [
        topic_counts(example.fields["text"]).most_common(1)[0][0] == draw.label_words[example.label]
        for draw in drawn
        for example in draw.demonstrations
    ]
    assert sum(named) / len(named) < 0.15


@pytest.mark.parametrize("mapping", ["natural", "remapped"])
def test_a_class_keeps_its_topic_and_a_sentence_has_one_distractor(model, mapping):
    episode = bundled_task(mapping, 3).episode(model, k=12, n_queries=20, seed=5)
    examples = (*episode.demonstrations, *episode.queries)
    topics = {}
    for example, text in zip(examples, texts(model, examples), strict=True):
        (topic, own), (_, distractors) = topic_counts(text).most_common()
        assert (own, distractors) == (4, 1)
        assert topics.setdefault(example.label, topic) == topic
    assert len(set(topics.values())) == 3


@pytest.mark.parametrize("n_classes", CLASS_COUNTS)
@pytest.mark.parametrize("k", [1, 2, 7, 12])
def test_demonstrations_are_as_balanced_as_k_allows(model, n_classes, k):
    episode = bundled_task("remapped", n_classes).episode(model, k=k, n_queries=1, seed=k)
    counts = Counter(demonstration.label for demonstration in episode.demonstrations)
    assert max(counts.values()) - min(counts[label] for label in range(n_classes)) <= 1


def test_the_order_of_classes_and_the_queries_classes_vary_with_the_seed():
    drawn = [load_task("bundled/remapped").draw(4, 4, seed) for seed in range(40)]
    assert len({tuple(example.label for example in draw.demonstrations) for draw in drawn}) == 4
    assert len({tuple(example.label for example in draw.queries) for draw in drawn}) > 8


@pytest.mark.parametrize("n_classes", [-1, 0, 1, len(TOPIC_WORDS) + 1])
def test_a_number_of_classes_out_of_range_is_refused(model, n_classes):
    with pytest.raises(ValueError, match=f"n_classes must be between 2 and {len(TOPIC_WORDS)}, got {n_classes}"):
        bundled_task("natural", n_classes).episode(model, k=2)


def test_an_unknown_task_lists_the_known_ones_and_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean 'bundled/remapped'\?.*bundled/remapped, bundled/natural"):
        load_task("bundled/remaped")


def test_an_unknown_task_like_no_other_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown task 'xyz'.*bundled/remapped, bundled/natural") as error:
        load_task("xyz")
    assert "did you mean" not in str(error.value)


# Tasks from rows, files and datasets


def written_csv(path, rows) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def written_jsonl(path, rows) -> str:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("queries", [None, ROWS[:5]])
def test_rows_csv_jsonl_and_a_dataset_give_the_same_episode(model, tmp_path, queries):
    def optional(make):
        return None if queries is None else make(queries)

    options = {"name": "same", **FORMAT}
    tasks = [
        Task.from_rows(ROWS, query_rows=queries, **options),
        Task.from_csv(
            written_csv(tmp_path / "a.csv", ROWS), query_path=optional(lambda q: written_csv(tmp_path / "q.csv", q)), **options
        ),
        Task.from_jsonl(
            written_jsonl(tmp_path / "a.jsonl", ROWS),
            query_path=optional(lambda q: written_jsonl(tmp_path / "q.jsonl", q)),
            **options,
        ),
        Task.from_dataset(datasets.Dataset.from_list(ROWS), queries=optional(datasets.Dataset.from_list), **options),
    ]
    drawn = [tokens_of(task.episode(model, k=4, n_queries=4, seed=2)) for task in tasks]
    assert all(tokens == drawn[0] for tokens in drawn)
    assert all(len(tokens) == 4 + 4 + 2 for tokens in drawn)


def test_a_file_gives_the_task_its_name(tmp_path):
    assert Task.from_csv(written_csv(tmp_path / "mine.csv", ROWS), **FORMAT).name == "mine.csv"
    assert Task.from_jsonl(tmp_path / written_jsonl(tmp_path / "mine.jsonl", ROWS), **FORMAT).name == "mine.jsonl"


def test_a_csv_may_have_a_byte_order_mark_and_quoted_commas_and_line_breaks(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufefftext,label\n"lion, bread\nshirt",0\nrain,1\n', encoding="utf-8")
    drawn = Task.from_csv(path, **FORMAT).draw(1, 1, 0)
    assert {example.fields["text"] for example in (*drawn.demonstrations, *drawn.queries)} == {"lion, bread\nshirt", "rain"}


def test_a_jsonl_text_may_hold_unicode_line_separators(tmp_path):
    rows = [{"text": "lion\u2028bread", "label": 0}, {"text": "rain\x85snow", "label": 1}]
    drawn = Task.from_jsonl(written_jsonl(tmp_path / "a.jsonl", rows), **FORMAT).draw(1, 1, 0)
    assert {example.fields["text"] for example in (*drawn.demonstrations, *drawn.queries)} == {row["text"] for row in rows}


@pytest.mark.parametrize(
    ("labels", "values"),
    [
        (["alpha", "beta"], [0, 1]),
        (["alpha", "beta"], ["0", " 1 "]),
        ({0: "alpha", 1: "beta"}, ["0", "1"]),
        ({"neg": "alpha", "pos": "beta"}, ["neg", "pos"]),
        ({5: "alpha", -1: "beta"}, [5, "-1"]),
        ({False: "alpha", True: "beta"}, [False, True]),
    ],
)
def test_labels_map_values_to_words_by_place_or_by_name(model, labels, values):
    rows = [{"text": "lion", "label": values[0]}, {"text": "rain", "label": values[1]}]
    episode = from_rows(rows, labels=labels).episode(model, k=1, n_queries=1)
    assert episode.label_words == ("alpha", "beta")
    labelled = {(model.tokenizer.decode(e.tokens).split()[2], e.label) for e in (*episode.demonstrations, *episode.queries)}
    assert labelled == {("lion", 0), ("rain", 1)}


def test_a_demonstration_ends_with_the_word_of_its_class(model):
    episode = from_rows(ROWS).episode(model, k=6, n_queries=6)
    for text, example in zip(texts(model, episode.demonstrations), episode.demonstrations, strict=True):
        _, _, word, _, label = text.split()
        assert ROWS[WORDS.index(word)]["label"] == example.label
        assert label == ["alpha", "beta"][example.label]


def test_several_fields_and_another_label_column(model):
    rows = [{"a": "lion", "b": "bread", "gold": 1}, {"a": "rain", "b": "snow", "gold": 0}]
    task = from_rows(rows, template="Words: {b} {a} Label:", label_column="gold", separator=" ;")
    episode = task.episode(model, k=1, n_queries=1)
    shown = {*texts(model, episode.demonstrations), *texts(model, episode.queries)}
    assert shown in (
        {"<bos> Words: bread lion Label: beta", "<bos> Words: snow rain Label:"},
        {"<bos> Words: bread lion Label:", "<bos> Words: snow rain Label: alpha"},
    )
    assert model.tokenizer.decode(episode.demonstrations[0].separator) == ";"


def test_a_query_split_gives_the_same_queries_for_every_seed(model):
    task = from_rows(ROWS[:8], query_rows=ROWS[8:])
    episodes = [task.episode(model, k=4, n_queries=3, seed=seed) for seed in range(5)]
    asked = [texts(model, episode.queries) for episode in episodes]
    assert all(queries == asked[0] for queries in asked)
    assert {text.split()[2] for text in asked[0]} <= set(WORDS[8:])
    assert len({tuple(texts(model, episode.demonstrations)) for episode in episodes}) > 1


@pytest.mark.parametrize("k", [1, 5, 11])
def test_without_a_query_split_no_query_is_among_the_demonstrations(model, k):
    episode = from_rows(ROWS).episode(model, k=k, n_queries=12)
    shown, asked = ([text.split()[2] for text in texts(model, part)] for part in (episode.demonstrations, episode.queries))
    assert sorted([*shown, *asked]) == sorted(WORDS)


def test_more_demonstrations_keep_the_earlier_ones(model):
    few, more = (texts(model, from_rows(ROWS).episode(model, k=k).demonstrations) for k in (3, 6))
    assert more[:3] == few


def test_n_queries_is_a_ceiling(model):
    assert len(from_rows(ROWS).episode(model, k=2, n_queries=4).queries) == 4
    assert len(from_rows(ROWS).episode(model, k=2, n_queries=400).queries) == 10


# Label words of several tokens, under a tokenizer that is not ours


def character_model(n_ctx: int = 200) -> HookedModel:
    """A model whose tokens are characters, as far as its tokenizer and the size of its window go."""
    characters = [chr(code) for code in range(32, 127)]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(["<eos>", *characters])}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    model = load_model("bundled", device="cpu")
    model.tokenizer, model.cfg.n_ctx = tokenizer, n_ctx
    return model


def test_label_words_of_several_tokens_are_counted_and_carried():
    model = character_model()
    episode = from_rows(ROWS, template="{text}:", labels=["no", "maybe"]).episode(model, k=4, n_queries=2)
    assert [len(tokens) for tokens in episode.label_tokens] == [3, 6]
    for demonstration in episode.demonstrations:
        assert demonstration.tokens[-demonstration.n_label_tokens :].equal(episode.label_tokens[demonstration.label])
        assert demonstration.separator.tolist() == [0]
    assert all(query.label_tokens is episode.label_tokens for query in episode.queries)


# Bad rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 0}, r"rows, row 3: no column 'text'; it has label"),
        ({"text": "lion"}, r"rows, row 3: no column 'label'; it has text"),
        ({"text": "lion", "label": 7}, r"rows, row 3: unknown label 7 in column 'label'; known: 0, 1"),
        ({"text": "lion", "label": "positive"}, r"rows, row 3: unknown label 'positive'"),
        ({"text": "lion", "label": [0]}, r"rows, row 3: unknown label \[0\]"),
        ({"text": "", "label": 0}, r"rows, row 3: the text in column 'text' is empty"),
        ({"text": " \t\n", "label": 0}, r"rows, row 3: the text in column 'text' is empty"),
        (
            {"text": "a \ud83d", "label": 0},
            r"rows, row 3: the text in column 'text' holds half of a character, '\\ud83d' at position 2",
        ),
    ],
)
def test_a_bad_row_is_named_with_its_column(row, message):
    with pytest.raises(ValueError, match=message):
        from_rows([*ROWS[:2], row, *ROWS[2:]])


@pytest.mark.parametrize("word", [3, None, True])
def test_a_label_word_that_is_no_text_is_named(word):
    with pytest.raises(ValueError, match=f"the label word of 'b' must be text, got {word}"):
        from_rows([{"text": "lion", "label": "a"}] * 3, labels={"a": "alpha", "b": word})


def test_a_bad_row_of_the_query_split_is_named_as_one():
    with pytest.raises(ValueError, match=r"rows \(queries\), row 1: no column 'text'"):
        from_rows(ROWS, query_rows=[{"label": 0}])


def test_a_csv_without_the_column_names_the_file_and_the_row(tmp_path):
    path = written_csv(tmp_path / "reviews.csv", [{"review": "lion", "label": 0}])
    with pytest.raises(ValueError, match=r"reviews\.csv, row 1: no column 'text'; it has review, label"):
        Task.from_csv(path, **FORMAT)


def test_a_csv_row_with_an_unquoted_comma_is_refused_and_not_cut(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("label,text\n0,warm, sly and short\n1,dull\n")
    with pytest.raises(ValueError, match=r"rows\.csv, row 1: more values than the header has columns; quote"):
        Task.from_csv(path, **FORMAT)


def test_a_csv_may_write_truth_values_in_lower_case(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("label,text\ntrue,lion\nFalse,rain\nfalse,bread\n")
    task = Task.from_csv(path, template=FORMAT["template"], labels={False: "alpha", True: "beta"})
    drawn = task.draw(2, 1, 0)
    assert {e.fields["text"]: e.label for e in (*drawn.demonstrations, *drawn.queries)} == {"lion": 1, "rain": 0, "bread": 0}


@pytest.mark.parametrize(
    ("line", "message"), [('{"text": ', r"a\.jsonl, line 3: not valid JSON"), ("[1]", r"a\.jsonl, line 3: expected a JSON object")]
)
def test_a_malformed_json_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(ROWS[0])}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Task.from_jsonl(path, **FORMAT)


@pytest.mark.parametrize("rows", [{"rows": []}, {"rows": ROWS, "query_rows": []}])
def test_no_rows_are_refused(rows):
    with pytest.raises(ValueError, match="has no rows"):
        from_rows(**rows)


@pytest.mark.parametrize("content", ["", "text,label\n"])
def test_a_csv_without_rows_is_refused(tmp_path, content):
    path = tmp_path / "a.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.csv has no rows"):
        Task.from_csv(path, **FORMAT)


@pytest.mark.parametrize("read", [Task.from_csv, Task.from_jsonl])
def test_a_file_that_is_not_there_is_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"absent\.file"):
        read(tmp_path / "absent.file", **FORMAT)


# Bad requests


def test_more_demonstrations_than_rows_are_refused(model):
    with pytest.raises(ValueError, match="task 'rows' has 12 rows for demonstrations, fewer than k=13"):
        from_rows(ROWS, query_rows=ROWS).episode(model, k=13)


def test_demonstrations_that_leave_no_queries_are_refused(model):
    with pytest.raises(ValueError, match="task 'rows' has 12 rows: after k=12 demonstrations none is left for queries"):
        from_rows(ROWS).episode(model, k=12)


@pytest.mark.parametrize("k", [0, -1, "many", 2.0, None])
def test_a_k_that_is_no_number_of_demonstrations_is_refused(model, k):
    with pytest.raises(ValueError, match=r"k must be a number of demonstrations, at least 1, or 'fit'"):
        load_task("bundled/remapped").episode(model, k=k)


@pytest.mark.parametrize("n_queries", [0, -3])
def test_no_queries_are_refused(model, n_queries):
    with pytest.raises(ValueError, match=f"n_queries must be at least 1, got {n_queries}"):
        load_task("bundled/remapped").episode(model, n_queries=n_queries)


def test_a_model_without_a_tokenizer_is_refused():
    model = character_model()
    model.tokenizer = None
    with pytest.raises(ValueError, match=r"no tokenizer; give it one with model\.set_tokenizer"):
        load_task("bundled/remapped").episode(model)


def test_label_words_that_a_model_s_tokenizer_does_not_know_are_refused(model):
    with pytest.raises(ValueError, match="does not know the label word 'Positive'"):
        from_rows(ROWS, labels=["Positive", "Negative"]).episode(model, k=2)


# The context window


def longest_input(episode: Episode) -> int:
    """The tokens of the longest run that scoring the episode's queries in context needs."""
    context = context_tokens(episode.demonstrations)
    return max(len(context) + len(query.tokens) - 1 + len(label) - 1 for query in episode.queries for label in query.label_tokens)


def test_a_prompt_longer_than_the_window_says_how_many_would_fit(model):
    with pytest.raises(ValueError, match=r"17 demonstrations .* window of 160; 16 would fit: pass k=16, or k='fit'"):
        load_task("bundled/remapped").episode(model, k=17, n_queries=1)


@pytest.mark.parametrize("name", BUNDLED_TASKS)
def test_fit_gives_the_most_demonstrations_that_the_window_holds(model, name):
    episode = load_task(name).episode(model, k="fit", n_queries=4)
    assert longest_input(episode) <= model.cfg.n_ctx
    assert episode.k == 16
    with pytest.raises(ValueError, match="16 would fit"):
        load_task(name).episode(model, k=episode.k + 1, n_queries=4)


def test_fit_keeps_bundled_demonstrations_balanced(model):
    for seed in range(5):
        episode = load_task("bundled/remapped").episode(model, k="fit", n_queries=1, seed=seed)
        assert Counter(demonstration.label for demonstration in episode.demonstrations) == {0: 8, 1: 8}


@pytest.mark.parametrize("seed", range(5))
def test_fit_takes_the_first_demonstrations_that_hold_with_labels_and_texts_of_any_length(seed):
    model = character_model()
    rows = [{"text": "ab" * (1 + 7 * index % 13), "label": index % 2} for index in range(40)]
    task = from_rows(rows, template="{text}:", labels=["no", "maybe"], query_rows=rows[:3])
    episode = task.episode(model, k="fit", n_queries=3, seed=seed)
    assert 1 < episode.k < MOST_DEMONSTRATIONS
    assert longest_input(episode) <= model.cfg.n_ctx
    one_more = task.episode(character_model(n_ctx=1000), k=episode.k + 1, n_queries=3, seed=seed)
    assert longest_input(one_more) > model.cfg.n_ctx
    assert tokens_of(task.episode(model, k=episode.k, n_queries=3, seed=seed)) == tokens_of(episode)


def test_fit_in_a_large_window_takes_the_most_that_is_ever_drawn():
    model = character_model(n_ctx=100_000)
    assert from_rows(ROWS * 4, query_rows=ROWS).episode(model, k="fit").k == MOST_DEMONSTRATIONS
    assert from_rows(ROWS, query_rows=ROWS).episode(model, k="fit").k == len(ROWS)


def test_fit_in_a_window_too_small_for_one_demonstration_is_refused():
    with pytest.raises(ValueError, match="not even one demonstration would fit"):
        from_rows(ROWS, template="{text}:", query_rows=ROWS).episode(character_model(n_ctx=12), k="fit")


def test_an_episode_is_frozen_and_its_queries_hold_its_labels(model):
    episode = load_task("bundled/remapped").episode(model, k=2, n_queries=3)
    assert episode.task == "bundled/remapped"
    assert episode.seed == 0
    assert replace(episode, seed=1).queries is episode.queries
    assert all(isinstance(query, Query) and query.label in (0, 1) for query in episode.queries)


def test_fit_leaves_half_of_a_small_file_s_rows_for_queries(model):
    episode = from_rows(ROWS[:4], name="small").episode(model, k="fit", n_queries=10)
    assert (episode.k, len(episode.queries)) == (2, 2)


def test_a_larger_k_adds_demonstrations_and_changes_nothing_else(model):
    small, large = (load_task("bundled/remapped").episode(model, k=k, n_queries=3, seed=1) for k in (3, 7))
    assert texts(model, small.demonstrations) == texts(model, large.demonstrations)[:3]
    assert texts(model, small.queries) == texts(model, large.queries)


def test_a_dataset_of_splits_is_refused_and_its_splits_are_named():
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list([dict(row) for row in ROWS]))
    with pytest.raises(TypeError, match="got DatasetDict; choose one of its splits: train"):
        Task.from_dataset(splits, name="splits", template="{text}", labels=["animals", "food"])


def test_files_in_another_encoding_or_with_missing_values_are_refused_by_name(tmp_path):
    path = tmp_path / "latin.csv"
    path.write_bytes("text,label\nna\u00efve,0\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.csv is not UTF-8 text"):
        Task.from_csv(path, **FORMAT)
    with pytest.raises(ValueError, match="row 1: the value in column 'text' is missing"):
        from_rows([{"text": float("nan"), "label": 0}])
