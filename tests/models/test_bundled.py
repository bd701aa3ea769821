"""The bundled in-context learner: its language, its file, its training, and what it can do."""

import hashlib
import random
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file, save_file

from iclgd_lens.data.episodes import Episode
from iclgd_lens.data.registry import load_task
from iclgd_lens.draws import pick, shuffled
from iclgd_lens.models.bundled import training
from iclgd_lens.models.bundled.language import (
    LABEL_POOL,
    NEUTRAL_LABELS,
    SEPARATOR,
    TEMPLATE,
    TOPIC_WORDS,
    vocabulary,
)
from iclgd_lens.models.bundled.learner import N_CTX, WEIGHTS, build_learner, build_tokenizer, load_bundled, save_bundled
from iclgd_lens.models.bundled.training import draw_batch, train_bundled, training_loss
from iclgd_lens.models.hooked import HookedTransformer
from iclgd_lens.models.untrained import untrained_twin
from iclgd_lens.runs.capture import capture
from tests.models_zoo import require_hooked_transformer

# The language


def test_every_word_is_one_token_of_its_own():
    words = vocabulary()
    assert len(set(words)) == len(words)
    tokenizer = build_tokenizer()
    assert tokenizer.encode(" ".join(words), add_special_tokens=False) == list(range(len(words)))
    assert len(tokenizer) == len(words)


def test_topics_have_equally_many_words_of_their_own_and_none_names_a_label():
    own = [word for words in TOPIC_WORDS.values() for word in words]
    assert len(set(own)) == len(own)
    assert len({len(words) for words in TOPIC_WORDS.values()}) == 1
    assert not set(own) & set(LABEL_POOL)
    assert set(LABEL_POOL) == set(TOPIC_WORDS) | set(NEUTRAL_LABELS)
    assert all(word.isalpha() for word in (*own, *LABEL_POOL))


def test_the_template_and_the_separator_are_known_words():
    known = set(vocabulary())
    assert {*TEMPLATE.format(text="").split(), SEPARATOR.strip()} <= known


class Scripted(random.Random):
    """A source of randomness whose only working method is `random`: the one that Python keeps the same for ever."""

    def getrandbits(self, k):
        raise AssertionError("only random() is the same on every machine")


def test_draws_use_random_alone_and_are_uniform():
    rng = Scripted("uniform")
    picks = [pick(rng, "abcd") for _ in range(4000)]
    orders = ["".join(shuffled(rng, "abc")) for _ in range(6000)]
    assert all(900 < picks.count(letter) < 1100 for letter in "abcd")
    assert len(set(orders)) == 6
    assert all(850 < orders.count(order) < 1150 for order in set(orders))


def test_to_tokens_puts_a_single_bos_in_front(bundled):
    assert bundled.to_str_tokens("Words: lion Label: animals ;") == ["<bos>", "Words:", "lion", "Label:", "animals", ";"]


# The file


def test_the_weights_file_is_small():
    assert WEIGHTS.stat().st_size < 1_500_000


def test_the_shape_is_the_documented_one(bundled):
    cfg = bundled.cfg
    assert (cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.n_ctx, cfg.normalization_type) == (4, 4, 64, N_CTX, "LN")
    assert bundled.cfg.d_vocab == len(vocabulary())


def test_save_and_load_is_a_round_trip_bitwise(bundled, tmp_path):
    require_hooked_transformer()
    path = tmp_path / "a" / "b" / "weights.safetensors"
    save_bundled(bundled, path)
    again = load_bundled(path)
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in bundled.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), bundled.parameters(), strict=True))
    assert not again.training
    assert [file.name for file in path.parent.iterdir()] == ["weights.safetensors"]


def test_saving_over_a_file_replaces_it(bundled, tmp_path):
    require_hooked_transformer()
    path = tmp_path / "weights.safetensors"
    save_bundled(untrained_twin(bundled, keep=()), path)
    save_bundled(bundled, path)
    assert torch.equal(load_bundled(path).W_E, bundled.W_E)


