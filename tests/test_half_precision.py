"""Models in half precision: everything runs, sums are kept in float32, and results are near those of these weights in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from iclgd_lens import (
    ParameterUpdate,
    capture,
    changed_heads,
    compare,
    gd,
    lcgd,
    load_model,
    load_task,
    tangent_kernel,
    untrained_twin,
)
from iclgd_lens.cli.running import close_run, compare_episodes
from iclgd_lens.experiments.learning_rate import UPDATE_OPTIONS
from iclgd_lens.models.hooked import HookedTransformer
from tests.reference import relative_error

LR = 0.1
NEAR = {torch.bfloat16: 0.1, torch.float16: 0.02}
"""How far results may be off that add up what a whole model computes with 8 or 11 bits of mantissa."""

METHODS = {"gd": gd, "lcgd": lcgd}
BACKENDS = ["bridge"] if HookedTransformer is None else ["hooked", "bridge"]


@dataclass
class Pair:
    """The bundled learner in half precision, the same rounded weights in float32, and an episode."""

    half: Any
    full: Any
    near: float

    def __post_init__(self) -> None:
        self.episode = load_task("bundled/remapped").episode(self.half, k=4, n_queries=6, seed=0)


@pytest.fixture(scope="module", params=[(dtype, backend) for dtype in NEAR for backend in BACKENDS], ids=str)
def pair(request) -> Pair:
    dtype, backend = request.param
    half = load_model("bundled", device="cpu", dtype=dtype, backend=backend)
    full = load_model("bundled", device="cpu", backend=backend)
    with torch.no_grad():
        for ours, rounded in zip(full.parameters(), half.parameters(), strict=True):
            ours.copy_(rounded)
    return Pair(half, full, NEAR[dtype])


@pytest.mark.parametrize("with_context", [False, True])
def test_captures_are_near_those_of_float32(pair, with_context):
    context = pair.episode.demonstrations if with_context else None
    found, expected = (capture(model, pair.episode.queries, context=context) for model in (pair.half, pair.full))
    assert found.attn_out.dtype == pair.half.cfg.dtype
    for name in found.kept:
        assert relative_error(found.kept[name].float(), expected.kept[name]) < pair.near, name
    assert found.label_log_probs.dtype == torch.float32
    assert not torch.equal(found.attn_out.float(), expected.attn_out)


@pytest.mark.parametrize("method", METHODS)
def test_updates_and_runs_under_them_are_near_those_of_float32_also_saved_and_loaded(pair, method, tmp_path):
    make = METHODS[method]
    found, expected = (make(model, pair.episode.demonstrations, lr=LR) for model in (pair.half, pair.full))
    assert found.key_errors.dtype == found.losses.dtype == torch.float32
    for layer in range(pair.half.cfg.n_layers):
        for name in ("W_K", "W_V", "b_V"):
            assert relative_error(found.delta(name, layer), expected.delta(name, layer)) < 2 * pair.near
    found.save(tmp_path / "update.safetensors")
    loaded = ParameterUpdate.load(tmp_path / "update.safetensors")
    for tensor in ("inputs", "key_errors", "value_errors", "gradient_norms"):
        assert getattr(loaded, tensor).dtype == getattr(found, tensor).dtype
        assert torch.equal(getattr(loaded, tensor), getattr(found, tensor))
    ft, again = (capture(pair.half, pair.episode.queries, update=update) for update in (found, loaded))
    assert torch.equal(ft.attn_out, again.attn_out)
    full = capture(pair.full, pair.episode.queries, update=expected)
    assert relative_error(ft.label_log_probs, full.label_log_probs) < pair.near
    with loaded.attached(pair.half):
        inside = capture(pair.half, pair.episode.queries)
    assert torch.equal(inside.attn_out, ft.attn_out)


def test_an_update_belongs_to_the_precision_that_it_was_made_in_as_its_weights_are_others(pair):
    plain = load_model("bundled", device="cpu", backend="bridge" if not hasattr(pair.half, "W_E") else "auto")
    update = gd(pair.half, pair.episode.demonstrations, lr=LR)
    with pytest.raises(ValueError, match="another dtype"):
        update.fwd_hooks(plain)


@pytest.mark.parametrize("pair", [(dtype, BACKENDS[0]) for dtype in NEAR], ids=str, indirect=True)
@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_comparisons_are_near_those_of_float32_and_undefined_in_the_same_places(pair, kernels):
    more: dict[str, Any] = {"controls": ("random", "shuffled_labels"), "kernels": True} if kernels else {"controls": ()}
    found, expected = (
        compare(model, pair.episode, lr=LR, untrained=untrained_twin(model) if kernels else None, **more)
        for model in (pair.half, pair.full)
    )
    keys = ["model", "method", "control", "subset", "layer", "metric"]
    joined = found.frame.merge(expected.frame, on=keys, suffixes=("", "_full"), validate="one_to_one")
    assert len(joined) == len(found.frame) == len(expected.frame)
    assert np.isfinite(joined["value"]).equals(joined["n"] > 0)
    similarity = joined[joined["metric"].isin(["sim_aou", "sim_am", "accuracy"]) & (joined["subset"] == "all")]
    similarity = similarity[(similarity["model"] == "trained") & (similarity["control"] == "none")]
    assert (similarity["value"] - similarity["value_full"]).abs().median() < pair.near
    assert len(similarity) > 10


def test_a_kernel_is_summed_in_float32(pair):
    found, expected = (tangent_kernel(model, pair.episode.demonstrations, pair.episode.queries) for model in (pair.half, pair.full))
    assert found.to_queries.dtype == torch.float32
    assert relative_error(found.per_label, expected.per_label) < 3 * pair.near


@pytest.mark.parametrize("pair", [(torch.bfloat16, BACKENDS[0])], ids=str, indirect=True)
def test_the_report_of_a_half_precision_run_says_so_and_shows_its_attention(pair, tmp_path):
    compare_episodes(
        pair.half, load_task("bundled/remapped"), tmp_path, k=4, queries=6, seeds=(0,), twins=False, about="", controls=(), lr=LR
    )
    close_run(tmp_path, pair.half, "bundled", {"command": "demo"}, pair.episode, dict.fromkeys(METHODS, LR), UPDATE_OPTIONS)
    page = (tmp_path / "report.html").read_text()
    assert str(pair.half.cfg.dtype).removeprefix("torch.") in page
    assert 'id="attention"' in page
    shown = changed_heads(
        pair.half, pair.episode.queries[0], pair.episode.demonstrations, gd(pair.half, pair.episode.demonstrations, lr=LR)
    )
    assert len(shown.body) > 1000
