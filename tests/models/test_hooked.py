"""Both classes of models: the bundled learner is the same in either, and each is had where it is asked for."""

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel

from iclgd_lens import capture, gd, lcgd, load_model, load_task, untrained_twin
from iclgd_lens.models import hooked, loading
from iclgd_lens.models.hooked import NoHookedTransformerError, is_bridge, is_hooked_transformer, make_hooked_transformer
from tests.models_zoo import require_hooked_transformer
from tests.reference import relative_error

KEPT = ("attn_out", "query_scores", "context_scores", "label_log_probs", "lens_logits")


@pytest.fixture(scope="module")
def pair():
    require_hooked_transformer()
    return load_model("bundled", backend="hooked", device="cpu"), load_model("bundled", backend="bridge", device="cpu")


@pytest.fixture(scope="module")
def drawn(pair):
    return load_task("bundled/remapped").episode(pair[0], k=6, n_queries=8, seed=0)


def small_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2))


@pytest.fixture
def transformer_lens_4(monkeypatch):
    """As if TransformerLens had bridges alone."""
    for module in (hooked, loading):
        monkeypatch.setattr(module, "HookedTransformer", None)


def test_the_bundled_learner_reads_texts_alike_in_both_classes(pair):
    episodes = [load_task("bundled/natural").episode(model, k=3, n_queries=4, seed=1) for model in pair]
    for first, second in zip(*([*e.demonstrations, *e.queries] for e in episodes), strict=True):
        assert torch.equal(first.tokens, second.tokens)


def test_the_bundled_learner_captures_alike_in_both_classes(pair, drawn):
    first, second = (capture(model, drawn.queries, context=drawn.demonstrations) for model in pair)
    for name in KEPT:
        assert relative_error(second.kept[name], first.kept[name]) < 1e-5, name


@pytest.mark.parametrize("method", [gd, lcgd])
def test_the_bundled_learner_s_updates_are_alike_in_both_classes(pair, drawn, method):
    first, second = (method(model, drawn.demonstrations, lr=0.3) for model in pair)
    for layer in range(4):
        for parameter in ("W_K", "b_V", "W_V"):
            assert relative_error(second.delta(parameter, layer), first.delta(parameter, layer)) < 1e-4


def test_twins_of_the_bundled_learner_are_the_same_model_in_both_classes(pair, drawn):
    for seed, keep in ((0, ("embed", "pos_embed", "ln", "unembed")), (3, ("ln",))):
        first, second = (capture(untrained_twin(model, seed, keep), drawn.queries) for model in pair)
        assert relative_error(second.attn_out, first.attn_out) < 1e-5
        assert relative_error(second.label_log_probs, first.label_log_probs) < 1e-5


@pytest.mark.usefixtures("transformer_lens_4")
def test_without_hooked_transformer_models_are_bridges_and_what_is_built_of_it_says_what_to_install():
    assert is_bridge(load_model())
    assert not is_hooked_transformer(load_model())
    with pytest.raises(NoHookedTransformerError, match=r"'hooked' is built of .*HookedTransformer"):
        load_model("bundled", backend="hooked")
    with pytest.raises(NoHookedTransformerError, match=r"of mine is built of .* pip install 'transformer-lens<4'"):
        make_hooked_transformer({}, what="a model of mine")


def test_auto_is_a_hooked_transformer_where_there_is_one():
    require_hooked_transformer()
    assert is_hooked_transformer(load_model("bundled"))


def test_a_model_in_memory_is_wrapped_where_it_is_and_runs_eager_attention_in_evaluation_mode():
    around = small_model().train()
    model = load_model(hf_model=around)
    assert isinstance(model, TransformerBridge)
    assert model.original_model is around
    assert not around.training
    assert around.config._attn_implementation == "eager"
    assert model.cfg.model_name == "GPT2LMHeadModel"


def test_a_model_in_memory_can_be_converted_to_a_hooked_transformer_that_computes_the_same():
    require_hooked_transformer()
    around, tokens = small_model().eval(), torch.arange(12)[None]
    model = load_model(hf_model=around, backend="hooked")
    assert is_hooked_transformer(model)
    with torch.no_grad():
        assert relative_error(model(tokens).log_softmax(-1), around(tokens).logits.log_softmax(-1)) < 1e-5


def test_a_bridge_leaves_torch_s_random_state_alone():
    around = small_model()
    before = torch.get_rng_state()
    load_model(hf_model=around)
    load_model("bundled", backend="bridge")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_in_memory_can_have_its_weights_processed():
    model = load_model(hf_model=small_model(), process_weights=True)
    assert model.compatibility_mode


def test_a_readout_that_is_not_the_model_s_is_found_out_when_it_is_loaded():
    class Louder(GPT2LMHeadModel):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.logits = found.logits * 2
            return found

    louder = Louder(small_model().config)
    louder.__class__.__name__ = "GPT2LMHeadModel"
    with pytest.raises(ValueError, match="this GPT2LMHeadModel comes out as another model, with log-probabilities that are"):
        load_model(hf_model=louder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "flax"}, "backend must be one of auto, hooked, bridge; got 'flax'"),
        ({"name": "bundled", "hf_model": 1}, r"a model in memory \(hf_model=\) keeps its name, device and dtype"),
        ({"dtype": torch.float64, "hf_model": 1}, "keeps its name, device and dtype"),
        ({"hf_model": torch.nn.Linear(1, 1)}, "hf_model must be a Hugging Face model, a transformers.PreTrainedModel; got Linear"),
        ({"tokenizer": object()}, "tokenizer= goes with hf_model="),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_model(**arguments)


def test_a_bridge_is_fetched_by_the_hub_s_name_of_what_is_asked_for(asked):
    for name in ("gpt2-small", "someone/something"):
        with pytest.raises(OSError, match=f"cannot load the model '{name}' from the hub or its local cache: there is no hub here"):
            load_model(name, backend="bridge", device="cpu")
    options = {"dtype": torch.float32, "attn_implementation": "eager", "use_safetensors": True, "trust_remote_code": False}
    assert asked == [(name, options) for name in ("gpt2", "someone/something")]
