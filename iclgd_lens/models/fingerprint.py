"""Telling models apart: a short digest of a model's weights, their shapes, and of how it computes with them.

Weights alone do not say what a model computes: the same weights with another activation function, attention scale, epsilon, soft
cap, window or rotary base are another model. So the configuration is part of the digest, and so are the numbers, words and
functions that modules carry as attributes, which may be changed without the configuration.

Left out is what changes no output: devices and dtypes, names and paths, tokenizers, how weights were first drawn, dropout, hooks,
and what modules remember of earlier runs. An option that is off (None, False) counts as absent, so that a later version of a
library, which knows more options, leaves the digest as it is.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from iclgd_lens.models.hooked import HookedModel, is_bridge

_SAMPLES = 1024
_STRIDE = 2_654_435_761
"""A large prime: multiples of it, modulo a parameter's size, visit rows, columns and heads alike."""

_NO_MATTER = frozenset(
    {
        # Where and in which numbers
        *(
            "device",
            "n_devices",
            "dtype",
            "torch_dtype",
            "attn_implementation",
            "quantization_config",
            "quantization_method",
            "load_in_4bit",
        ),
        # What it is called, and where it comes from
        *("name", "model_name", "name_or_path", "_name_or_path", "architectures", "auto_map", "transformers_version"),
        *("from_checkpoint", "checkpoint_index", "checkpoint_label_type", "checkpoint_value", "trust_remote_code", "n_params"),
        # Tokenizers and generation
        *("tokenizer_name", "tokenizer_class", "tokenizer_prepends_bos", "tokenizer_appends_eos", "default_prepend_bos"),
        *("default_padding_side", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "padding_idx"),
        *("decoder_start_token_id", "use_cache", "id2label", "label2id", "problem_type", "return_dict"),
        *("output_attentions", "output_hidden_states", "task_specific_params", "pretraining_tp", "chunk_size_feed_forward"),
        # How weights were first drawn, and training
        *("seed", "init_mode", "init_weights", "initializer_range", "initializer_factor", "training", "gradient_checkpointing"),
        *("inplace", "sparse", "scale_grad_by_freq"),
        # What TransformerLens shows, and how it runs what comes to the same
        *("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in", "use_attn_in", "use_hook_tokens"),
        *("ungroup_grouped_query_attention", "split_attention_weights", "context_level", "is_caching"),
    }
)
"""Names in configurations, and of attributes, that change no output."""

_WORDS_OF_NO_MATTER = ("dropout", "pdrop", "cached")
"""What is in the names of more of them."""


def fingerprint(model: HookedModel) -> str:
    """Digest a model as 16 hex digits: its parameters' names and shapes, up to 1024 values of each parameter, spread all over it,
    the configuration, and the attributes of modules.

    Reading a sample keeps this cheap for large models: a training step changes nearly every value and is always seen, an edit of
    a few entries may not be. The device does not matter, nor does the dtype as long as it holds the same values.

    Raises:
        ValueError: If a parameter has no values in memory, as that of a layer that is off-loaded.
    """
    digest = hashlib.sha256()
    samples = []
    places = torch.arange(_SAMPLES, device="cpu") * _STRIDE
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_meta:
            raise ValueError(
                f"the parameter {name} has no values in memory: the model is off-loaded, in whole or in part; load the model onto "
                "one device"
            )
        digest.update(f"{name}{list(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        if flat.numel() > _SAMPLES:
            flat = flat[(places % flat.numel()).to(flat.device)]
        samples.append(flat)
    digest.update(torch.cat([sample.cpu().double() for sample in samples]).numpy().tobytes())
    digest.update(json.dumps([_configurations(model), list(_modules(model))], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _configurations(model: Any) -> list[Any]:
    """TransformerLens's configuration and, behind a bridge, Hugging Face's, with those of its parts."""
    found = [vars(model.cfg)]
    if is_bridge(model):
        found.append(model.original_model.config.to_dict())
    return [_plain(each) for each in found]


def _modules(model: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The name, class and attributes of every module that computes."""
    for name, module in (model.original_model if is_bridge(model) else model).named_modules():
        # A bridge's own components compute by the module that they are around.
        if not isinstance(module, (HookPoint, GeneralizedComponent, nn.Dropout)):
            yield name, type(module).__name__, dict(_attributes(module))


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if name in _ADAPTERS:
            yield name, str(value)
        elif name[0] == "_" or value is None or value is False or not _matters(name):
            continue
        elif isinstance(value, (Real, str)):
            yield name, _plain(value)
        elif isinstance(value, torch.Tensor):
            if value.numel() == 1:
                yield name, float(value)
        elif name in _OF_ADAPTERS:
            yield name, _plain(value)
        elif callable(value) and "act" in name:
            yield name, _function(value)


_ADAPTERS = ("_disable_adapters", "_active_adapter")
_OF_ADAPTERS = ("scaling", "merged_adapters")
"""How adapters in the layout of peft are switched and scaled."""


def _function(value: Any) -> str:
    if isinstance(value, functools.partial):
        return f"{_function(value.func)}{value.args}{sorted(value.keywords.items())}"
    return str(getattr(value, "__qualname__", None) or getattr(value, "name", None) or type(value).__qualname__)


def _plain(value: Any) -> Any:
    """What JSON can write of a value; equal numbers are equal, whatever type they have, and what is off is left out."""
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Mapping):
        items = ((str(name), each) for name, each in value.items())
        return {name: _plain(each) for name, each in items if each is not None and each is not False and _matters(name)}
    if isinstance(value, Sequence):
        return [_plain(each) for each in value]
    return None if value is None else type(value).__name__


def _matters(name: str) -> bool:
    return name not in _NO_MATTER and not any(word in name for word in _WORDS_OF_NO_MATTER)
