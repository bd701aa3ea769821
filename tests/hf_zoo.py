"""Small random Hugging Face models of many architectures, for which `tests/models_zoo.py` makes the prompts.

Every parameter is random, norm scales and all biases too, so that an error in the handling of any of them shows. Windows are
shorter than the prompts, and soft caps so low that they bend what they cap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from tests.models_zoo import BOS, D_VOCAB, N_CTX

_TOKENS = {"vocab_size": D_VOCAB, "pad_token_id": 0, "bos_token_id": BOS, "eos_token_id": 2, "attn_implementation": "eager"}
_SIZES = {
    **_TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": N_CTX,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Architecture:
    """A kind of Hugging Face model.

    Attributes:
        name: What tests call it.
        new: Makes a model of it, small enough to be run many times.
        norms_add_one: Whether its norms scale by one more than their weight.
        not_hooked: Why no `HookedTransformer` can be made of it; empty where TransformerLens 3.9 makes one.
    """

    name: str
    new: Callable[[], PreTrainedModel]
    norms_add_one: bool = False
    not_hooked: str = ""


def _gpt2() -> PreTrainedModel:
    return hf.GPT2LMHeadModel(hf.GPT2Config(**_TOKENS, n_embd=32, n_layer=3, n_head=4, n_positions=N_CTX))


def _gpt_neo() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": N_CTX}
    return hf.GPTNeoForCausalLM(hf.GPTNeoConfig(**_TOKENS, **sizes, attention_types=[[["global", "local"], 1]], window_size=5))


def _opt() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32}
    return hf.OPTForCausalLM(hf.OPTConfig(**_TOKENS, **sizes, max_position_embeddings=N_CTX))


def _gemma2() -> PreTrainedModel:
    caps = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**_GROUPED, **caps, head_dim=12, query_pre_attn_scalar=16, sliding_window=5))


def _mixtral() -> PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**_GROUPED, **experts, sliding_window=None))


ARCHITECTURES = {
    each.name: each
    for each in (
        Architecture("gpt2", _gpt2),
        Architecture("gpt_neo", _gpt_neo),
        Architecture("gpt_neox", lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SIZES, rotary_pct=0.5))),
        Architecture("opt", _opt),
        Architecture("llama", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED))),
        Architecture("mistral", lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GROUPED, head_dim=8, sliding_window=5))),
        Architecture("qwen2", lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GROUPED))),
        Architecture("qwen3", lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED, head_dim=12))),
        Architecture(
            "gemma2",
            _gemma2,
            norms_add_one=True,
            not_hooked="TransformerLens 3.9 reads no configuration of Gemma 2, only its names",
        ),
        Architecture(
            "phi",
            lambda: hf.PhiForCausalLM(hf.PhiConfig(**_SIZES, partial_rotary_factor=0.5)),
            not_hooked="TransformerLens 3.9 does not find how much Phi rotates in newer configurations",
        ),
        Architecture("mixtral", _mixtral),
    )
}
"""The architectures by name."""


def make_hf_model(name: str, seed: int = 0) -> Any:
    """Build a model of an architecture, in evaluation mode; the same one for the same seed."""
    architecture = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        model: Any = architecture.new()
    draw(model, seed, norms_add_one=architecture.norms_add_one)
    return model.eval()


def draw(model: PreTrainedModel, seed: int = 0, *, norms_add_one: bool = False) -> None:
    """Give a model random parameters: norms scale by about 1, and everything else is about 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            *_, module, leaf = name.split(".")
            about = 1.0 if ("norm" in module or module.startswith("ln_")) and leaf == "weight" and not norms_add_one else 0.0
            parameter.copy_(about + 0.25 * torch.randn(parameter.shape, generator=generator))
