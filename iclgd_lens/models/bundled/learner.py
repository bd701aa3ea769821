"""The bundled in-context learner: its shape, its tokenizer, and its weights on disk.

4 layers, 4 heads, d_model 64, LayerNorm, learned positions, untied embeddings: a plain `HookedTransformer`, or the same around a
Hugging Face model where TransformerLens has that class no more. It reads the
language of `language.py` through a word-level Hugging Face fast tokenizer, so a token is an English word. What it was
trained on and what it can do is written in `MODEL_CARD.md` beside the weights.

>>> model = load_bundled(bridge=True)
>>> model.to_str_tokens("Words: lion bread Label: animals")
['<bos>', 'Words:', 'lion', 'bread', 'Label:', 'animals']
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from iclgd_lens.files import written_whole
from iclgd_lens.models.bundled.language import BOS, UNKNOWN, vocabulary
from iclgd_lens.models.hooked import HookedModel, HookedTransformer, make_bridge, make_hooked_transformer

WEIGHTS = Path(__file__).with_name("weights.safetensors")
"""The shipped weights, package data of under 1 MB."""

NAME = "bundled"
"""`cfg.model_name` of the learner."""

ARCHITECTURE = "GPT2LMHeadModel"
"""What TransformerLens knows it as, where it is a Hugging Face model."""

N_CTX = 160
"""Context window in tokens: room for BOS, 16 demonstrations of nine tokens each, and a query."""

SHAPE: dict[str, Any] = {
    "n_layers": 4,
    "n_heads": 4,
    "d_model": 64,
    "d_head": 16,
    "d_mlp": 256,
    "n_ctx": N_CTX,
    "d_vocab": len(vocabulary()),
    "act_fn": "gelu",
    "normalization_type": "LN",
    "initializer_range": 0.1,
}
"""Its configuration, in TransformerLens's terms."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make the word-level tokenizer of the bundled language; it puts BOS in front, as `to_tokens` expects."""
    vocab = {word: token for token, word in enumerate(vocabulary())}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=BOS,
        # TransformerLens reloads a tokenizer from the hub unless these two say that there is no need.
        add_bos_token=True,
        name_or_path="bundled",
    )


def build_learner(device: str = "cpu", dtype: torch.dtype = torch.float32) -> HookedTransformer:
    """Make the bundled architecture with its tokenizer and *uninitialised* weights, ready to be filled.

    Raises:
        NoHookedTransformerError: If TransformerLens has no `HookedTransformer`.
    """
    settings = {**SHAPE, "model_name": NAME, "init_weights": False, "device": device, "dtype": dtype}
    return make_hooked_transformer(settings, what="the bundled learner as it is trained", tokenizer=build_tokenizer())


class BundledGPT2(GPT2LMHeadModel):
    """The bundled architecture as a Hugging Face model: GPT-2, but for biases at the unembedding."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.lm_head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=True)


def gpt2_learner(state: Mapping[str, Tensor]) -> BundledGPT2:
    """Make the bundled architecture as a Hugging Face model, of parameters named and laid out as the `HookedTransformer`'s."""
    config = GPT2Config(
        vocab_size=SHAPE["d_vocab"],
        n_positions=SHAPE["n_ctx"],
        n_embd=SHAPE["d_model"],
        n_layer=SHAPE["n_layers"],
        n_head=SHAPE["n_heads"],
        n_inner=SHAPE["d_mlp"],
        activation_function=SHAPE["act_fn"],
        initializer_range=SHAPE["initializer_range"],
        tie_word_embeddings=False,
        bos_token_id=vocabulary().index(BOS),
        eos_token_id=vocabulary().index(BOS),
    )
    with torch.random.fork_rng(devices=[]):
        model = BundledGPT2(config)
    model.set_attn_implementation("eager")
    model.load_state_dict(_as_gpt2(state))
    return model


def learner_shapes() -> dict[str, tuple[int, ...]]:
    """The names and shapes of the learner's parameters, in the order of the `HookedTransformer`'s."""
    model, heads, each, inner, vocab = (SHAPE[name] for name in ("d_model", "n_heads", "d_head", "d_mlp", "d_vocab"))
    norm: dict[str, tuple[int, ...]] = {"w": (model,), "b": (model,)}
    attention: dict[str, tuple[int, ...]] = {
        "W_Q": (heads, model, each),
        "W_O": (heads, each, model),
        "b_Q": (heads, each),
        "b_O": (model,),
        "W_K": (heads, model, each),
        "W_V": (heads, model, each),
        "b_K": (heads, each),
        "b_V": (heads, each),
    }
    mlp: dict[str, tuple[int, ...]] = {"W_in": (model, inner), "b_in": (inner,), "W_out": (inner, model), "b_out": (model,)}
    block = {"ln1": norm, "ln2": norm, "attn": attention, "mlp": mlp}
    return {
        "embed.W_E": (vocab, model),
        "pos_embed.W_pos": (SHAPE["n_ctx"], model),
        **{
            f"blocks.{layer}.{part}.{name}": shape
            for layer in range(SHAPE["n_layers"])
            for part, shapes in block.items()
            for name, shape in shapes.items()
        },
        **{f"ln_final.{name}": shape for name, shape in norm.items()},
        "unembed.W_U": (model, vocab),
        "unembed.b_U": (vocab,),
    }


