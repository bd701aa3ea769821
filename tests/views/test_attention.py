"""Attention views hold the numbers that they show, and show what they hold, in a browser without network."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from iclgd_lens import (
    ATTENTION,
    AttentionExample,
    Demonstration,
    Task,
    View,
    attention_example,
    attention_patterns,
    capture,
    changed_heads,
    gd,
    icl_attention,
    implied_attention,
    kendall_tau,
    lcgd,
    rank_heads,
    sim_am_delta,
    without_ends,
)
from iclgd_lens.views.attention import queries_within, strings
from iclgd_lens.views.circuits import page, script_json
from tests.models_zoo import make_model, make_queries
from tests.pages import opened
from tests.tokenizers_zoo import characters_by_offsets, gpt2_style

MARKUP = "</script><script>alert(1)</script> <img src=x onerror=alert(2)> &lt;b&gt; <bos>"


@pytest.fixture(scope="module")
def updates(bundled, episode):
    return {"gd": gd(bundled, episode.demonstrations, lr=0.3), "lcgd": lcgd(bundled, episode.demonstrations, lr=0.3)}


@pytest.fixture(scope="module")
def example(bundled, episode, updates) -> AttentionExample:
    return attention_example(bundled, episode, updates, rows=[1, 4, 5])


def properties(view: View) -> dict:
    """What a CircuitsVis element is given."""
    return json.loads(re.search(r"CircuitsVis\.AttentionHeads, (.*)\)</script>$", view.body).group(1))


def decoded(example: AttentionExample) -> np.ndarray:
    steps = np.frombuffer(base64.b64decode(example.weights), dtype=np.uint8).reshape(*example.shape, -1)
    return steps / 255 * np.array(example.scale).reshape(*example.shape, 1)


def test_an_example_holds_attention_and_implied_attention_as_shares(bundled, episode, updates, example):
    queries = [episode.queries[row] for row in (1, 4, 5)]
    icl = capture(bundled, queries, context=episode.demonstrations, keep=["context_scores", "label_log_probs"])
    zsl = capture(bundled, queries, keep=[*ATTENTION])
    weights = [icl_attention(icl, episode.demonstrations)]
    weights += [implied_attention(update.attribution(zsl), episode.demonstrations) for update in updates.values()]
    shares = torch.stack([each / each.sum(dim=-1, keepdim=True) for each in weights])
    found = decoded(example)
    assert example.methods == ("ICL", "GD", "LCGD")
    assert example.shape == (3, 3, bundled.cfg.n_layers, 1 + bundled.cfg.n_heads)
    largest = shares.amax(dim=-1, keepdim=True).numpy()
    assert (np.abs(found[:, :, :, 1:] - shares.numpy()) <= largest * 0.0025).all()
    mean = shares.mean(dim=3)
    assert np.abs(found[:, :, :, 0] - mean.numpy()).max() < 0.0025
    tau = np.array([np.nan if value is None else value for value in example.tau]).reshape(example.shape)
    assert np.isnan(tau[0]).all()
    assert tau[2][:, :, 1:] == pytest.approx(
        kendall_tau(*(without_ends(shares[each], episode.demonstrations) for each in (0, 2))).numpy(), abs=6e-4
    )
    assert [query["predicted"] for query in example.queries] == [episode.label_words[i].strip() for i in icl.predictions.tolist()]


def test_an_example_knows_its_texts(bundled, episode, example):
    assert [len(tokens) for tokens in example.demonstrations] == [len(each.tokens) - 1 for each in episode.demonstrations]
    for tokens, label in zip(example.demonstrations, example.labels, strict=True):
        assert "".join(tokens).endswith(f"Label: {label}")
    assert example.queries[0]["text"].strip().endswith("Label:")
    assert example.queries[0]["gold"] in episode.label_words


def test_predictions_are_told_from_gold_labels_and_what_has_no_name_from_what_has(bundled, episode, updates):
    first, *others = episode.demonstrations
    wrong = tuple(replace(query, label=1 - query.label) for query in episode.queries)
    renamed = replace(episode, demonstrations=(replace(first, label=None), *others), queries=wrong)
    found = attention_example(bundled, renamed, {"mine": updates["lcgd"]}, rows=[1, 4])
    icl = capture(bundled, [wrong[row] for row in (1, 4)], context=episode.demonstrations)
    words = [word.strip() for word in episode.label_words]
    assert [query["predicted"] for query in found.queries] == [words[label] for label in icl.predictions.tolist()]
    assert [query["gold"] for query in found.queries] == [words[wrong[row].label] for row in (1, 4)]
    assert all(query["predicted"] != query["gold"] for query in found.queries)
    assert found.labels == ("?", *(words[each.label] for each in others))
    assert (found.methods, found.colours) == (("ICL", "mine"), ("#000000", "#666666"))


def test_an_example_has_as_many_queries_as_its_size_allows(bundled, episode, example):
    assert queries_within(bundled, episode, 2) == 8
    assert queries_within(bundled, replace(episode, queries=episode.queries[:5]), 2) == 5
    of_three = len(example.weights)
    assert [queries_within(bundled, episode, 2, size=size) for size in (1, of_three - 4, of_three, 2 * of_three)] == [1, 2, 3, 6]


def test_an_example_is_saved_and_loaded(example, tmp_path):
    example.save(tmp_path / "attention.json")
    loaded = AttentionExample.load(tmp_path / "attention.json")
    assert loaded == example
    assert loaded.view().body.count("iclgdAttention") == 1
    assert loaded._repr_html_().count("var CircuitsVis=") == 1
    for other in ('{"a": 1}', '{"a": ', "[1]"):
        (tmp_path / "other.json").write_text(other)
        with pytest.raises(ValueError, match=r"other\.json does not hold an attention example"):
            AttentionExample.load(tmp_path / "other.json")


def test_patterns_and_changes_say_what_they_show(bundled, episode, updates):
    query, shown = episode.queries[0], f"{len(episode.demonstrations)} demonstrations"
    assert "Attention in layer 2, zero-shot." in attention_patterns(bundled, query, 2).body
    in_context = attention_patterns(bundled, query, 1, demonstrations=episode.demonstrations, update=updates["gd"]).body
    assert f"Attention in layer 1, after {shown}, under an update." in in_context
    changed = changed_heads(bundled, query, episode.demonstrations, updates["gd"]).body
    assert "update minus zero-shot: red where it falls, blue where it rises" in changed
    assert shown in changed


def test_queries_that_are_not_there_are_refused(bundled, episode, updates):
    with pytest.raises(IndexError, match="there is no query 12: the episode has 12, counted from 0"):
        attention_example(bundled, episode, updates, rows=[0, 12])


def test_patterns_are_the_models_own(bundled, episode, updates):
    query, update = episode.queries[0], updates["lcgd"]
    with torch.no_grad(), update.attached(bundled):
        _, cache = bundled.run_with_cache(query.tokens[None])
    found = properties(attention_patterns(bundled, query, 2, update=update))
    assert torch.tensor(found["attention"]) == pytest.approx(cache["pattern", 2][0].numpy(), rel=6e-3, abs=1e-6)
    assert found["tokens"] == strings(bundled, query.tokens)
    assert found["attentionHeadNames"] == ["L2H0", "L2H1", "L2H2", "L2H3"]
    whole = properties(attention_patterns(bundled, query, 0, demonstrations=episode.demonstrations))
    n_tokens = len(query.tokens) + sum(len(each.tokens) - 1 + len(each.separator) for each in episode.demonstrations)
    assert len(whole["tokens"]) == len(whole["attention"][0]) == n_tokens
    assert sum(whole["attention"][1][-1]) == pytest.approx(1, abs=1e-2)
    assert not any(hook.fwd_hooks for hook in bundled.hook_dict.values())


def test_heads_are_ranked_by_sim_am_delta(bundled, episode, updates):
    query, update = episode.queries[3], updates["gd"]
    zsl, icl = (capture(bundled, [query], context=context) for context in (None, episode.demonstrations))
    ft = capture(bundled, [query], update=update)
    expected = sim_am_delta(icl, ft, zsl)[0]
    ranked = rank_heads(icl, ft, zsl)
    assert [value for _, _, value in ranked] == sorted((value for _, _, value in ranked), reverse=True)
    assert all(value == pytest.approx(float(expected[layer, head])) for layer, head, value in ranked)
    assert len(ranked) == int((~expected.isnan()).sum())
    found = properties(changed_heads(bundled, query, episode.demonstrations, update, top=3))
    assert found["attentionHeadNames"] == [f"L{layer}H{head} {value:+.2f}" for layer, head, value in ranked[:3]]
    assert (found["negativeColor"], found["positiveColor"]) == ("#D55E00", "#0072B2")
    assert -found["minValue"] == found["maxValue"] == pytest.approx(np.abs(found["attention"]).max(), rel=6e-3)
    with torch.no_grad():
        _, before = bundled.run_with_cache(query.tokens[None])
        with update.attached(bundled):
            _, after = bundled.run_with_cache(query.tokens[None])
    layer, head, _ = ranked[2]
    change = (after["pattern", layer] - before["pattern", layer])[0, head]
    assert torch.tensor(found["attention"][2]) == pytest.approx(change.numpy(), rel=6e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, query: attention_patterns(model, query, 9), "there is no layer 9"),
        (
            lambda model, query: attention_patterns(model, query, 0, demonstrations=[Demonstration(query.tokens, 1)] * 40),
            "longer than the model's context window of 160",
        ),
        (lambda model, query: changed_heads(model, query, (), None, top=0), "top must be at least 1"),
    ],
)
def test_bad_input_is_named(bundled, episode, call, message):
    with pytest.raises((IndexError, ValueError), match=message):
        call(bundled, episode.queries[0])


def test_a_model_without_a_tokenizer_shows_numbers():
    model = make_model()
    query = make_queries((4,))[0]
    assert properties(attention_patterns(model, query, 0))["tokens"] == [str(token) for token in query.tokens.tolist()]


def test_json_in_a_script_cannot_end_it():
    assert "<" not in script_json({"a": MARKUP})
    assert json.loads(script_json({"a": MARKUP})) == {"a": MARKUP}
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_json({"a": float("nan")})


def test_a_view_has_all_that_it_needs_wherever_it_is_shown(example):
    view = example.view()
    assert view.local_src == view.cdn_src == view._repr_html_()
    assert view.local_src.count("var CircuitsVis=") == 1
    assert view.local_src.endswith(view.body)


def with_markup(example: AttentionExample) -> AttentionExample:
    """The same, with markup for a label, a query, and a demonstration's first token."""
    first = (MARKUP, *example.demonstrations[0][1:])
    asked = {"text": MARKUP, "predicted": MARKUP, "gold": None}
    return replace(
        example,
        demonstrations=(first, *example.demonstrations[1:]),
        labels=(MARKUP, *example.labels[1:]),
        queries=(asked, *example.queries[1:]),
    )


