"""The lengths at which a Hugging Face model changes what it does, read from its configuration.

Attention may look back a limited way, and rotary frequencies may depend on the length of the forward pass. Configurations say so
in many places: under several names, in the `text_config` of a model that also sees, in a dict for each type of layer, or in
settings for single layers. This module is the one place that knows these names.

>>> from transformers import Gemma3TextConfig
>>> windows(Gemma3TextConfig(sliding_window=512, layer_types=["sliding_attention"], num_hidden_layers=1))
(512,)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

_WINDOW = re.compile(r"window|(attention|attn).*chunk|^local_(attention|attn)|index_topk")
"""What the names of entries have in common that say how far back, or at how many tokens, attention looks."""

_NO_WINDOW = re.compile(r"pattern|layers|^num_|^n_|_num_|^use_|^max_|prob|dropout|stride|vision|image|audio|freq")
"""What tells other entries, such as `max_window_layers`, from those."""

_FULL = {"full_attention", "attention", "global", "linear_attention", "conv", "mamba", "mlp", "moe", "recurrent", "hybrid"}
"""Types of layers that have no window."""

_KINDS = ("layer_types", "attention_layers", "block_types")
"""Entries that give the type of each layer."""

_STEPS = ("floor_scale",)
"""Entries that give a length at which attention scores get another scale."""


class RopeSwitch(NamedTuple):
    """Rotary frequencies that depend on the length of the forward pass.

    Attributes:
        kind: `"longrope"` for one set of frequencies up to `length` tokens and another beyond; `"dynamic"` for frequencies that
            change with every token beyond `length`.
        length: The longest forward pass, in tokens, that has the frequencies of short prompts.
    """

    kind: Literal["longrope", "dynamic"]
    length: int


def text_config(config: Any) -> Any:
    """The configuration of the language model: `config` itself, or a part of it where the model also sees or hears."""
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config()
    except ValueError:  # several text configurations, of an encoder and a decoder
        return config


def context_window(config: Any) -> int | None:
    """How many tokens a prompt may have, as the configuration says; None where it says nothing."""
    entries = vars(text_config(config))
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(entries.get(name), int) and entries[name] > 0:
            return int(entries[name])
    return None


def windows(config: Any) -> tuple[int, ...]:
    """Every finite number of tokens, the token itself included, that attention of some layer looks back; ascending.

    Sliding windows, chunks, local attention and the number of tokens that sparse attention picks all count. A window that is
    switched off (`use_sliding_window=False`, or no layer of a type that has one) does not.

    Args:
        config: The configuration of a Hugging Face model; of a model that also sees, its `text_config` is read.
    """
    found: set[int] = set()
    for entries in _entries(config):
        if _switched_off(entries):
            continue
        # ModernBERT's `local_attention` reaches both ways; its decoder looks back half of that, its `sliding_window`.
        passed_over = {"local_attention"} if "sliding_window" in entries else set()
        for name, value in entries.items():
            if name not in passed_over and _WINDOW.search(name) and not _NO_WINDOW.search(name):
                found.update(_positive(value))
    return tuple(sorted(found))


def rope_switches(config: Any) -> tuple[RopeSwitch, ...]:
    """Rotary frequencies that depend on the length of the forward pass; empty where none do.

    A token's keys then depend on the tokens that come after it, so neither a cached prefix nor a batch of unequal prompts may be
    shared across such a length. Scaling that is the same at every length (`linear`, `llama3`, `yarn`) is not listed.

    Args:
        config: The configuration of a Hugging Face model; of a model that also sees, its `text_config` is read.
    """
    found = set()
    for entries in _entries(config):
        whole = context_window(config) or 0
        for rope in _ropes(entries):
            kind = rope.get("rope_type", rope.get("type"))
            original = rope.get("original_max_position_embeddings", entries.get("original_max_position_embeddings")) or whole
            if kind in ("longrope", "su") or (kind not in (None, "default") and "long_mscale" in rope):
                found.add(RopeSwitch("longrope", int(original)))
            elif kind is not None and "dynamic" in kind:
                found.add(RopeSwitch("dynamic", whole))
    return tuple(sorted(found))


def lengths_of_change(config: Any) -> tuple[int, ...]:
    """Every length within the context window at which the model begins to do something else; ascending.

    A prompt longer than the last of them has met all that the configuration says: each window, each switch of rotary frequencies
    and each step of a temperature that grows with the position.

    Args:
        config: The configuration of a Hugging Face model; of a model that also sees, its `text_config` is read.
    """
    found = {*windows(config), *(switch.length for switch in rope_switches(config))}
    for entries in _entries(config):
        found.update(length for name in _STEPS for length in _positive(entries.get(name)))
        for rope in _ropes(entries):
            if rope.get("llama_4_scaling_beta"):
                found.update(_positive(rope.get("original_max_position_embeddings")))
    whole = context_window(config)
    return tuple(sorted(length for length in found if whole is None or length < whole))


def _entries(config: Any) -> Iterator[Mapping[str, Any]]:
    """What a configuration holds by name, and, where single layers have settings of their own, what it holds for each of these."""
    text = text_config(config)
    yield vars(text)
    if getattr(text, "is_heterogeneous", False):
        for layer in text.per_layer_config:
            yield vars(layer)


def _ropes(entries: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The parameters of rotary positions: one dict, or one for each type of layer."""
    parameters = entries.get("rope_parameters") or entries.get("rope_scaling")
    if isinstance(parameters, Mapping):
        nested = [each for each in parameters.values() if isinstance(each, Mapping)]
        yield from nested or [parameters]


def _switched_off(entries: Mapping[str, Any]) -> bool:
    if entries.get("use_sliding_window") is False:
        return True
    kinds = next((entries[name] for name in _KINDS if entries.get(name)), None)
    return kinds is not None and set(kinds) <= _FULL


def _positive(value: Any) -> Iterator[int]:
    """The positive integers of an entry, which may hold one for each layer."""
    for each in value if isinstance(value, list | tuple) else [value]:
        if isinstance(each, int) and not isinstance(each, bool) and each > 0:
            yield each
