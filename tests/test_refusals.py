"""What bridges cannot serve is refused by name, with the reason, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers as hf

from iclgd_lens import capture, gd, lcgd, load_model
from iclgd_lens.models.hooked import make_bridge
from tests.hf_zoo import draw, make_hf_model
from tests.models_zoo import D_VOCAB, N_CTX, make_demonstrations, make_queries

SIZES = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": N_CTX,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1}
QUERIES = make_queries()
DEMONSTRATIONS = make_demonstrations()


def deepseek_v2() -> Any:
    return hf.DeepseekV2ForCausalLM(hf.DeepseekV2Config(**SIZES, **LATENT, **EXPERTS, topk_group=1, n_shared_experts=1))


def deepseek_v3() -> Any:
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**SIZES, **LATENT, **EXPERTS, topk_group=1, n_shared_experts=1))


def mamba() -> Any:
    return hf.MambaForCausalLM(hf.MambaConfig(vocab_size=D_VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4))


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=D_VOCAB, **sizes, pad_token_id=0, decoder_start_token_id=0))


def bert() -> Any:
    return hf.BertForMaskedLM(hf.BertConfig(**SIZES))


def bloom() -> Any:
    return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=D_VOCAB, hidden_size=32, n_layer=2, n_head=4))


def falcon_with_alibi() -> Any:
    return hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=D_VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True)
    )


def mpt() -> Any:
    return hf.MptForCausalLM(hf.MptConfig(vocab_size=D_VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=N_CTX))


def gptj() -> Any:
    return hf.GPTJForCausalLM(hf.GPTJConfig(vocab_size=D_VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=N_CTX, rotary_dim=4))


def opt_with_norms_behind() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32}
    return hf.OPTForCausalLM(hf.OPTConfig(vocab_size=D_VOCAB, **sizes, do_layer_norm_before=False))


def cohere() -> Any:
    return hf.CohereForCausalLM(hf.CohereConfig(**SIZES, logit_scale=0.25))


def granite() -> Any:
    return hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES, logits_scaling=4.0))


REFUSED: dict[Callable[[], Any], str] = {
    deepseek_v2: "DeepseekV2ForCausalLM has latent attention .MLA., whose keys and values come out of a shared compression",
    deepseek_v3: "DeepseekV3ForCausalLM has latent attention .MLA., whose keys and values come out of a shared compression",
    mamba: "block 0 of MambaForCausalLM has no attention, but a state-space or other recurrent layer",
    t5: "T5ForConditionalGeneration is an encoder–decoder: in-context learning is read in one stream of causal attention",
    bert: "needs causal attention, which BertForMaskedLM has not",
    bloom: "BloomForCausalLM adds ALiBi to its attention scores, which depends on where a prompt begins",
    falcon_with_alibi: "FalconForCausalLM adds ALiBi to its attention scores",
    mpt: "MptForCausalLM adds ALiBi to its attention scores",
    gptj: "the bridge for GPTJForCausalLM .* shows no attention scores before softmax",
    opt_with_norms_behind: "OPTForCausalLM with this configuration has no final norm before its unembedding",
    cohere: "CohereForCausalLM scales its logits .logit_scale=0.25., which the readout does not do",
    granite: "GraniteForCausalLM scales its logits .logits_scaling=4.0., which the readout does not do",
}
USES: dict[str, Callable[[Any], Any]] = {
    "capture": lambda model: capture(model, QUERIES),
    "gd": lambda model: gd(model, DEMONSTRATIONS, lr=0.1),
    "lcgd": lambda model: lcgd(model, DEMONSTRATIONS, lr=0.1),
}

refused = pytest.mark.parametrize(("new", "message"), REFUSED.items(), ids=[new.__name__ for new in REFUSED])
every_use = pytest.mark.parametrize("use", USES.values(), ids=USES)


def watched(model: Any) -> list[str]:
    """Names of modules that ran, filled when any does."""
    ran: list[str] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: ran.append(type(module).__name__))
    return ran


@refused
def test_an_architecture_that_cannot_be_served_is_refused_when_it_is_loaded(new, message):
    with pytest.raises(ValueError, match=message):
        load_model(hf_model=new())


@refused
@every_use
def test_a_bridge_of_the_user_s_own_is_refused_likewise(new, message, use):
    model = new().eval()
    model.set_attn_implementation("eager")
    bridge = make_bridge(model)
    ran = watched(model)
    with pytest.raises(ValueError, match=message):
        use(bridge)
    assert not ran


@every_use
def test_a_model_in_training_mode_is_refused_until_it_is_evaluated(use):
    bridge = load_model(hf_model=make_hf_model("gpt2"))
    bridge.original_model.train()
    ran = watched(bridge.original_model)
    with pytest.raises(ValueError, match=r"in training mode, where dropout changes every run; call model.eval\(\) first"):
        use(bridge)
    assert not ran
    bridge.eval()
    use(bridge)


@every_use
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_attention_without_scores_is_refused_until_it_is_eager(name, use):
    model = make_hf_model(name)
    model.set_attn_implementation("sdpa")
    bridge = make_bridge(model)
    ran = watched(model)
    with pytest.raises(ValueError, match="runs 'sdpa' attention, which shows no scores; load it with attn_implementation='eager'"):
        use(bridge)
    assert not ran
    model.set_attn_implementation("eager")
    use(bridge)


def test_a_scale_of_logits_that_is_one_is_none():
    granite_without = hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES, logits_scaling=1.0))
    assert capture(load_model(hf_model=granite_without), QUERIES).attn_out.isfinite().all()


def test_a_bridge_that_computes_another_model_is_refused_when_it_is_loaded():
    """TransformerLens's bridge scales attention scores also where GPT-2 is told not to."""
    config = hf.GPT2Config(vocab_size=D_VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=N_CTX, scale_attn_weights=False)
    unscaled = hf.GPT2LMHeadModel(config)
    draw(unscaled)
    with pytest.raises(ValueError, match="comes out as another model"):
        load_model(hf_model=unscaled)
