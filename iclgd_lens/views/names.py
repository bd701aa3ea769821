"""What runs, metrics and controls are called in tables and figures."""

from __future__ import annotations

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
