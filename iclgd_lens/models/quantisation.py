"""How a model's weights were quantised before they were read: what a run's setting has to say about them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from iclgd_lens.models.hooked import HookedModel, is_bridge

_ATTRIBUTE = "quantisation"


def quantisation_of(model: HookedModel) -> dict[str, Any] | None:
    """How a model's weights are or were quantised; None where they never were, as far as the model knows.

    Of a GGUF file: `{"quant_method": "gguf", "file_type": "MOSTLY_Q4_1", "tensors": {"F32": 61, "Q4_1": 210, ...}}`, the name of
    its mixture of types and the number of tensors of each. Of a Hugging Face model: what its `quantization_config` says. All values
    can be written as JSON.
    """
    if noted := getattr(model.cfg, _ATTRIBUTE, None):
        return dict(noted)
    if not is_bridge(model):
        return None
    around: Any = model
    return quantisation_in(around.original_model.config)


def note_quantisation(model: HookedModel, quantisation: dict[str, Any] | None) -> None:
    """Write down on a model how its weights were quantised, for `quantisation_of`."""
    if quantisation is not None:
        setattr(model.cfg, _ATTRIBUTE, dict(quantisation))


def quantisation_in(config: Any) -> dict[str, Any] | None:
    """What a Hugging Face configuration says about quantisation; None where it says nothing."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    entries = dict(found if isinstance(found, dict) else found.to_dict())
    return {
        name: value if isinstance(value, bool | int | float | str | type(None)) else str(value) for name, value in entries.items()
    }


def gguf_quantisation(file: Path) -> dict[str, Any]:
    """How the tensors of a GGUF file are stored, as `quantisation_of` returns it."""
    from gguf import GGUFReader, LlamaFileType

    reader: Any = GGUFReader(file)
    counted = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    kind = reader.fields.get("general.file_type")
    names = {each.value: each.name for each in LlamaFileType}
    return {
        "quant_method": "gguf",
        "file_type": None if kind is None else names.get(int(kind.contents()), str(kind.contents())),
        "tensors": dict(sorted(counted.items())),
    }