def load_bundled(
    path: Path = WEIGHTS, device: str = "cpu", dtype: torch.dtype = torch.float32, *, bridge: bool = False
) -> HookedModel:
    """Load the bundled learner from a safetensors file that `save_bundled` wrote.

    Args:
        path: The file.
        device: A torch device.
        dtype: The dtype of the weights.
        bridge: Load it as a `TransformerBridge` around a Hugging Face model, not as a `HookedTransformer`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a safetensors file or holds another model, or the weights were trained on another vocabulary
            than the language has now.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; make them with `iclgd train-bundled --out {path}`")
    try:
        with safe_open(path, framework="pt") as file:
            trained_on = (file.metadata() or {}).get("vocabulary")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if trained_on != _vocabulary_digest():
        raise ValueError(
            f"the weights at {path} were trained on another vocabulary ({trained_on}) than the bundled language has now "
            f"({_vocabulary_digest()}); train them again with `iclgd train-bundled`"
        )
    shapes = {name: list(shape) for name, shape in learner_shapes().items()}
    found = {name: list(tensor.shape) for name, tensor in state.items()}
    if wrong := [name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)]:
        name = min(wrong)
        raise ValueError(
            f"{path} does not hold the bundled learner: parameter {name} has shape {found.get(name)} there and "
            f"{shapes.get(name)} in the model (None: it is not there)"
        )
    if bridge:
        around: Any = gpt2_learner(state)
        return make_bridge(around.to(device, dtype).eval(), tokenizer=build_tokenizer(), name=NAME, architecture=ARCHITECTURE)
    model = build_learner(device, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])
    return model.eval()


def save_bundled(model: HookedTransformer, path: Path) -> None:
    """Write the learner's parameters in float32 to a safetensors file, with the digest of its vocabulary."""
    state = {name: parameter.detach().float().cpu().contiguous() for name, parameter in model.named_parameters()}
    with written_whole(path) as partial:
        save_file(state, partial, metadata={"vocabulary": _vocabulary_digest()})


def _as_gpt2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The learner's parameters by GPT-2's names and in its layout."""
    found = {
        "transformer.wte.weight": state["embed.W_E"],
        "transformer.wpe.weight": state["pos_embed.W_pos"],
        "transformer.ln_f.weight": state["ln_final.w"],
        "transformer.ln_f.bias": state["ln_final.b"],
        "lm_head.weight": state["unembed.W_U"].T,
        "lm_head.bias": state["unembed.b_U"],
    }
    for layer in range(SHAPE["n_layers"]):
        of, to = f"blocks.{layer}", f"transformer.h.{layer}"
        weights = [rearrange(state[f"{of}.attn.W_{letter}"], "head d_model d_head -> d_model (head d_head)") for letter in "QKV"]
        found |= {
            f"{to}.attn.c_attn.weight": torch.cat(weights, dim=1),
            f"{to}.attn.c_attn.bias": torch.cat([state[f"{of}.attn.b_{letter}"].flatten() for letter in "QKV"]),
            f"{to}.attn.c_proj.weight": state[f"{of}.attn.W_O"].flatten(0, 1),
            f"{to}.attn.c_proj.bias": state[f"{of}.attn.b_O"],
            f"{to}.mlp.c_fc.weight": state[f"{of}.mlp.W_in"],
            f"{to}.mlp.c_fc.bias": state[f"{of}.mlp.b_in"],
            f"{to}.mlp.c_proj.weight": state[f"{of}.mlp.W_out"],
            f"{to}.mlp.c_proj.bias": state[f"{of}.mlp.b_out"],
        }
        for norm in ("1", "2"):
            found |= {f"{to}.ln_{norm}.weight": state[f"{of}.ln{norm}.w"], f"{to}.ln_{norm}.bias": state[f"{of}.ln{norm}.b"]}
    return found


def _vocabulary_digest() -> str:
    return hashlib.sha256("\n".join(vocabulary()).encode()).hexdigest()[:16]
