"""Untrained twins: what is kept is kept bitwise, the rest is drawn anew by the seed, and nothing else changes."""

from copy import deepcopy

import pytest
import torch

from iclgd_lens.models.bundled.learner import build_learner
from iclgd_lens.models.hooked import HookedTransformer
from iclgd_lens.models.loading import load_model
from iclgd_lens.models.untrained import draw_weights, untrained_twin
from tests.models_zoo import ZOO, make_model

EVERYTHING = ("embed", "pos_embed", "ln", "unembed")
MIXTURE = {"normalization_type": "RMS", "gated_mlp": True, "num_experts": 2, "experts_per_token": 1}


@pytest.fixture(scope="module", params=[*ZOO, "bundled"])
def model(request) -> HookedTransformer:
    return load_model("bundled", backend="hooked") if request.param == "bundled" else make_model(request.param)


def part_of(name: str) -> str:
    """The part of `keep` that a parameter belongs to, written down apart from the package."""
    if name in ("embed.W_E", "pos_embed.W_pos"):
        return name.split(".")[0]
    if name in ("unembed.W_U", "unembed.b_U"):
        return "unembed"
    return "ln" if "ln" in name or "_norm." in name else "attention and MLP"


def weights(model: HookedTransformer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("keep", [EVERYTHING, ("ln",), ("embed",), ("pos_embed",), ("unembed",), ("embed", "unembed"), ()])
def test_the_twin_keeps_what_is_named_bitwise_and_nothing_else(model, keep):
    trained, drawn = weights(model), weights(untrained_twin(model, keep=keep))
    assert [(name, w.shape, w.dtype) for name, w in drawn.items()] == [(name, w.shape, w.dtype) for name, w in trained.items()]
    for name, weight in drawn.items():
        assert torch.equal(weight, trained[name]) is (part_of(name) in keep), name


def test_the_default_keeps_embeddings_norms_and_unembedding(model):
    assert same(weights(untrained_twin(model)), weights(untrained_twin(model, keep=EVERYTHING)))


def test_new_matrices_have_the_model_s_initial_spread_new_biases_are_zero_and_new_scales_one(model):
    drawn = weights(untrained_twin(model, keep=()))
    matrices = torch.cat([weight.flatten() for name, weight in drawn.items() if "W_" in name])
    assert matrices.std().item() == pytest.approx(model.cfg.initializer_range, rel=0.05)
    assert abs(matrices.mean().item()) < 0.05 * model.cfg.initializer_range
    for name, weight in drawn.items():
        if "W_" not in name:
            assert weight.eq(1.0 if name.endswith(".w") else 0.0).all(), name


def test_a_seed_repeats_its_twin_and_another_changes_every_new_matrix(model):
    first, again, other = (weights(untrained_twin(model, seed=seed)) for seed in (3, 3, 4))
    assert same(first, again)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == {name for name in first if part_of(name) == "attention and MLP" and "W_" in name}


def test_a_new_weight_depends_on_the_seed_alone_and_not_on_what_is_kept(model):
    whole, kept = (weights(untrained_twin(model, seed=1, keep=keep)) for keep in ((), EVERYTHING))
    assert all(torch.equal(whole[name], kept[name]) for name in whole if part_of(name) == "attention and MLP")


def test_the_model_is_only_read(model):
    before, config = weights(model), deepcopy(model.cfg.to_dict())
    twin = untrained_twin(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert same(weights(model), before)
    assert model.cfg.to_dict() == config


def test_torch_s_random_state_is_left_alone_even_where_the_config_has_a_seed(model):
    seeded = deepcopy(model)
    seeded.cfg.seed = 5
    torch.manual_seed(987)
    before = torch.get_rng_state()
    untrained_twin(seeded)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_twin_shares_the_tokenizer_and_runs_as_the_model_does():
    model = load_model("bundled")
    twin = untrained_twin(model)
    assert type(twin) is type(model)
    assert twin.tokenizer is model.tokenizer
    assert twin.to_tokens("Words: lion").equal(model.to_tokens("Words: lion"))
    assert twin.cfg.tokenizer_name == model.cfg.tokenizer_name
    assert twin.cfg.tokenizer_prepends_bos == model.cfg.tokenizer_prepends_bos


def test_the_twin_s_outputs_are_finite_and_not_the_model_s(model):
    tokens = torch.tensor([[1, 2, 3, 4]])
    ours, theirs = untrained_twin(model)(tokens), model(tokens)
    assert ours.isfinite().all()
    assert not torch.allclose(ours, theirs, atol=1e-2)


def test_the_twin_with_the_model_s_weights_is_the_model(model):
    """So nothing but its parameters differs: no buffer, setting or mode."""
    twin = untrained_twin(model, keep=())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(dict(model.named_parameters())[name])
    tokens = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(twin(tokens), model(tokens))


@pytest.mark.parametrize("training", [True, False])
def test_the_twin_is_in_the_model_s_mode(training):
    assert untrained_twin(make_model().train(training)).training is training


@pytest.mark.parametrize("keep", [("norms",), ("embed", "W_E"), "ln"])
def test_an_unknown_part_to_keep_is_refused_and_the_known_are_listed(keep):
    with pytest.raises(ValueError, match="keep may name embed, pos_embed, ln, unembed; got"):
        untrained_twin(make_model(), keep=keep)


def test_the_norm_behind_the_embedding_is_kept_with_the_norms():
    model = make_model(post_embedding_ln=True)
    assert torch.equal(untrained_twin(model, keep=("ln",)).embed.ln.w, model.embed.ln.w)


def test_a_mixture_of_experts_gets_random_experts():
    model = make_model(**MIXTURE)
    drawn = weights(untrained_twin(model))
    assert all(weight.any() for name, weight in drawn.items() if "experts" in name)


def test_torch_s_random_state_is_left_alone_by_a_mixture_of_experts():
    model = make_model(**MIXTURE)
    torch.manual_seed(987)
    before = torch.get_rng_state()
    untrained_twin(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_twin_of_a_seed_is_not_the_initialisation_of_that_seed():
    """The bundled learner's embeddings grew up with the initial weights of seed 0: its twin must have others."""
    start = build_learner()
    draw_weights(start, torch.Generator().manual_seed(0))
    assert not torch.equal(untrained_twin(start, seed=0, keep=()).W_K, start.W_K)


def test_a_model_initialised_in_another_way_is_refused_by_name():
    with pytest.raises(ValueError, match="init_mode='xavier_uniform'"):
        untrained_twin(make_model(init_mode="xavier_uniform"))