def test_views_are_drawn_offline_and_switch(chromium, example, tmp_path):
    asked = {"text": "Words: lion Label:", "predicted": "alpha", "gold": "beta"}
    example = replace(example, queries=(example.queries[0], asked, example.queries[2]))
    path = example.view().save(tmp_path / "view.html", title="weights of tokens")
    with opened(chromium, path) as shown:
        assert shown.title() == "weights of tokens"
        cells = shown.locator(".iclgd-tokens")
        assert cells.count() == 3 * len(example.demonstrations)
        spans = cells.nth(1).locator(".colored-tokens span span")
        assert [text.replace("\xa0", " ") for text in spans.all_text_contents()] == list(example.demonstrations[0])

        def colours() -> list[str]:
            script = "spans => spans.map(span => getComputedStyle(span).backgroundColor)"
            return shown.locator(".colored-tokens span span").evaluate_all(script)

        seen = [colours()]
        assert len(set(seen[0])) > 10
        for name, option in (("layer", "0"), ("head", "2"), ("query", "1")):
            shown.select_option(f"select[name={name}]", option)
            shown.wait_for_timeout(200)
            seen.append(colours())
            assert seen[-1] != seen[-2], name
        assert shown.locator(".iclgd-about").text_content() == "Words: lion Label: → in-context alpha, gold beta"
        headings = shown.locator(".iclgd-head").all_text_contents()[1:]
        told = [re.fullmatch(r"(\w+) darkest ([\d.]+)(?:, τ with ICL (\S+))?", heading).groups() for heading in headings]
        scale, tau = (np.array(each, dtype=float).reshape(example.shape)[:, 1, 0, 2] for each in (example.scale, example.tau))
        assert [method for method, _, _ in told] == ["ICL", "GD", "LCGD"]
        assert [float(darkest) for _, darkest, _ in told] == pytest.approx(scale, abs=6e-4)
        assert told[0][2] is None
        assert [each.startswith("−") for _, _, each in told[1:]] == [False, True] == [value < 0 for value in tau[1:]]
        assert [float(each.replace("−", "-")) for _, _, each in told[1:]] == pytest.approx(tau[1:], abs=6e-3)


