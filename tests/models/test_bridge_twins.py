"""A bridge's twin is initialised as its architecture is, and keeps what is named; dtypes are the model's, one by one."""

import pytest
import torch
import transformers as hf
from torch import nn

from iclgd_lens.models import untrained
from iclgd_lens.models.hooked import is_bridge
from iclgd_lens.models.loading import load_model
from iclgd_lens.models.untrained import untrained_twin
from tests.hf_zoo import ARCHITECTURES, draw, make_hf_model
from tests.models_zoo import require_hooked_transformer
from tests.tokenizers_zoo import gpt2_style

NOTHING = ()


def plain_names(model):
    return {name.replace("._original_component", ""): tensor for name, tensor in model.original_model.named_parameters()}


@pytest.fixture
def hf_twin(monkeypatch):
    """Makes a twin and returns the Hugging Face model of it, before a bridge goes around it and renames its weights."""

    def make(hf_model, **options):
        model = load_model(hf_model=hf_model)
        with monkeypatch.context() as patched:
            patched.setattr(untrained, "make_bridge", lambda twin, **settings: Namespace(twin))
            patched.setattr(untrained, "note_quantisation", lambda *args: None)
            return dict(untrained_twin(model, **options).original_model.named_parameters())

    return make


class Namespace:
    def __init__(self, twin):
        self.original_model = twin


def opt(**changes):
    sizes = {"vocab_size": 800, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128}
    return hf.OPTForCausalLM(hf.OPTConfig(**sizes, word_embed_proj_dim=64, max_position_embeddings=96, pad_token_id=1, **changes))


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_each_weight_has_the_spread_that_hugging_face_gives_it(architecture, hf_twin):
    """Against the mean spread of several models that the class made by itself."""
    drawn = hf_twin(make_hf_model(architecture), keep=NOTHING)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        fresh = [dict(ARCHITECTURES[architecture].new().named_parameters()) for _ in range(3)]
    assert drawn.keys() == fresh[0].keys()
    for name, weight in drawn.items():
        expected = float(torch.stack([one[name].detach().std(correction=0) for one in fresh]).mean())
        assert float(weight.detach().std(correction=0)) == pytest.approx(expected, rel=0.05 + 4 / weight.numel() ** 0.5), name
        assert float(weight.detach().mean()) == pytest.approx(
            float(fresh[0][name].detach().mean()), abs=6 * expected / weight.numel() ** 0.5 + 1e-6
        ), name


def test_a_twin_of_opt_has_its_own_spread(hf_twin):
    twin = hf_twin(opt(init_std=0.07), keep=NOTHING)
    assert float(twin["model.decoder.layers.0.self_attn.k_proj.weight"].detach().std()) == pytest.approx(0.07, rel=0.05)


def test_a_twin_of_gpt_2_has_smaller_residual_projections(hf_twin):
    twin = hf_twin(make_hf_model("gpt2"), keep=NOTHING)
    narrow, wide = (float(twin[f"transformer.h.0.attn.{name}.weight"].detach().std()) for name in ("c_proj", "c_attn"))
    assert narrow / wide == pytest.approx((2 * 3) ** -0.5, rel=0.1)  # three layers, two projections each


def test_a_folder_of_opt_as_a_hooked_transformer_has_a_twin_with_its_spread(tmp_path):
    require_hooked_transformer()
    source = opt(init_std=0.07)
    draw(source)
    source.save_pretrained(tmp_path)
    gpt2_style().save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu")
    assert not is_bridge(model)
    assert float(untrained_twin(model, keep=NOTHING).W_K.detach().std()) == pytest.approx(0.07, rel=0.05)


@pytest.mark.parametrize("cast", ["loaded", "cast whole"])
def test_buffers_keep_the_dtype_of_the_model_s(cast, tmp_path):
    source = make_hf_model("llama")
    source.save_pretrained(tmp_path)
    half = hf.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16) if cast == "loaded" else source.to(torch.bfloat16)
    model = load_model(hf_model=half)
    buffers, drawn = (dict(each.original_model.named_buffers()) for each in (model, untrained_twin(model)))
    assert {name: buffer.dtype for name, buffer in drawn.items()} == {name: buffer.dtype for name, buffer in buffers.items()}
    assert all(torch.equal(drawn[name], buffers[name]) for name in buffers if name.endswith("inv_freq"))
    assert any(buffer.dtype == (torch.float32 if cast == "loaded" else torch.bfloat16) for buffer in drawn.values())


def test_each_weight_keeps_its_own_dtype():
    model = load_model(hf_model=make_hf_model("llama"))
    for name, parameter in plain_names(model).items():
        parameter.data = parameter.data.to(torch.float32 if "norm" in name else torch.bfloat16)
    found, expected = (
        # TransformerLens 3 gives the unembedding a bias of its own.
        {name: parameter.dtype for name, parameter in plain_names(each).items() if name != "lm_head.bias"}
        for each in (untrained_twin(model), model)
    )
    assert found == expected


@pytest.mark.parametrize(
    "keep", [lambda: iter(["ln", "embed"]), lambda: {"ln", "embed"}, lambda: (each for each in ("ln", "embed"))]
)
def test_parts_to_keep_may_be_anything_that_can_be_gone_through(keep):
    for model in (load_model("bundled", device="cpu"), load_model(hf_model=make_hf_model("llama"))):
        first, second = untrained_twin(model, keep=keep()), untrained_twin(model, keep=("embed", "ln"))
        other = dict(second.named_parameters())
        assert all(torch.equal(parameter, other[name]) for name, parameter in first.named_parameters())


class Adapted(nn.Module):
    """A linear map with an adapter beside it, in the layout of peft."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.lora_A = base, nn.Linear(base.in_features, base.out_features, bias=False)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x)


def test_an_adapter_on_a_part_to_keep_is_refused_by_name_and_elsewhere_left_out():
    model = load_model(hf_model=make_hf_model("llama"))
    model.original_model.lm_head._modules["_original_component"] = Adapted(model.original_model.lm_head.original_component)
    with pytest.raises(ValueError, match=r"keep names a part whose weight lm_head\.weight .*leave that part out of keep"):
        untrained_twin(model)
    assert all("lora" not in name for name in plain_names(untrained_twin(model, keep=("ln", "embed"))))


@pytest.mark.parametrize("training", [True, False])
def test_the_twin_is_in_the_model_s_mode(training):
    model = load_model(hf_model=make_hf_model("llama"))
    model.original_model.train(training)
    assert untrained_twin(model).original_model.training is training


def test_a_folder_that_is_called_bundled_has_a_twin_of_its_own_architecture():
    source = make_hf_model("llama")
    source.name_or_path = "models/bundled"
    model = load_model(hf_model=source)
    assert model.cfg.model_name == "bundled"
    assert plain_names(untrained_twin(model)).keys() == plain_names(model).keys()


def test_memory_that_nothing_was_written_to_is_no_weight():
    """A class that forgets a parameter gets it drawn; without that, it would be what memory happened to hold."""

    class Forgetful(hf.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.extra = nn.Parameter(torch.empty(64, 64))

    model = load_model(hf_model=make_hf_model("llama"))
    model.original_model.__class__ = Forgetful
    first, second = (plain_names(untrained_twin(model, seed=2, keep=NOTHING))["extra"] for _ in range(2))
    assert torch.equal(first, second)
    assert float(first.detach().std()) == pytest.approx(0.02, rel=0.1)
