"""The tables of the kernel views print the frame's numbers, each beside its control and the twin."""

import pandas as pd
import pytest

from iclgd_lens import summarise
from iclgd_lens.views.kernel_tables import kernel_tables, kernel_verdict


@pytest.fixture(scope="module")
def frame(with_kernels) -> pd.DataFrame:
    return with_kernels.frame


def mean(frame: pd.DataFrame, method: str, metric: str, control: str = "none", model: str = "trained") -> float:
    found = summarise(frame, by=["method", "metric", "control", "model"])
    return float(found.set_index(["method", "metric", "control", "model"]).loc[(method, metric, control, model), "mean"])


def test_tables_hold_the_frames_numbers(frame):
    sheets = {sheet.name: sheet for sheet in kernel_tables(frame)}
    assert list(sheets) == [
        f"kernels_{name}"
        for name in ("smoother", "implied", "readings", "heads", "regression", "tangent", "alignment", "trajectories")
    ]
    smoother = sheets["kernels_smoother"].numbers
    by_layer = summarise(frame, by=["method", "metric", "control", "model", "layer"])
    for model, header in (("trained", "λ"), ("untrained", "λ, twin")):
        rows = by_layer[(by_layer["metric"] == "demonstration_mass") & (by_layer["model"] == model)]
        assert smoother[header].tolist() == rows.sort_values("layer")["mean"].tolist()
    readings = sheets["kernels_readings"].numbers.set_index(["method", "reading", "level"])
    row = readings.loc[("ICL", "Dai's proxy", "demonstration")]
    assert row["τ"] == mean(frame, "icl", "proxy_demonstration_kendall")
    assert row["recall other"] == mean(frame, "icl", "proxy_demonstration_top_k_recall", "other_demonstrations")
    assert row["τ twin"] == mean(frame, "icl", "proxy_demonstration_kendall", model="untrained")
    row = readings.loc[("LCGD", "linear attention", "token but last")]
    assert row["τ other"] == mean(frame, "lcgd", "coefficient_inner_kendall", "other_demonstrations")
    tangent = sheets["kernels_tangent"].numbers.set_index(["model", "layer"])
    expected = by_layer.set_index(["metric", "model", "layer", "control"])["mean"]
    for model, name in (("trained", "trained"), ("untrained", "twin")):
        assert tangent.loc[(name, 1), "lr/100"] == expected["tangent_log10_error_hundredth", model, 1, "none"]
        assert tangent.loc[(name, 1), "cosine, random"] == expected["tangent_cosine_hundredth", model, 1, "random"]
    regression = sheets["kernels_regression"].numbers.set_index(["predictions of", "kernel"])
    row = regression.loc[("gold labels", "attention, best head")]
    assert row["shuffled labels"] == mean(frame, "gold", "attention_head_agreement", "shuffled_labels")
    assert row["majority"] == mean(frame, "gold", "majority_agreement")


def test_spreads_are_half_of_the_interval_over_episodes(frame):
    other = frame.assign(seed=frame["seed"] + 1, value=frame["value"] + 0.01)
    both = pd.concat([frame, other])
    (smoother,) = (sheet for sheet in kernel_tables(both) if sheet.name == "kernels_smoother")
    expected = summarise(both, by=["metric", "model", "layer"]).set_index(["metric", "model", "layer"])
    row = expected.loc[("demonstration_mass", "trained", 0)]
    half = smoother.numbers.set_index("layer").loc[0, "λ half"]
    assert half == pytest.approx((row["high"] - row["low"]) / 2)
    assert half > 0.01


def test_all_forms_are_written(frame, tmp_path):
    for sheet in kernel_tables(frame):
        written = {path.suffix: path.read_text() for path in sheet.write(tmp_path)}
        assert sheet.title in written[".md"]
        assert written[".tex"].isascii(), "signs that LaTeX's own fonts lack"
        assert len(written[".csv"].splitlines()) == 1 + len(sheet.numbers)


def test_without_a_twin_or_a_method_there_is_no_column_or_row_for_it(frame):
    alone = frame[(frame["model"] == "trained") & (frame["method"] != "lcgd")]
    sheets = {sheet.name: sheet for sheet in kernel_tables(alone)}
    assert "kernels_tangent" not in sheets
    assert set(sheets["kernels_readings"].numbers["method"]) == {"ICL", "GD"}
    assert not any("twin" in header for sheet in sheets.values() for header in sheet.headers)
    assert "twin" not in kernel_verdict(alone)


def test_the_verdict_quotes_the_frame(frame):
    text = kernel_verdict(frame)
    assert f"Smoothing makes {mean(frame, 'icl', 'smoothing_share'):.2f} (twin" in text
    tau = f"{mean(frame, 'gd', 'contribution_inner_kendall'):.2f}".replace("-", "−")
    assert f"GD's implied attention agrees with ICL's at τ = {tau} (random" in text
    assert f"is off by {10 ** mean(frame, 'lcgd', 'tangent_log10_error'):.2g} (twin" in text
    assert f"twin {mean(frame, 'icl', 'attention_head_agreement', model='untrained'):.2f})" in text


def test_what_has_no_value_is_called_undefined(frame):
    without = frame.copy()
    without.loc[without["metric"] == "contribution_inner_kendall", "value"] = float("nan")
    assert "τ = undefined" in kernel_verdict(without)