def test_the_darkest_token_is_the_heaviest_and_has_its_method_s_full_colour(chromium, example, tmp_path):
    with opened(chromium, example.view().save(tmp_path / "view.html")) as shown:
        colours = [
            shown.locator(f"[data-method={method}] .colored-tokens span span").evaluate_all(
                "spans => spans.map(span => getComputedStyle(span).backgroundColor.match(/\\d+/g).map(Number))"
            )
            for method in example.methods
        ]
    for method, full in enumerate(example.colours):
        weights = decoded(example)[method, 0, -1, 0]
        darkest = np.argmin(np.sum(colours[method], axis=-1))
        assert len(colours[method]) == len(weights)
        assert darkest == np.argmax(weights)
        assert colours[method][darkest] == pytest.approx(list(bytes.fromhex(full[1:])), abs=4)


@pytest.mark.parametrize("width", [1280, 700])
def test_markup_in_data_stays_text(chromium, example, tmp_path, width):
    with opened(chromium, with_markup(example).view().save(tmp_path / "view.html"), width) as shown:
        token = shown.locator("[data-method=ICL] .colored-tokens span span").first
        assert token.text_content().replace("\xa0", " ") == MARKUP
        assert shown.locator(".iclgd-label").first.text_content() == MARKUP
        assert shown.locator(".iclgd-about").text_content() == f"{MARKUP} → in-context {MARKUP}"
        assert shown.locator("img").count() == 0
        assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_several_views_stand_on_one_page(chromium, bundled, episode, updates, example, tmp_path):
    query = episode.queries[0]
    views = [
        attention_patterns(bundled, query, 1),
        example.view(),
        changed_heads(bundled, query, episode.demonstrations, updates["lcgd"]),
    ]
    path = tmp_path / "page.html"
    path.write_text(page("views", "\n".join(view._repr_html_() for view in views)))
    with opened(chromium, path) as shown:
        assert shown.locator(".iclgd-view").count() == 3
        assert shown.locator(".iclgd-view .iclgd-view").count() == 0
        assert shown.locator("canvas").count() == (4 + 1) + (8 + 1)
        pixels = "canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data"
        assert all(shown.locator("canvas").evaluate_all(f"all => all.map(canvas => {pixels}.some(Boolean))"))
        assert shown.locator(".colored-tokens").count() == 3 * len(example.demonstrations)


