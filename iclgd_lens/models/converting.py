"""Making a `HookedTransformer` of a Hugging Face model, and only where it computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from iclgd_lens.models.comparing import comparison_prompts, hugging_face_outputs, require_same_outputs, shared_window
from iclgd_lens.models.hooked import HookedTransformer
from iclgd_lens.models.lengths import context_window, rope_switches, text_config, windows

OWN_WINDOW = "own_n_ctx"
"""The attribute of `cfg` that holds a model's own context window, where its `HookedTransformer` has a shorter one."""


def as_hooked_transformer(
    hf_model: Any,
    tokenizer: Any,
    what: str,
    *,
    name: str,
    device: str,
    dtype: torch.dtype,
    process_weights: bool = False,
) -> HookedTransformer:
    """Make a `HookedTransformer` with the weights of a Hugging Face model.

    Args:
        hf_model: The model, with eager attention and in evaluation mode.
        tokenizer: Its tokenizer, or None.
        what: What a message calls it.
        name: Becomes `cfg.model_name`.
        device: A torch device.
        dtype: The dtype of the weights.
        process_weights: Fold and centre them.

    Returns:
        The model, in evaluation mode. Its `cfg.initializer_range` is the Hugging Face model's own, of which twins are drawn.

    Raises:
        ValueError: If TransformerLens cannot convert it, or what comes out computes something else.
    """
    try:
        model = _convert(hf_model, tokenizer, device, dtype, process_weights)
    except Exception as error:  # whatever a converter for another shape of model stumbles over
        architecture = ", ".join(_settings(hf_model)["architectures"] or ["none named"])
        raise ValueError(f"TransformerLens cannot convert {what} (architecture {architecture}): {error}") from error
    _require_same_lengths(hf_model.config, model.cfg, what)
    prompts = comparison_prompts(hf_model.config, shared_window(hf_model.config, model.cfg.n_ctx))
    require_same_outputs(model, prompts, hugging_face_outputs(hf_model, prompts), what)
    own = context_window(hf_model.config)
    if own is not None and own > model.cfg.n_ctx:
        setattr(model.cfg, OWN_WINDOW, own)
    text = text_config(hf_model.config)
    spread = getattr(text, "init_std", None) or getattr(text, "initializer_range", None)
    if isinstance(spread, float) and spread > 0:
        model.cfg.initializer_range = spread
    model.cfg.model_name = name
    return model.eval()


def longer_window(model: Any) -> int | None:
    """The context window in tokens of the model that a `HookedTransformer` was converted from, where TransformerLens caps it.

    A bridge around the model has this window. None where the window is the model's own, and of models that were not converted here.
    """
    return getattr(model.cfg, OWN_WINDOW, None)


def _require_same_lengths(config: Any, cfg: Any, what: str) -> None:
    """What changes at a length that no prompt at loading may have reached is looked up."""
    read = {cfg.window_size} if cfg.use_local_attn else set()
    for window in windows(config):
        if window < cfg.n_ctx and window not in read:
            raise ValueError(
                f"{what} comes out as another model: some of its layers look back {window} tokens alone, and TransformerLens's "
                "HookedTransformer of it has no such window"
            )
    for kind, length in rope_switches(config):
        if length < cfg.n_ctx and length < (context_window(config) or cfg.n_ctx):
            raise ValueError(
                f"{what} comes out as another model: its rotary frequencies change beyond {length} tokens ({kind}), and those of "
                "TransformerLens's HookedTransformer do not"
            )


def _settings(hf_model: Any) -> dict[str, Any]:
    """The configuration as it would stand in a file, in which TransformerLens looks for the architecture and for GPT-2's window."""
    config = hf_model.config.to_dict()
    # It reads GPT-2's window under an older name, which newer configurations leave out.
    window = {"n_ctx": config["n_positions"]} if "n_positions" in config else {}
    return {**window, **config, "architectures": config.get("architectures") or [type(hf_model).__name__]}


def _convert(hf_model: Any, tokenizer: Any, device: str, dtype: torch.dtype, process_weights: bool) -> HookedTransformer:
    from transformer_lens import loading_from_pretrained

    # TransformerLens takes the architecture from a name before it looks at the configuration; a folder's name says nothing.
    with TemporaryDirectory() as neutral:
        (Path(neutral) / "config.json").write_text(json.dumps(_settings(hf_model), default=str), encoding="utf-8")
        cfg = loading_from_pretrained.get_pretrained_model_config(
            neutral, hf_cfg=hf_model.config.to_dict(), fold_ln=process_weights, device=device, dtype=dtype
        )
        state = loading_from_pretrained.get_pretrained_state_dict(neutral, cfg, hf_model, dtype=dtype)
    # Without a tokenizer, it would look for one there.
    cfg.tokenizer_name = None
    model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    model.load_and_process_state_dict(
        state, **dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), process_weights)
    )
    model.move_model_modules_to_device()
    return model
