"""One model of each kind keeps every promise, and the result says so in every form."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import iclgd_lens as lens
from iclgd_lens.checking import check as module
from iclgd_lens.checking.check import Check, Row
from iclgd_lens.models.lengths import lengths_of_change
from tests.hf_zoo import make_hf_model
from tests.models.test_linear_maps import Lora
from tests.models_zoo import make_model
from tests.runs.test_lengths import make


def slowly(*names: str) -> list[Any]:
    """Models that are checked among the slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


KINDS = ("gpt2", "opt", "gemma2", *slowly("gpt_neo", "gpt_neox", "llama", "mistral", "qwen3", "mixtral"))
SHAPES = (
    "post_norm",
    *slowly("three_layers", "no_norm", "rotary_rms_grouped_gated", "local_rotary", "soft_caps", "attention_sinks"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bridge_of_each_kind_keeps_every_promise(kind: str):
    found = lens.check(lens.load_model(hf_model=make_hf_model(kind)))
    assert found.ok, str(found)
    not_applicable = [row.what for row in found.rows if row.verdict == "not applicable"]
    assert not_applicable == ([] if kind not in ("gpt2", "gpt_neo", "opt") else ["rotary angles are exact, in radians"])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_hooked_transformer_of_each_shape_keeps_every_promise(shape: str):
    found = lens.check(make_model(shape))
    assert found.ok, str(found)


@pytest.mark.slow
def test_weights_in_half_precision_and_float64_keep_them_too():
    for dtype in (torch.bfloat16, torch.float64):
        hf_model = make_hf_model("gpt2").to(dtype)
        assert (found := lens.check(lens.load_model(hf_model=hf_model))).ok, str(found)


@pytest.mark.parametrize("name", ["longrope", *slowly("gemma_that_sees", "qwen_with_a_window")])
def test_promises_hold_beyond_windows_and_switches_of_rotary_frequencies(name):
    model, _ = make(name)
    assert (found := lens.check(model)).ok, str(found)
    assert found.longest > max(lengths_of_change(model.original_model.config))


def test_adapters_are_gone_through():
    """The real weights are the base layers', and what they are added to runs too."""
    hf_model: Any = make_hf_model("llama")
    for number, layer in enumerate(hf_model.model.layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Lora(getattr(layer.self_attn, name), seed=number))
    assert (found := lens.check(lens.load_model(hf_model=hf_model))).ok, str(found)


def test_the_frame_has_a_row_for_every_promise(bundled):
    found = lens.check(bundled)
    assert list(found.frame.columns) == ["what", "error", "tolerance", "verdict", "advice"]
    assert len(found.frame) == 11
    assert (found.frame["verdict"] != "fails").all()
    assert found.tokens > found.longest == bundled.cfg.n_ctx
    assert f"{found.tokens:,} tokens" in str(found)
    assert "<table>" in found._repr_html_()


def test_it_finds_the_same_twice(bundled):
    assert lens.check(bundled).frame.equals(lens.check(bundled).frame)


def test_text_fits_a_terminal_of_80_columns_and_html_is_escaped():
    rows = (Row("a < b", 1.0, 0.1, "fails", "do <this>"), Row("c", math.nan, 0.1, "not applicable", "because."))
    found = Check("model", rows, 3, 2)
    assert not found.ok
    assert "1.0e+00" in str(found)
    assert "a &lt; b: do &lt;this&gt;" in found._repr_html_()
    assert "1 of 2 promises fail on this model: a < b." in str(found)


def test_an_exception_within_a_row_is_the_failure_of_that_row(bundled, monkeypatch):
    def stumble(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("stumbled")

    monkeypatch.setattr(module, "_PROMISES", (module._Promise("stumbles", stumble, "outputs", "Do this."),))
    row, _ = lens.check(bundled).rows
    assert (row.verdict, row.advice) == ("fails", "RuntimeError: stumbled Do this.")


def test_hooks_of_the_users_are_named_where_something_fails():
    model = lens.load_model(hf_model=make_hf_model("llama"))
    model.add_hook("blocks.0.hook_out", lambda tensor, hook: 2 * tensor)
    row = lens.check(model).rows[0]
    assert row.verdict == "fails"
    assert "The model has hooks on it, 1 in all" in row.advice


def test_a_window_longer_than_prompts_may_be_is_not_claimed_to_be_seen():
    found = lens.check(lens.load_model(hf_model=make_hf_model("mistral")), longest=14)
    assert found.rows[1].verdict == "not applicable"
    assert "longest=17" in found.rows[1].advice


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="need a model of transformer_lens"):
        lens.check(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="longest must be at least 1"):
        lens.check(make_model(), longest=0)