def test_the_library_runs_once_on_a_page_of_several_views(chromium, example, tmp_path):
    path = tmp_path / "page.html"
    views = [example.view()._repr_html_() for _ in range(2)]
    path.write_text(page("views", "\n<script>var first = CircuitsVis</script>\n".join(views)))
    with opened(chromium, path) as shown:
        assert shown.evaluate("window.first === window.CircuitsVis")


def test_demonstrations_with_markup_go_all_the_way(chromium, bundled, tmp_path):
    rows = [{"text": f"{word} {MARKUP}", "label": label} for word, label in (("lion", 0), ("bread", 1)) for _ in range(8)]
    task = Task.from_rows(rows, name="hostile", template="Words: {text} Label:", labels={0: "alpha", 1: "beta"})
    episode = task.episode(bundled, k=3, n_queries=4, seed=0)
    shown = attention_example(bundled, episode, {"lcgd": lcgd(bundled, episode.demonstrations, lr=0.1)})
    with opened(chromium, shown.view().save(tmp_path / "view.html")) as page_:
        assert page_.locator("img").count() == 0


@pytest.fixture(scope="module")
def split():
    """A model with a tokenizer of bytes, and an episode whose characters are split over tokens."""
    tokenizer = gpt2_style()
    model = make_model(d_vocab=len(tokenizer), n_ctx=256)
    model.tokenizer = tokenizer
    texts = ["映画は最高だ", "great 😀👍🏽", "मूवी अच्छी है", "</script> 🇩🇪", "plain", "real \ufffd"]
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(texts)]
    task = Task.from_rows(rows, name="split", template="Review: {text} Label:", labels=["good", "bad"])
    return model, task.episode(model, k=3, n_queries=3, seed=0)


