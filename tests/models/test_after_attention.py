"""What follows a block's heads, made again of what it has computed: the same value and gradients as through the modules."""

import pytest
import torch

from iclgd_lens.models.sites import sites_of
from tests.models_zoo import BOS, make_model
from tests.reference import relative_error

GATED = {"gated_mlp": True}
CASES = {
    "gelu": {},
    "gelu of GPT-2": {"act_fn": "gelu_new"},
    "relu": {"act_fn": "relu"},
    "SoLU": {"act_fn": "solu"},
    "SoLU and a norm": {"act_fn": "solu_ln"},
    "gated": {**GATED, "act_fn": "silu", "normalization_type": "RMS"},
    "gated by gelu": {**GATED, "act_fn": "gelu_pytorch_tanh"},
    "no norm": {"normalization_type": None},
    "folded norm": {"normalization_type": "LNPre"},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("positions", [slice(3, 5), slice(0, 1), slice(0, 6)])
def test_value_and_gradient_are_those_of_the_part_itself(changes, positions):
    model = make_model("one_layer", **changes)
    tokens = torch.tensor([[BOS, 3, 9, 4, 7, 2]])
    part = sites_of(model).after_attention(0)
    _, cache = model.run_with_cache(tokens)

    def read(name):
        return cache[name][:, positions].detach().clone()

    def block_from(residual, heads):
        """The block's output by its own weights and modules, as a function of its input and of its heads' outputs."""
        block = model.blocks[0]
        between = residual + torch.einsum("bphd,hdm->bpm", heads, block.attn.W_O) + block.attn.b_O
        return between + block.mlp(block.ln2(between))

    expected_leaves, leaves = (
        [read(name).requires_grad_() for name in ("blocks.0.hook_resid_pre", "blocks.0.attn.hook_z")] for _ in range(2)
    )
    expected, found = block_from(*expected_leaves), part.again(*leaves, [read(name) for name in part.known])
    assert relative_error(found.detach(), expected.detach()) < 1e-6
    assert relative_error(found.detach(), read("blocks.0.hook_resid_post")) < 1e-6
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    by_parts, by_known = (torch.autograd.grad(out, of, direction) for out, of in ((expected, expected_leaves), (found, leaves)))
    for actual, wanted in zip(by_known, by_parts, strict=True):
        assert relative_error(actual, wanted) < 1e-5


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ("attention_only", {}),
        ("parallel_mlp", {}),
        ("norms_before_and_after", {}),
        ("post_norm", {}),
        ("one_layer", {"num_experts": 2, "experts_per_token": 1, "normalization_type": "RMS", "gated_mlp": True}),
        ("one_layer", {"gated_mlp": True, "act_fn": "solu_ln"}),
    ],
)
def test_other_blocks_are_not_made_again(shape, changes):
    assert sites_of(make_model(shape, **changes)).after_attention(0) is None


@pytest.mark.parametrize(
    "place",
    [
        "attn.hook_result",
        "hook_attn_out",
        "hook_resid_mid",
        "ln2.hook_normalized",
        "mlp.hook_pre",
        "mlp.hook_post",
        "hook_mlp_out",
        "hook_resid_post",
    ],
)
def test_a_block_with_a_hook_behind_its_heads_is_not_made_again(place):
    model = make_model("one_layer")
    sites = sites_of(model)
    with model.hooks(fwd_hooks=[(f"blocks.0.{place}", lambda tensor, hook: tensor)]):
        assert sites.after_attention(0) is None
    assert sites.after_attention(0) is not None
