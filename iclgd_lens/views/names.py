"""What runs, metrics and controls are called in tables and figures, and how numbers stand in sentences."""

from __future__ import annotations

from collections.abc import Iterable

RUN_NAMES = {"zsl": "ZSL", "icl": "ICL", "gd": "FT by GD", "lcgd": "FT by LCGD"}
METHOD_NAMES = {"gd": "GD", "lcgd": "LCGD"}
METRIC_NAMES = {
    "sim_aou": "SimAOU",
    "sim_aou_norm": "SimAOU_norm",
    "sim_am": "SimAM",
    "sim_am_zsl": "SimAM, ZSL ref.",
    "sim_am_delta": "SimAM_Δ",
    "alpha_aou": "α of h",
    "alpha_am": "α of m",
}
CONTROL_NAMES = {
    "none": "true update",
    "random": "random effect",
    "random_weights": "random ΔW",
    "shuffled_labels": "shuffled labels",
    "permuted": "other order",
    "other_task": "other task",
}
SUBSET_NAMES = {"all": "all", "false_to_true": "false to true"}


def listed(values: Iterable[float]) -> str:
    """Write the distinct numbers, as in "2 or 3"."""
    return " or ".join(f"{value:g}" for value in sorted(set(values)))


def counted(number: int, what: str) -> str:
    """Write how many there are, as in "1 episode" and "2 episodes"."""
    return f"{number} {what}{'' if number == 1 else 's'}"