def characters(tokenizer, tokens: list[int]) -> list[list[int]]:
    """The places of each character's tokens."""
    again, groups = characters_by_offsets(tokenizer, tokenizer.decode(tokens))
    assert again == tokens
    return groups


def test_characters_split_over_tokens_are_one_in_an_example_with_the_sum_of_their_weights(split):
    model, episode = split
    update = gd(model, episode.demonstrations, lr=0.1)
    found = attention_example(model, episode, {"gd": update}, rows=range(3))
    zsl = capture(model, episode.queries, keep=[*ATTENTION])
    icl = capture(model, episode.queries, context=episode.demonstrations, keep=["context_scores"])
    weights = [icl_attention(icl, episode.demonstrations), implied_attention(update.attribution(zsl), episode.demonstrations)]
    shares = torch.stack([each / each.sum(dim=-1, keepdim=True) for each in weights])
    expected, start = [], 0
    for demonstration, shown in zip(episode.demonstrations, found.demonstrations, strict=True):
        tokens = demonstration.tokens[1:].tolist()
        places = characters(model.tokenizer, tokens)
        assert "".join(shown) == model.tokenizer.decode(tokens)
        assert [*shown] == [model.tokenizer.decode([tokens[place] for place in each]) for each in places]
        expected += [shares[..., [start + place for place in each]].sum(dim=-1) for each in places]
        start += len(tokens)
    assert len(expected) < start
    summed = torch.stack(expected, dim=-1)
    largest = summed.amax(dim=-1, keepdim=True).numpy()
    assert (np.abs(decoded(found)[:, :, :, 1:] - summed.numpy()) <= largest * 0.0025).all()
    compared = without_ends(shares, episode.demonstrations)
    tau = np.array([np.nan if value is None else value for value in found.tau]).reshape(found.shape)[1][:, :, 1:]
    assert tau == pytest.approx(kendall_tau(compared[0], compared[1]).numpy(), abs=6e-4)
    texts = [query["text"] for query in found.queries]
    assert texts == [model.tokenizer.decode(query.tokens[1:]) for query in episode.queries]
    assert any("\ufffd" not in text and not text.isascii() for text in texts)


def test_characters_split_over_tokens_are_one_row_and_column_of_patterns_and_of_changes(split):
    model, episode = split
    query = next(query for query in episode.queries if not model.tokenizer.decode(query.tokens).isascii())
    update = gd(model, episode.demonstrations, lr=20.0)
    with torch.no_grad():
        _, before = model.run_with_cache(query.tokens[None])
        with update.attached(model):
            _, after = model.run_with_cache(query.tokens[None])
    groups = characters(model.tokenizer, query.tokens.tolist())
    assert len(groups) < len(query.tokens)

    def by_character(pattern):
        rows = pattern[..., [each[-1] for each in groups], :]
        return torch.stack([rows[..., each].sum(dim=-1) for each in groups], dim=-1).numpy()

    view = attention_patterns(model, query, 2, update=update)
    found = properties(view)
    assert np.array(found["attention"]) == pytest.approx(by_character(after["pattern", 2][0]), rel=6e-3, abs=1e-6)
    assert "".join(found["tokens"]) == model.tokenizer.decode(query.tokens)
    assert "Tokens that make up one character together are shown as one" in view.body
    changed = properties(changed_heads(model, query, episode.demonstrations, update, top=1))
    layer, head = map(int, re.match(r"L(\d+)H(\d+) ", changed["attentionHeadNames"][0]).groups())
    expected = by_character((after["pattern", layer] - before["pattern", layer])[0, head])
    assert np.array(changed["attention"][0]) == pytest.approx(expected, rel=6e-3, abs=1e-4)
    assert changed["tokens"] == found["tokens"]
    assert changed["maxValue"] == pytest.approx(np.abs(expected).max(), rel=1e-3)


def test_no_caption_speaks_of_characters_where_each_token_is_shown_by_itself(bundled, episode):
    assert "one character" not in attention_patterns(bundled, episode.queries[0], 1).body


def test_queries_to_choose_from_are_cut_between_characters(chromium, example, tmp_path):
    asked = {**example.queries[0], "text": "😀" * 200}
    path = replace(example, queries=(asked, *example.queries[1:])).view().save(tmp_path / "view.html")
    with opened(chromium, path) as shown:
        assert shown.locator("select[name=query] option").first.text_content() == "1: " + "😀" * 117
