"""Shapes and random episodes."""

import pytest
import torch

from iclgd_lens.benchmarks import models
from iclgd_lens.benchmarks.models import SHAPES, Sizes, build_model, random_episode
from tests.models_zoo import make_model

SMALL = Sizes(k=3, demonstration=8, queries=4, query=8)


def test_weights_and_episodes_depend_on_the_seed_alone(monkeypatch):
    tiny = {"n_layers": 1, "d_model": 8, "n_heads": 2, "d_head": 4, "n_ctx": 64, "d_vocab": 20, "act_fn": "gelu"}
    monkeypatch.setitem(SHAPES, "tiny", tiny)
    before = torch.get_rng_state()
    first, second, third = (build_model("tiny", device="cpu", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.W_K, second.W_K)
    assert not torch.equal(first.W_K, third.W_K)
    episodes = [random_episode(first, SMALL, seed) for seed in (0, 0, 1)]
    assert episodes[0].digest == episodes[1].digest != episodes[2].digest


def test_episodes_are_of_the_sizes_asked_for():
    sizes = Sizes(k=20, demonstration=16, queries=30, query=8)
    episode = random_episode(make_model(n_ctx=400), sizes)
    assert (episode.k, len(episode.queries)) == (20, 30)
    assert {len(each.tokens) for each in episode.demonstrations} <= set(range(14, 19))
    assert {len(each.tokens) for each in episode.queries} <= {7, 8, 9}
    assert {int(each.tokens[-1]) for each in episode.demonstrations} == {int(word[0]) for word in episode.label_tokens}
    assert len({int(each.tokens[0]) for each in (*episode.demonstrations, *episode.queries)}) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_known_to_transformer_lens(shape, monkeypatch):
    """Built with one narrow layer, as the real ones are large."""
    shrunk = {"n_layers": 1, "d_model": 16, "d_head": 8, "n_heads": 2, "d_vocab": 30}
    shrunk |= {name: 8 for name in ("d_mlp", "rotary_dim") if name in SHAPES[shape]}
    monkeypatch.setitem(models.SHAPES, shape, SHAPES[shape] | shrunk)
    logits = build_model(shape, device="cpu")(torch.tensor([[1, 5, 6]]))
    assert logits.isfinite().all()


def test_an_unknown_shape_is_refused_by_name():
    with pytest.raises(ValueError, match=r"gpt2-small.*got 'gpt2-tiny'"):
        build_model("gpt2-tiny")


def test_what_does_not_fit_the_context_is_refused():
    with pytest.raises(ValueError, match="context window"):
        random_episode(make_model(), Sizes(k=100))
