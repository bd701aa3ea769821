"""Whatever texts, templates, label words and separators say: results are right, or what is wrong is named where it is given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import iclgd_lens
from iclgd_lens import Task, capture, compare, gd, lcgd
from iclgd_lens.data.episodes import Episode
from iclgd_lens.data.formats import bos_token
from iclgd_lens.data.prompts import ContextLayout, context_tokens
from iclgd_lens.models.bundled.learner import build_tokenizer
from tests.models_zoo import make_model
from tests.reference import reference_capture, reference_update, relative_error
from tests.tokenizers_zoo import VOCABULARY, gpt2_style, llama_style, wordless_style

TOKENIZERS = {"gpt2": gpt2_style, "llama": llama_style, "wordless": wordless_style, "bundled": build_tokenizer}
N_CTX = 160
LR = 0.05

NASTY = (
    "",
    "  \t",
    "\u200b",
    "\x00",
    "lion tiger",
    " two  spaces ",
    "😀👩‍👩‍👧 🇨🇭",
    "e\u0301 é ﬁ",
    "שלום עולם",
    "\u202eمرحبا\u202c",
    "{text}",
    "{",
    "}} {{",
    "{0!r:>{1}}",
    "100 % %s %(text)s %d",
    "one\ntwo\r\n\n",
    "</s>",
    "<s> a <|endoftext|> b",
    "{eos}",
    " ;",
    "Label: alpha",
    "Sentence:",
    "\\ud83d",
    "\ud83d",
    "word " * 60,
    "x" * 700,
)
TEMPLATES = (
    "Sentence: {text} Label:",
    "Words: {text} Label:",
    "{text}",
    "{text}\nSentiment:",
    "Say of '{text}'",
    "{text} Label: ",
    "{{{text}}} }} Label:",
    "100 % of {text} %s:",
    "😀 {text} שלום",
    "{text} and {text} Answer:",
    "Sentence: {text} Label",
)
SPOILT_TEMPLATES = (
    "{text!r}",
    "{text:>10}",
    "{text:{width}}",
    "{text",
    "no field",
    "{}",
    "{text.real}",
    "{other}",
    "\ud83d {text}",
    "",
)
LABELS = (
    ["Negative", "Positive"],
    ["a", "ab", "abc"],
    ["pos", "positive"],
    ["no", "none", "not", "no one"],
    ["animals", "food"],
    ["True", "False", "Neither"],
    ["😀", "😀😀"],
    ["כן", "לא"],
    ["{text}", "%s"],
)
SEPARATORS = ("{eos}", "", "\n", " ;", "\n\n{eos}\n", "{", "%s", "😀", "Label:", "\ud83d")

words = st.text(min_size=1, max_size=12).filter(str.strip)
readable = st.sampled_from([text for text in NASTY if text.strip() and "\ud83d" not in text]) | words
nasty = st.sampled_from(NASTY) | st.text(max_size=12)
# What is refused is drawn more rarely than what is not.
some_texts = st.one_of(*[st.lists(readable, min_size=4, max_size=5)] * 4, st.lists(nasty, min_size=4, max_size=5))
some_templates = st.sampled_from(TEMPLATES * 6 + SPOILT_TEMPLATES)
some_labels = st.one_of(*[st.sampled_from(LABELS)] * 6, st.lists(nasty | st.just(3), min_size=1, max_size=3))
some_separators = st.sampled_from(SEPARATORS) | st.text(max_size=3)
some_tokenizers = st.sampled_from([*TOKENIZERS, *["gpt2", "llama", "wordless"] * 2])

thorough = settings(deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])


@cache
def tokenizer_named(name: str) -> PreTrainedTokenizerFast:
    return TOKENIZERS[name]()


@dataclass
class Drawn:
    """An episode and what it was made of."""

    episode: Episode
    tokenizer: PreTrainedTokenizerFast
    template: str
    labels: list[Any]
    separator: str
    texts: list[str]

    @property
    def filled(self) -> list[str]:
        """The prompts that the rows may have become, in the order of the rows."""
        return [self.template.format(text=text.strip()) for text in self.texts]


def drawn(model: Any, texts: list[str], template: str, labels: list[Any], separator: str, seed: int) -> Drawn | None:
    """Make an episode; None if it was refused, which must be by this package and in words."""
    rows = [{"text": text, "label": number % len(labels)} for number, text in enumerate(texts)]
    try:
        task = Task.from_rows(rows, name="fuzz", template=template, labels=labels, separator=separator)
        episode = task.episode(model, k=2, n_queries=2, seed=seed)
    except ValueError as error:
        require_own(error)
        event("refused")
        return None
    event("made")
    return Drawn(episode, model.tokenizer, template, labels, separator, texts)


def require_own(error: ValueError) -> None:
    """An error is raised in this package, in a sentence that somebody can read wherever they see it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    assert trace is not None
    assert Path(trace.tb_frame.f_code.co_filename).is_relative_to(Path(iclgd_lens.__file__).parent)
    assert type(error) is ValueError
    assert len(str(error)) > 20
    str(error).encode()


