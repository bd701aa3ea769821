"""What dtypes do to results is a difference from float64, row by row."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from iclgd_lens.benchmarks import precision
from iclgd_lens.benchmarks.precision import dtype_agreement, precision_table


def test_float32_is_near_float64_and_bfloat16_is_further():
    frame = dtype_agreement((torch.float32, torch.bfloat16), n_episodes=1, n_queries=6, device="cpu")
    assert {"sim_aou", "sim_am_delta", "accuracy"} == set(frame["metric"])
    similarities = frame[frame["metric"] != "accuracy"].set_index("dtype")
    assert set(similarities["method"]) == {"gd", "lcgd"}
    assert similarities.loc["float32", "largest"].max() < 1e-3 < similarities.loc["bfloat16", "largest"].max()
    assert (similarities["mean"] <= similarities["largest"]).all()
    shown = precision_table(frame).markdown()
    assert shown.count("bfloat16") == len(frame) // 2


def test_differences_are_averaged_over_layers_and_draws(monkeypatch):
    def pretend(model, episode, **options):
        of_dtype = 0.0 if model.cfg.dtype == torch.float64 else 0.1
        values = [(layer, 0.5 + of_dtype * (layer + 1) * (-1) ** episode.seed) for layer in (0, 1)]
        rows = [
            {"seed": episode.seed, "method": "gd", "layer": layer, "metric": "sim_aou", "subset": subset, "value": value}
            for layer, value in values
            for subset in ("all", "false_to_true")
        ]
        return SimpleNamespace(frame=pd.DataFrame(rows))

    monkeypatch.setattr(precision, "compare", pretend)
    measured: list[str] = []
    frame = dtype_agreement((torch.float16,), n_episodes=2, n_queries=2, device="cpu", on_dtype=measured.append)
    (row,) = frame.to_dict("records")
    assert (row["dtype"], row["method"], row["metric"]) == ("float16", "gd", "sim_aou")
    assert (row["value"], row["mean"], row["largest"]) == pytest.approx((0.5, 0.15, 0.2))
    assert measured == ["float64", "float16"]
