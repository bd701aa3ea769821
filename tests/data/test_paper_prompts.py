"""The prompts of all tasks made of data sets, letter by letter and token by token, under two kinds of tokenizer."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch

from iclgd_lens.data.prompts import context_tokens
from iclgd_lens.data.registry import PAPER_TASKS, SOURCES, load_task
from tests.tokenizers_zoo import FIXTURES, gpt2_style, label_words, llama_style

STYLES = {"gpt2": gpt2_style, "llama": llama_style}
FRAMES = {
    "gpt2": "<|endoftext|>{shown}<|endoftext|>{asked}",
    "llama": "<s> {shown}</s> {asked}",
}
NEWS = "Classify the news articles into the categories of World, Sports, Business, and Technology."
FIRST = {
    "sst2": (
        "Sentence: two hours of beige Label: Negative",
        "Sentence: the café scenes glow Label:",
    ),
    "sst5": (
        "Sentence: a neat little caper with a few good laughs . Label: good",
        "Sentence: an insult to ducks . Label:",
    ),
    "mr": (
        "Review: a fresh breeze of a road movie . Sentiment: Positive",
        'Review: the " comedy " is a rumour . Sentiment:',
    ),
    "subj": (
        "Input: the mayor orders the bridge closed after the flood . Type: objective",
        "Input: the result is more charming than it has any right to be . Type:",
    ),
    "agnews": (
        NEWS + " Article: Ministers from nine river states meet in Zürich to share water. Answer: World",
        NEWS + " Article: Parliament votes to move the capital inland. Answer:",
    ),
    "cb": (
        "Nobody pretends any longer that the clock works. Question: the clock works. True, False, or Neither? Answer: False",
        "It turned out the keys were in the soup 🥣. Question: the keys were in the soup. True, False, or Neither? Answer:",
    ),
    "trec": (
        "Question: Why do cats purr ? Answer type: Description",
        "Question: What is the capital of the island of bells ? Answer type:",
    ),
    "rte": (
        "The clock tower has four faces, one of them broken. Question: The clock tower has two faces. True or False? Answer: False",
        "Both bridges were painted blue this summer. Question: The bridges are blue. True or False? Answer:",
    ),
    "dbpedia": (
        "Article: The grey marsh frog 🐸 is a small frog of the wet lowlands. Category: Animal",
        "Article: Upper Wick is a village near the old quarry. Category:",
    ),
    "boolq": (
        "A viola is larger than a violin and tuned lower. Question: is a viola the same as a violin? Answer: No",
        "The blue crab needs salt water to live. Question: can the blue crab live in fresh water? Answer:",
    ),
}
"""The first demonstration and the first query of seed 0, written out."""

CLASSES = {
    "sst2": {"0": "Negative", "1": "Positive"},
    "sst5": {"0": "terrible", "1": "bad", "2": "neutral", "3": "good", "4": "great"},
    "mr": {"0": "Negative", "1": "Positive"},
    "subj": {"0": "objective", "1": "subjective"},
    "agnews": {"0": "World", "1": "Sports", "2": "Business", "3": "Technology"},
    "cb": {"0": "True", "1": "False", "2": "Neither"},
    "trec": {"0": "Abbreviation", "1": "Entity", "2": "Description", "3": "Person", "4": "Location", "5": "Number"},
    "rte": {"0": "True", "1": "False"},
    "dbpedia": {
        "0": "Company",
        "1": "School",
        "2": "Artist",
        "3": "Athlete",
        "4": "Politician",
        "5": "Transportation",
        "6": "Building",
        "7": "Nature",
        "8": "Village",
        "9": "Animal",
        "10": "Plant",
        "11": "Album",
        "12": "Film",
        "13": "Book",
    },
    "boolq": {"False": "No", "True": "Yes"},
}
"""The word of every value of the label column."""

K = 6

on_all_tasks = pytest.mark.parametrize("name", list(SOURCES))
on_both_styles = pytest.mark.parametrize("style", list(STYLES))


def stand_in(style: str, n_ctx: int = 2048) -> SimpleNamespace:
    return SimpleNamespace(tokenizer=STYLES[style](), cfg=SimpleNamespace(n_ctx=n_ctx))


def drawn(name: str, style: str, **options):
    model = stand_in(style)
    return load_task(name, data=FIXTURES).episode(model, **{"k": K, "n_queries": 12, **options}), model.tokenizer


def prompt(episode, number: int = 0):
    return torch.cat([context_tokens(episode.demonstrations), episode.queries[number].tokens[1:]])


def fixture_rows(name: str, split: str) -> list[dict]:
    [path] = (FIXTURES / name).glob(f"{split}.*")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    return [json.loads(line) for line in text.splitlines()]


def test_every_task_has_fixtures_and_a_prompt_written_out():
    assert set(FIRST) == set(CLASSES) == set(SOURCES)
    assert set(PAPER_TASKS) < set(SOURCES)
    assert {path.name for path in FIXTURES.iterdir()} == set(SOURCES)


@on_all_tasks
def test_the_fixtures_show_every_class(name):
    source = SOURCES[name]
    assert {str(row[source.label_column]) for row in fixture_rows(name, source.train)} == set(CLASSES[name])


@on_all_tasks
@on_both_styles
def test_the_first_prompt_letter_by_letter(name, style):
    episode, tokenizer = drawn(name, style, k=1, n_queries=1)
    shown, asked = FIRST[name]
    assert tokenizer.decode(prompt(episode)) == FRAMES[style].format(shown=shown, asked=asked)


@on_all_tasks
@on_both_styles
def test_every_demonstration_is_a_row_in_its_template_with_the_word_of_its_class(name, style):
    source = SOURCES[name]
    episode, tokenizer = drawn(name, style)
    for part, split in ((episode.demonstrations, source.train), (episode.queries, source.queries)):
        rows = {}
        for row in fixture_rows(name, split):
            fields = {column: str(value).strip() for column, value in row.items()}
            rows[source.template.format(**fields)] = CLASSES[name][fields[source.label_column]]
        for example in part:
            text = tokenizer.decode(example.tokens[1:]).removeprefix(" ")
            if part is episode.demonstrations:
                text, _, word = text.rpartition(" ")
                assert word == rows[text]
            assert episode.label_words[example.label] == rows[text]


@on_all_tasks
@on_both_styles
def test_the_label_is_the_last_tokens_and_reads_as_its_word_after_a_space(name, style):
    episode, tokenizer = drawn(name, style)
    for demonstration in episode.demonstrations:
        word = label_words(SOURCES[name])[demonstration.label]
        split = len(demonstration.tokens) - demonstration.n_label_tokens
        before, label = demonstration.tokens[:split], demonstration.tokens[split:]
        assert label.equal(episode.label_tokens[demonstration.label])
        assert tokenizer.decode(before).endswith(SOURCES[name].template.rpartition("}")[2])
        assert tokenizer.decode(demonstration.tokens) == f"{tokenizer.decode(before)} {word}"
        assert "".join(tokenizer.convert_ids_to_tokens(label)) == {"gpt2": "Ġ", "llama": "▁"}[style] + word


@on_all_tasks
@on_both_styles
def test_label_tokens_are_what_follows_when_a_whole_text_is_tokenised(name, style):
    episode, tokenizer = drawn(name, style)
    for query in episode.queries:
        text = tokenizer.decode(query.tokens[1:]).removeprefix(" ")
        for word, label in zip(episode.label_words, episode.label_tokens, strict=True):
            whole = tokenizer.encode(f"{text} {word}", add_special_tokens=False)
            assert whole == [*query.tokens[1:].tolist(), *label.tolist()]


@on_all_tasks
@on_both_styles
def test_one_bos_in_front_and_one_separator_behind_each_demonstration(name, style):
    episode, tokenizer = drawn(name, style)
    context = context_tokens(episode.demonstrations).tolist()
    ends = torch.tensor([len(d.tokens) for d in episode.demonstrations]).cumsum(0).tolist()
    assert all(d.separator.tolist() == [tokenizer.eos_token_id] for d in episode.demonstrations)
    assert all(tokenizer.eos_token_id not in d.tokens[1:] for d in episode.demonstrations)
    assert [place for place, token in enumerate(context) if token == tokenizer.eos_token_id and place] == ends
    assert len(context) == ends[-1] + 1
    for number, query in enumerate(episode.queries):
        whole = prompt(episode, number).tolist()
        assert whole[: len(context)] == context
        assert whole[0] == query.tokens[0] == tokenizer.bos_token_id
        assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(whole[len(context) :])
        if tokenizer.bos_token_id != tokenizer.eos_token_id:
            assert whole.count(tokenizer.bos_token_id) == 1


@on_all_tasks
@on_both_styles
def test_a_query_ends_in_the_last_token_of_its_template(name, style):
    episode, tokenizer = drawn(name, style)
    end = SOURCES[name].template.rpartition("}")[2]
    last = tokenizer.encode(f"x{end}", add_special_tokens=False)[-1]
    for query in episode.queries:
        assert query.tokens[-1] == last
        assert tokenizer.decode(query.tokens).endswith(end)
        assert tokenizer.decode(query.tokens)[-1] == end[-1] != " "


@on_both_styles
def test_a_query_s_tokens_are_the_same_in_every_episode(style):
    first, other = (drawn("sst2", style, seed=seed)[0] for seed in (0, 1))
    assert [q.tokens.tolist() for q in first.queries] == [q.tokens.tolist() for q in other.queries]
    assert [d.tokens.tolist() for d in first.demonstrations] != [d.tokens.tolist() for d in other.demonstrations]


def test_both_tokenizers_write_the_fixtures_text_and_read_it_back():
    text = 'Sentence: two naïve 🙂 hours , " of " beige Label:'
    for style in STYLES:
        tokenizer = STYLES[style]()
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
        assert len(tokenizer) == 800
    assert "<0x9F>" in llama_style().tokenize("🙂")