def gives_back(tokenizer: PreTrainedTokenizerFast, text: str) -> bool:
    """Whether a tokenizer reads and writes a text unchanged, when it has all of it at once."""
    return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def require_right_tokens(made: Drawn) -> None:
    """Tokens spell what they were made of, and the layout points at them."""
    episode, tokenizer = made.episode, made.tokenizer
    assert [len(word) > 0 for word in episode.label_tokens] == [True] * len(made.labels)
    filled = set(made.filled)
    for demonstration in episode.demonstrations:
        word = made.labels[demonstration.label]
        body, label = demonstration.tokens.tensor_split([-demonstration.n_label_tokens])
        assert torch.equal(label, episode.label_tokens[demonstration.label])
        assert int(body[0]) == bos_token(tokenizer)
        shown = tokenizer.decode(demonstration.tokens[1:])
        wholes = [f"{text} {word}" for text in filled]
        if all(gives_back(tokenizer, whole) for whole in wholes):
            event("spelled")
            assert shown in wholes
            assert tokenizer.decode(body[1:]) in filled
    for query in episode.queries:
        assert int(query.tokens[0]) == bos_token(tokenizer)
        if all(gives_back(tokenizer, text) for text in filled):
            assert tokenizer.decode(query.tokens[1:]) in filled
    require_right_layout(episode)


def require_right_layout(episode: Episode) -> None:
    context, layout = context_tokens(episode.demonstrations)[1:], ContextLayout.of(episode.demonstrations)
    assert len(context) == len(layout.demonstration) == len(layout.position) == len(layout.is_label)
    labels: list[list[int]] = [[] for _ in episode.demonstrations]
    separators: list[list[int]] = [[] for _ in episode.demonstrations]
    for token, number, position, is_label in zip(
        context.tolist(), layout.demonstration.tolist(), layout.position.tolist(), layout.is_label.tolist(), strict=True
    ):
        if position == -1:
            separators[number].append(token)
            assert not is_label
            continue
        assert token == int(episode.demonstrations[number].tokens[position])
        if is_label:
            labels[number].append(token)
    assert labels == [episode.label_tokens[each.label].tolist() for each in episode.demonstrations]
    assert separators == [each.separator.tolist() for each in episode.demonstrations]


@settings(thorough, max_examples=250)
@given(some_tokenizers, some_texts, some_templates, some_labels, some_separators, st.integers(0, 3))
@example("wordless", ["a", "b", "c", "d"], "Sentence: {text} Label:", ["Negative", "Positive"], "\n", 0)
@example("llama", ["a", "b", "c", "d"], "{{{text}}} }} Label:", ["Negative", "Positive"], "\n", 0)
@example("bundled", ["lion", "bear", "rain", "snow"], "Words: {text} Label:", ["animals", "food"], " ;", 0)
def test_tokens_spell_the_prompt_or_what_is_wrong_is_named(name, texts, template, labels, separator, seed):
    tokenizer = tokenizer_named(name)
    model: Any = SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(n_ctx=4000))
    made = drawn(model, texts, template, labels, separator, seed)
    if made is None:
        return
    require_right_tokens(made)
    written = made.separator.replace("{eos}", tokenizer.eos_token)
    if all(gives_back(tokenizer, f"x{text}") for text in (written, *made.labels)):
        before = tokenizer.encode("x", add_special_tokens=False)
        assert tokenizer.decode([*before, *made.episode.demonstrations[0].separator.tolist()]) == f"x{written}"


@cache
def model_named(name: str) -> Any:
    model = make_model("rotary" if name == "llama" else "one_layer", d_vocab=VOCABULARY, n_ctx=N_CTX, n_layers=2)
    model.tokenizer = tokenizer_named(name)
    return model


@settings(thorough, max_examples=30)
@given(some_tokenizers, some_texts, st.sampled_from(TEMPLATES), some_labels, some_separators, st.integers(0, 3))
@example("gpt2", ["a", "b", "c", "d"], "{text}", ["a", "ab", "abc"], "", 0)
@example("wordless", ["a", "b", "c", "d"], "Sentence: {text} Label:", ["Negative", "Positive"], "\n", 0)
@example("llama", ["שלום", "😀", "{text}", "</s>"], "{text}", ["no", "none", "not", "no one"], "{eos}", 1)
@example("gpt2", ["same", "same", "same", "same"], "{text}", ["one word"], "", 0)
def test_what_is_made_of_any_episode_is_right_or_what_is_wrong_is_named(name, texts, template, labels, separator, seed):
    model = model_named(name)
    made = drawn(model, texts, template, labels, separator, seed)
    if made is None:
        return
    episode = made.episode
    for context in (None, episode.demonstrations):
        found, expected = capture(model, episode.queries, context=context), reference_capture(model, episode.queries, context)
        for part in ("attn_out", "label_log_probs", "lens_logits", *(("context_scores",) if context else ())):
            assert relative_error(getattr(found, part), expected[part]) < 1e-4
    for method, make in (("gd", gd), ("lcgd", lcgd)):
        update = make(model, episode.demonstrations, lr=LR)
        trained = reference_update(model, episode.demonstrations, method=method, lr=LR)
        assert relative_error(update.losses, trained.losses) < 1e-4
        ft, edited = capture(model, episode.queries, update=update), reference_capture(trained.model, episode.queries)
        assert relative_error(ft.attn_out, edited["attn_out"]) < 1e-4
        assert relative_error(ft.label_log_probs, edited["label_log_probs"]) < 1e-4
    frame = compare(model, episode, lr=LR).frame
    defined = np.isfinite(frame["value"])
    assert (defined == (frame["n"] > 0)).all()
    # Of no queries at all, as where finetuning corrects none, there is nothing to count.
    assert frame.loc[~defined & (frame["subset"] == "all"), "undefined"].gt(0).all()
    assert frame.loc[defined & frame["metric"].str.startswith("sim"), "value"].abs().max() <= 1 + 1e-5
    assert math.isfinite(float(update.gradient_norms.sum()))
