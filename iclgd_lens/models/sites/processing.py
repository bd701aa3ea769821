"""Weights that were processed when a model was loaded, where that can be seen."""

from __future__ import annotations

import warnings
from typing import Any

from iclgd_lens.models.hooked import is_bridge
from iclgd_lens.models.sites.base import HookSites

PROCESSED_NORMS = ("LNPre", "RMSPre")
"""`cfg.normalization_type` of models whose norm weights were folded into the matrices that read from them."""


def warn_if_processed(sites: HookSites) -> None:
    """Warn where weights were processed, since steps on them are not the steps of the model as it was trained.

    Gradient descent is not invariant to a change of parameters: folding a norm's scale into `W_K` changes the gradient of
    `W_K` by that scale squared in effect, so an update of a folded model is another update.
    """
    if processing := _processing(sites):
        warnings.warn(
            f"this model's weights are processed: {processing}. Neither gradient descent nor the attention output is invariant to "
            "that: updates and similarities will differ from those of the model as trained. Load it with load_model(name) "
            "to compare with the paper.",
            UserWarning,
            stacklevel=4,  # the line that called gd or lcgd
        )


def _processing(sites: HookSites) -> str | None:
    """Say how a model's weights were processed when it was loaded, where that can be seen."""
    model: Any = sites.model
    if model.cfg.normalization_type in PROCESSED_NORMS:
        return f"its layer norms are folded into them (normalization_type={model.cfg.normalization_type!r})"
    if is_bridge(model) and model.compatibility_mode and _does_nothing(model.blocks[0].ln1.original_component):
        return "its layer norms are folded into them (enable_compatibility_mode)"
    output = sites.output_weight(0)
    if bool(output.any()) and output.mean(dim=-1).abs().max() < 1e-4 * output.abs().mean():
        return "those that write to the residual stream are centred"
    return None


def _does_nothing(norm: Any) -> bool:
    """Whether a norm's scale is 1 everywhere, as it is once it was folded; some norms keep its difference from 1."""
    scale = norm.weight
    return bool((scale == 1).all() or (scale == 0).all())
