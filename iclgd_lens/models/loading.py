"""Loading models by name, with the defaults that comparing with gradient descent needs."""

from __future__ import annotations

import difflib

import torch
from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import make_model_alias_map

from iclgd_lens.models.bundled.learner import load_bundled


def load_model(
    name: str = "bundled", *, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32
) -> HookedTransformer:
    """Load a hooked model, its weights unprocessed.

    Weight processing (folding layer norms, centring) leaves a model's outputs as they are but changes what a gradient step
    does, so models come from `from_pretrained_no_processing`.

    Args:
        name: `"bundled"` for the small in-context learner that ships with the package, or any model name that TransformerLens
            knows; those are fetched from the hub.
        device: A torch device; by default CUDA where there is one, else the CPU.
        dtype: The dtype of the weights.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If torch has no such device here, or TransformerLens knows no such model.
    """
    place = parse_device(device)
    if name == "bundled":
        return load_bundled(device=place, dtype=dtype)
    known = make_model_alias_map()
    if name.lower() not in known:
        close = difflib.get_close_matches(name, ["bundled", *known], n=3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
        raise ValueError(f"unknown model {name!r}{hint} It may be 'bundled' or a name that TransformerLens knows")
    return HookedTransformer.from_pretrained_no_processing(name, device=place, dtype=dtype).eval()


def parse_device(device: str | torch.device | None) -> str:
    """Turn a device argument into a torch device name, the best one present for None.

    Raises:
        ValueError: If torch has no such device here, naming those it has.
    """
    present = ["cpu"]
    if torch.cuda.is_available():
        present += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        present.append("mps")
    if device is None:
        return "cuda" if "cuda" in present else "cpu"
    # torch's own name for the CPU may carry a number, which means nothing.
    wanted = "cpu" if str(device) == "cpu:0" else str(device)
    if wanted not in present:
        raise ValueError(f"device={str(device)!r} is not available; here there is {', '.join(present)}")
    return wanted
