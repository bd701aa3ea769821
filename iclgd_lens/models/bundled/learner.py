"""The bundled in-context learner: its shape, its tokenizer, and its weights on disk.

A plain `HookedTransformer`: 4 layers, 4 heads, d_model 64, LayerNorm, learned positions, untied embeddings. It reads the
language of `language.py` through a word-level Hugging Face fast tokenizer, so a token is an English word. What it was
trained on and what it can do is written in `MODEL_CARD.md` beside the weights.

>>> model = load_bundled()
>>> model.to_str_tokens("Words: lion bread Label: animals")
['<bos>', 'Words:', 'lion', 'bread', 'Label:', 'animals']
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

from iclgd_lens.files import written_whole
from iclgd_lens.models.bundled.language import BOS, UNKNOWN, vocabulary

WEIGHTS = Path(__file__).with_name("weights.safetensors")
"""The shipped weights, package data of under 1 MB."""

N_CTX = 160
"""Context window in tokens: room for BOS, 16 demonstrations of nine tokens each, and a query."""


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
    """Make the bundled architecture with its tokenizer and *uninitialised* weights, ready to be filled."""
    config = HookedTransformerConfig(
        model_name="bundled",
        n_layers=4,
        n_heads=4,
        d_model=64,
        d_head=16,
        d_mlp=256,
        n_ctx=N_CTX,
        d_vocab=len(vocabulary()),
        act_fn="gelu",
        normalization_type="LN",
        init_weights=False,
        device=device,
        dtype=dtype,
    )
    return HookedTransformer(config, tokenizer=build_tokenizer())


def load_bundled(path: Path = WEIGHTS, device: str = "cpu", dtype: torch.dtype = torch.float32) -> HookedTransformer:
    """Load the bundled learner from a safetensors file that `save_bundled` wrote.

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
    model = build_learner(device, dtype)
    parameters = dict(model.named_parameters())
    wrong = [name for name in parameters.keys() | state.keys() if _shape(parameters, name) != _shape(state, name)]
    if wrong:
        name = min(wrong)
        raise ValueError(
            f"{path} does not hold the bundled learner: parameter {name} has shape {_shape(state, name)} there and "
            f"{_shape(parameters, name)} in the model (None: it is not there)"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
    return model.eval()


def save_bundled(model: HookedTransformer, path: Path) -> None:
    """Write the learner's parameters in float32 to a safetensors file, with the digest of its vocabulary."""
    state = {name: parameter.detach().float().cpu().contiguous() for name, parameter in model.named_parameters()}
    with written_whole(path) as partial:
        save_file(state, partial, metadata={"vocabulary": _vocabulary_digest()})


def _shape(tensors: Mapping[str, Tensor], name: str) -> list[int] | None:
    return list(tensors[name].shape) if name in tensors else None


def _vocabulary_digest() -> str:
    return hashlib.sha256("\n".join(vocabulary()).encode()).hexdigest()[:16]
