"""How cost grows is fitted to what was timed, and what graphs hold is counted exactly."""

from __future__ import annotations

import pandas as pd
import pytest

from iclgd_lens.benchmarks import growth
from iclgd_lens.benchmarks.growth import (
    AXES,
    SHAPE,
    Axis,
    capture_growth,
    capture_table,
    graph_growth,
    graph_table,
    growth_table,
    measure_growth,
)
from iclgd_lens.benchmarks.models import Sizes, make_model, random_episode
from iclgd_lens.updates.backward import BLOCKS_AT_ONCE

SMALL = SHAPE | {"n_layers": 2, "d_model": 16, "n_heads": 2, "d_head": 8, "d_vocab": 20}


@pytest.fixture(scope="module")
def held() -> pd.DataFrame:
    return graph_growth((4, 8, 16), shape=SMALL, device="cpu")


def test_lcgd_holds_few_blocks_whatever_the_depth_and_gd_all_of_them(held):
    lcgd, gd = (held[held["method"] == method]["bytes"].tolist() for method in ("LCGD", "GD"))
    assert len(set(lcgd)) == 1
    per_layer = (gd[1] - gd[0]) / 4
    assert gd[2] - gd[1] == 8 * per_layer > 0
    # Without what lies below their keys and values, but with the norm before the readout.
    assert lcgd[0] < (BLOCKS_AT_ONCE + 1) * per_layer


def test_every_depth_is_a_column(held):
    assert graph_table(held).markdown().count("layers") == 3


def test_a_capture_allocates_what_it_keeps_and_a_batch(monkeypatch):
    monkeypatch.setattr("iclgd_lens.runs.passes.WORKING_BYTES_ON_CPU", 2**20)
    sizes = Sizes(k=2, demonstration=8, query=12)
    frame = capture_growth((300, 600, 1200), shape=SMALL, sizes=sizes, device="cpu")
    assert frame["kept"].tolist() == [frame["kept"].iloc[0] * n for n in (1, 2, 4)]
    beside = frame["peak"] - frame["kept"]
    assert 2**18 < beside.min() <= beside.max() < 2**21
    assert beside.max() - beside.min() < 0.2 * beside.min()
    assert capture_table(frame).markdown().count("1200") == 1


def test_axes_span_a_decade_and_fit_their_models():
    for axis in AXES:
        assert max(axis.sizes) >= 9 * min(axis.sizes), axis.name
        shape, sizes = axis.of(max(axis.sizes))
        random_episode(make_model(shape | {"n_layers": 1, "d_model": 8, "n_heads": 1, "d_head": 8}, device="cpu"), sizes)


def test_exponents_are_those_of_the_seconds(monkeypatch):
    times = iter([1.0, 4.0, 16.0, *[1.0] * 4])
    monkeypatch.setattr(growth, "_median_seconds", lambda *arguments: next(times))
    axis = Axis("queries", (1, 2, 4), ("ICL capture",), lambda n: (SMALL, Sizes(k=2, demonstration=8, queries=n, query=6)))
    begun: list[str] = []
    later = Axis("layers", (1, 10), ("GD", "LCGD"), lambda n: (SMALL | {"n_layers": n}, Sizes(2, 8, 2, 6)))
    row, *others = measure_growth([axis, later], repeats=1, device="cpu", on_axis=begun.append).to_dict("records")
    assert [(other["axis"], other["work"]) for other in others] == [("layers", "GD"), ("layers", "LCGD")]
    assert (row["axis"], row["work"], row["sizes"], row["seconds"]) == ("queries", "ICL capture", [1, 2, 4], [1.0, 4.0, 16.0])
    assert (row["exponent"], begun) == (pytest.approx(2.0), ["queries", "layers"])


def test_every_work_is_run_and_shown():
    axis = Axis("layers", (1, 2), tuple(growth.WORK), lambda n: (SMALL | {"n_layers": n}, Sizes(2, 8, 2, 6)))
    frame = measure_growth([axis], repeats=1, device="cpu")
    assert (frame["seconds"].map(min) > 0).all()
    shown = growth_table(frame).markdown()
    assert all(work in shown for work in growth.WORK)
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        measure_growth([axis], repeats=0)
