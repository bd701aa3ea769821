"""Putting a `TransformerBridge` around a Hugging Face model, and refusing by name what cannot be hooked."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from iclgd_lens.models.comparing import comparison_prompts, hugging_face_outputs, require_same_outputs, shared_window
from iclgd_lens.models.hooked import HookedModel, is_bridge, is_hooked_transformer, make_bridge, require_in_one_place
from iclgd_lens.models.quantisation import note_quantisation, quantisation_in
from iclgd_lens.models.sites import sites_of


def require_usable(hf_model: Any) -> None:
    """Check that an object is a Hugging Face model whose weights are at hand: in one place, whole, and open to gradients.

    Raises:
        ValueError: If it is something around a model, saying how to reach the model; or if its weights are off-loaded, on several
            devices, packed, or inference tensors.
    """
    kind = type(hf_model).__name__
    if is_bridge(hf_model) or is_hooked_transformer(hf_model):
        raise ValueError(f"hf_model is a {kind}, a hooked model already; use it as it is")
    if not isinstance(hf_model, PreTrainedModel):
        raise ValueError(f"hf_model must be a Hugging Face model, a transformers.PreTrainedModel; got {kind}{_way_out(hf_model)}")
    require_in_one_place(hf_model.named_parameters())
    for name, module in hf_model.named_modules():
        # A parametrised weight is a module there, which is callable too.
        if callable(weight := getattr(module, "weight", None)) and not isinstance(weight, nn.Module):
            raise ValueError(
                f"the weights of {name} ({type(module).__name__}) in hf_model are packed by torch's quantisation and cannot be "
                "read; give the model as it was before"
            )
        if type(module).__name__ == "GgufLinear":
            raise ValueError(
                f"the weights of {name} in hf_model are kept in the blocks of a GGUF file; give the file's path to load_model, or "
                "load the model with quantization_config=GgufConfig(dequantize=True)"
            )
    for name, tensor in (*hf_model.named_parameters(), *hf_model.named_buffers()):
        if tensor.is_inference():
            raise ValueError(
                f"hf_model was made within torch.inference_mode(): {name} is an inference tensor, by which no gradient can be "
                "taken; make or load the model outside"
            )


def around(hf_model: Any, tokenizer: Any, name: str, what: str) -> HookedModel:
    """Put a bridge around a Hugging Face model, if there is one for it, and it and its readout compute what the model does.

    Args:
        hf_model: The model. From then on it runs through the bridge, in evaluation mode and with eager attention.
        tokenizer: Its tokenizer, or None.
        name: Becomes `cfg.model_name`.
        what: What a message calls it.

    Raises:
        ValueError: If there is no bridge for it, its attention cannot be made eager, or the bridge computes something else.
    """
    kind = type(hf_model).__name__
    hf_model.eval()
    hf_model.set_attn_implementation("eager")
    prompts = comparison_prompts(hf_model.config, shared_window(hf_model.config))
    failed: Exception | None = None
    try:  # Before it is wrapped. What cannot be run so is refused by name, below.
        expected = hugging_face_outputs(hf_model, prompts)
    except Exception as error:
        failed = error
    try:
        bridge: Any = make_bridge(hf_model, tokenizer=tokenizer, name=name)
    except Exception as error:  # whatever an adapter for another shape of model stumbles over
        raise ValueError(f"TransformerLens has no bridge for {what} ({kind}): {error}") from error
    _require_sites(bridge, what)
    if failed is not None:
        raise ValueError(f"{what} ({kind}) does not run: {failed}") from failed
    try:
        require_same_outputs(bridge, prompts, expected, what)
    except ValueError:
        raise
    except Exception as error:  # of a bridge that does not know this version of the model
        raise ValueError(f"TransformerLens's bridge for {what} ({kind}) does not run: {error}") from error
    note_quantisation(bridge, quantisation_in(hf_model.config))
    return bridge


def _require_sites(bridge: Any, what: str) -> None:
    """Check that a bridge can be served; where its attention alone is in the way, with the reason that it has here."""
    hf_model = bridge.original_model
    chosen, kind = hf_model.config._attn_implementation, type(hf_model).__name__
    try:
        sites_of(bridge)
    except ValueError as error:
        if f"{chosen!r} attention" not in str(error):
            raise
        raise ValueError(
            f"{what} runs {chosen!r} attention, which shows no scores, and {kind} takes its attention when it is made: "
            "set_attn_implementation cannot change it. Make the model anew with attn_implementation='eager', an argument of "
            "from_pretrained and of the configuration"
        ) from error


def _way_out(wrapper: Any) -> str:
    """How to reach the model within something that is around it."""
    attributes = {"_orig_mod": "torch.compile", "module": "torch's parallel wrappers"}
    for attribute, whose in attributes.items():
        if isinstance(inner := getattr(wrapper, attribute, None), nn.Module):
            deeper = _way_out(inner) if not isinstance(inner, PreTrainedModel) else ""
            return f", of {whose}: give hf_model.{attribute} instead{deeper}"
    if hasattr(wrapper, "peft_config"):
        return (
            ", of peft: give hf_model.base_model.model instead, which has the adapters in place, or hf_model.merge_and_unload(), "
            "which has them added to its weights"
        )
    return ""