def test_a_file_that_is_not_there_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors; make them with `iclgd train-bundled"):
        load_bundled(tmp_path / "absent.safetensors")


def digest() -> str:
    return hashlib.sha256("\n".join(vocabulary()).encode()).hexdigest()[:16]


@pytest.mark.parametrize("metadata", [None, {"vocabulary": "0123456789abcdef"}])
def test_weights_of_another_vocabulary_are_refused(tmp_path, metadata):
    save_file(load_file(WEIGHTS), tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=rf"trained on another vocabulary .*{digest()}.*train them again"):
        load_bundled(tmp_path / "a.safetensors")


def test_a_changed_vocabulary_refuses_the_shipped_weights(monkeypatch):
    monkeypatch.setattr("iclgd_lens.models.bundled.learner.vocabulary", lambda: [*vocabulary(), "newcomer"])
    with pytest.raises(ValueError, match="trained on another vocabulary"):
        load_bundled()


@pytest.mark.parametrize("change", [{"unembed.W_U": None}, {"stranger": torch.ones(2)}])
def test_a_file_with_other_parameters_is_refused_by_their_names(tmp_path, change):
    state = {name: weight for name, weight in {**load_file(WEIGHTS), **change}.items() if weight is not None}
    save_file(state, tmp_path / "a.safetensors", metadata={"vocabulary": digest()})
    with pytest.raises(ValueError, match=rf"does not hold the bundled learner: parameter {next(iter(change))} has"):
        load_bundled(tmp_path / "a.safetensors")


@pytest.mark.parametrize("shape", [(1,), (3,)])
def test_a_file_with_a_parameter_of_another_shape_is_refused_by_its_name(tmp_path, shape):
    save_file(
        {**load_file(WEIGHTS), "unembed.b_U": torch.ones(shape)}, tmp_path / "a.safetensors", metadata={"vocabulary": digest()}
    )
    with pytest.raises(ValueError, match=r"unembed\.b_U"):
        load_bundled(tmp_path / "a.safetensors")


# The training


def test_a_batch_is_bos_and_seventeen_examples_a_row():
    tokens = draw_batch(random.Random("a"), 5)
    assert list(tokens.shape) == [5, 154]
    words = vocabulary()
    for row in tokens.tolist():
        text = [words[token] for token in row]
        assert text[0] == "<bos>"
        for start in range(1, 154, 9):
            assert (text[start], text[start + 6], text[start + 8]) == ("Words:", "Label:", ";")
            assert text[start + 7] in LABEL_POOL


def test_a_batch_repeats_by_its_seed_and_its_rows_are_different_episodes():
    first, again, other = (draw_batch(random.Random(seed), 4) for seed in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(row) for row in first.tolist()}) == 4


def test_two_in_five_training_episodes_are_natural_and_have_two_to_four_classes():
    words, topic_of = vocabulary(), {word: topic for topic, words in TOPIC_WORDS.items() for word in words}
    natural, class_counts = [], set()
    for row in draw_batch(random.Random("shares"), 400).tolist():
        text = [words[token] for token in row]
        labels = text[8::9]
        topics = [Counter(topic_of[word] for word in text[start : start + 5]).most_common(1)[0][0] for start in range(2, 154, 9)]
        natural.append(labels == topics)
        class_counts.add(len(set(labels)))
    assert sum(natural) / len(natural) == pytest.approx(0.4, abs=0.05)
    assert {2, 3, 4} <= class_counts <= {1, 2, 3, 4}


def test_the_loss_is_that_of_the_label_words_and_a_tenth_of_the_others():
    tokens = draw_batch(random.Random("loss"), 2)
    logits = torch.randn(2, 154, len(vocabulary()), generator=torch.Generator().manual_seed(0))
    log_probs = logits.double().log_softmax(-1)
    label_losses, other_losses = [], []
    for row in range(2):
        for position in range(1, 154):
            loss = -log_probs[row, position - 1, tokens[row, position]]
            (label_losses if position % 9 == 8 else other_losses).append(loss)
    assert len(label_losses) == 2 * 17
    by_hand = torch.stack(label_losses).mean() + 0.1 * torch.stack(other_losses).mean()
    assert training_loss(logits, tokens).item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_only_label_words_carry_the_full_weight():
    tokens = draw_batch(random.Random("marks"), 1)
    logits = torch.zeros(1, 154, len(vocabulary()), requires_grad=True)
    training_loss(logits, tokens).backward()
    weight = logits.grad.abs().sum(-1)[0]
    is_label = torch.arange(154) % 9 == 7
    assert weight[is_label].min() > 10 * weight[~is_label].max()
    assert weight[-1] == 0


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(training, "BATCH", 4)


@pytest.mark.usefixtures("small_batches")
def test_training_repeats_by_its_seed_and_reports_every_step():
    steps = []
    torch.manual_seed(987)
    before = torch.get_rng_state()
    first = train_bundled(steps=2, seed=1, on_step=lambda step, loss: steps.append((step, loss)))
    assert torch.equal(torch.get_rng_state(), before)
    again, other = train_bundled(steps=2, seed=1), train_bundled(steps=2, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.W_E, other.W_E)
    assert not first.training
    assert [step for step, _ in steps] == [1, 2]
    # At the start every word is as likely as any other.
    assert steps[0][1] == pytest.approx(1.1 * torch.tensor(float(len(vocabulary()))).log().item(), rel=0.1)


@pytest.mark.usefixtures("small_batches")
def test_training_lowers_the_loss():
    losses = []
    train_bundled(steps=15, on_step=lambda step, loss: losses.append(loss))
    assert losses[-1] < losses[0] - 1.0


@pytest.mark.parametrize("steps", [0, -1])
def test_a_training_of_no_steps_is_refused(steps):
    with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps}"):
        train_bundled(steps=steps)


def test_a_trained_model_can_be_saved_and_loaded(tmp_path, small_batches):
    trained = train_bundled(steps=1)
    save_bundled(trained, tmp_path / "a.safetensors")
    assert torch.equal(load_bundled(tmp_path / "a.safetensors").W_E, trained.W_E)


def test_an_unfilled_learner_has_the_shape_of_the_shipped_weights():
    shapes = {name: list(parameter.shape) for name, parameter in build_learner().named_parameters()}
    assert shapes == {name: list(weight.shape) for name, weight in load_file(WEIGHTS).items()}


# What it can do: fresh episodes, of other seeds than training's


def fresh_episodes(model: HookedTransformer, name: str) -> Iterator[Episode]:
    task = load_task(name)
    return (task.episode(model, k=12, n_queries=4, seed=seed) for seed in range(1000, 1200))


def accuracy(model: HookedTransformer, name: str, *, in_context: bool) -> float:
    right = [
        run.predictions == run.labels
        for episode in fresh_episodes(model, name)
        for run in [
            capture(model, episode.queries, context=episode.demonstrations if in_context else None, keep=["label_log_probs"])
        ]
    ]
    return torch.cat(right).float().mean().item()


def test_it_learns_remapped_labels_in_context_and_only_there(bundled):
    assert accuracy(bundled, "bundled/remapped", in_context=True) >= 0.95
    assert accuracy(bundled, "bundled/remapped", in_context=False) <= 0.6


def test_it_knows_natural_labels_with_and_without_demonstrations(bundled):
    assert accuracy(bundled, "bundled/natural", in_context=True) >= 0.97
    assert accuracy(bundled, "bundled/natural", in_context=False) >= 0.9


@pytest.mark.parametrize("name", ["bundled/remapped", "bundled/natural"])
@pytest.mark.parametrize("in_context", [True, False])
def test_its_untrained_twin_is_at_chance(twin, name, in_context):
    assert 0.4 <= accuracy(twin, name, in_context=in_context) <= 0.6
