"""The places that are read and written: they exist, hold what the module says, and project what the model projects."""

import math
import warnings

import pytest
import torch

from iclgd_lens.models.hooked import HookedTransformer
from iclgd_lens.models.sites import sites_of, warn_if_processed
from tests.models_zoo import ZOO, make_model

TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]])


@pytest.fixture(scope="module", params=ZOO)
def model(request) -> HookedTransformer:
    return make_model(request.param)


def seen_at(model: HookedTransformer, names: tuple[str, ...]) -> list[torch.Tensor]:
    """What the hooks of these names see, one tensor each."""
    seen = {}
    hooks = [(name, lambda value, hook, name=name: seen.__setitem__(name, value.detach())) for name in names]
    with sites_of(model).attach(hooks, first_at_projections=False):
        model(TOKENS, return_type=None)
    return [seen[name] for name in names]


def stored(attention: torch.nn.Module, name: str) -> torch.Tensor:
    """A key or value parameter as the model stores it: grouped, where it is grouped."""
    return getattr(attention, f"_{name}" if hasattr(attention, f"_{name}") else name)


def test_every_site_holds_what_the_module_says(model):
    sites = sites_of(model)
    stream, per_kv_head = [2, 5, model.cfg.d_model], [2, 5, sites.n_kv_heads, model.cfg.d_head]
    shapes = {
        "residual_in": stream,
        "residual_out": stream,
        "projection_in": stream,
        "keys": per_kv_head,
        "values": per_kv_head,
        "scores": [2, model.cfg.n_heads, 5, 5],
        "attention_out": stream,
    }
    for place, shape in shapes.items():
        names = getattr(sites, place)
        assert len(names) == sites.n_layers == model.cfg.n_layers
        assert [list(value.shape) for value in seen_at(model, names)] == [shape] * len(names), place


def test_projection_in_is_what_the_key_and_value_projections_multiply(model):
    sites = sites_of(model)
    inputs, keys, values = (seen_at(model, names) for names in (sites.projection_in, sites.keys, sites.values))
    for layer in range(sites.n_layers):
        attention = model.blocks[layer].attn
        for output, W, b in [(keys, "W_K", "b_K"), (values, "W_V", "b_V")]:
            projected = torch.einsum("bpm,hmd->bphd", inputs[layer], stored(attention, W)) + stored(attention, b)
            torch.testing.assert_close(projected, output[layer], rtol=1e-6, atol=4e-6)


def test_attention_out_is_what_is_added_to_the_residual_stream(model):
    sites = sites_of(model)
    before, added, after = (seen_at(model, names) for names in (sites.residual_in, sites.attention_out, sites.residual_out))
    for layer in range(sites.n_layers):
        from_mlp = 0 if model.cfg.attn_only else seen_at(model, (f"blocks.{layer}.hook_mlp_out",))[0]
        torch.testing.assert_close(before[layer] + added[layer] + from_mlp, after[layer], rtol=1e-5, atol=1e-5)


def test_a_block_begins_where_the_one_before_it_ends(model):
    sites = sites_of(model)
    before, after = (seen_at(model, names) for names in (sites.residual_in, sites.residual_out))
    assert all(torch.equal(start, end) for start, end in zip(before[1:], after[:-1], strict=True))


def test_scores_are_causal_and_become_the_pattern_by_softmax(model):
    sites = sites_of(model)
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    patterns = seen_at(model, tuple(f"blocks.{layer}.attn.hook_pattern" for layer in range(sites.n_layers)))
    for scores, pattern in zip(seen_at(model, sites.scores), patterns, strict=True):
        assert scores[..., future].eq(-torch.inf).all()
        weights = scores.exp()
        torch.testing.assert_close(weights / weights.sum(-1, keepdim=True) * pattern.sum(-1, keepdim=True), pattern)


def test_key_and_value_heads_are_grouped_as_the_model_groups_them():
    counts = [sites_of(make_model(n_heads=4, n_key_value_heads=n)).n_kv_heads for n in (None, 1, 2, 4)]
    assert counts == [4, 1, 2, 4]


def test_hooks_by_name_read_the_same_input_at_hook_points_alone(model):
    sites = sites_of(model)
    by_name: dict[int, torch.Tensor] = {}
    hooks = [
        (name, lambda value, hook, layer=layer: by_name.__setitem__(layer, value)) for layer, name in enumerate(sites.projection_in)
    ]
    model.run_with_hooks(TOKENS, return_type=None, fwd_hooks=sites.by_name(hooks))
    for layer, seen in enumerate(seen_at(model, sites.projection_in)):
        torch.testing.assert_close(by_name[layer], seen)


def test_windows_are_those_of_the_configuration():
    windows = {shape: sites_of(make_model(shape)).window for shape in ZOO}
    assert {shape: window for shape, window in windows.items() if window < math.inf} == {"local": 4, "local_rotary": 9}


@pytest.mark.parametrize("other", [torch.nn.Linear(2, 2), None, "gpt2"])
def test_anything_but_a_hooked_model_is_refused(other):
    with pytest.raises(TypeError, match=f"a HookedTransformer or a TransformerBridge, got {type(other).__name__}"):
        sites_of(other)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("use_split_qkv_input", True, r"set_use_split_qkv_input\(False\)"),
        ("use_attn_in", True, r"set_use_attn_in\(False\)"),
        ("ungroup_grouped_query_attention", True, r"set_ungroup_grouped_query_attention\(False\)"),
        ("positional_embedding_type", "shortformer", "shortformer models are not supported"),
        ("positional_embedding_type", "alibi", "ALiBi models are not supported"),
        ("attention_dir", "bidirectional", "needs causal attention, got bidirectional"),
        ("load_in_4bit", True, "4 bits are not supported"),
    ],
)
def test_a_configuration_that_the_sites_cannot_serve_is_refused(setting, value, message):
    model = make_model(n_heads=4, n_key_value_heads=2)
    setattr(model.cfg, setting, value)
    with pytest.raises(ValueError, match=message):
        sites_of(model)


def test_the_advice_of_a_refusal_works():
    model = make_model()
    model.set_use_split_qkv_input(True)
    with pytest.raises(ValueError, match="use_split_qkv_input"):
        sites_of(model)
    model.set_use_split_qkv_input(False)
    assert sites_of(model).n_layers == 3


def test_a_missing_hook_is_named():
    model = make_model()
    del model.hook_dict["blocks.1.attn.hook_k"], model.hook_dict["blocks.1.attn.hook_v"]
    with pytest.raises(ValueError, match=r"no hook named blocks\.1\.attn\.hook_k \(2 needed hooks are missing\)"):
        sites_of(model)


@pytest.mark.parametrize("norm", ["LNPre", "RMSPre"])
def test_folded_norms_are_warned_of_with_the_reason(norm):
    model = make_model(normalization_type=norm)
    with pytest.warns(
        UserWarning, match=f"normalization_type='{norm}'.*Neither gradient descent nor the attention output is invariant"
    ):
        warn_if_processed(sites_of(model))


def test_centred_weights_are_warned_of():
    model = make_model()
    model.process_weights_(fold_ln=False, center_writing_weights=True, center_unembed=False)
    with pytest.warns(UserWarning, match="write to the residual stream are centred"):
        warn_if_processed(sites_of(model))


@pytest.mark.parametrize("norm", ["LN", "RMS", None])
def test_unprocessed_models_are_not_warned_of(norm):
    model = make_model(normalization_type=norm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_processed(sites_of(model))
