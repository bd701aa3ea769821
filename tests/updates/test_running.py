"""The change so far: the same whether tokens are injected one by one or summed up."""

import pytest
import torch

from iclgd_lens import gd, lcgd
from iclgd_lens.updates.running import RunningUpdate
from tests.models_zoo import label_tokens, make_demonstrations, make_model
from tests.reference import relative_error
from tests.waiting import waits

LABELS = {"loss_on": "label", "readout": "labels", "label_tokens": label_tokens()}


@pytest.mark.parametrize("limit", [0, 10, 10_000])
def test_when_tokens_are_summed_up_changes_nothing(limit, monkeypatch):
    model, demonstrations = make_model(), make_demonstrations(6)
    expected = lcgd(model, demonstrations, lr=0.3, epochs=2)
    original = RunningUpdate.__init__

    def limited(self, *arguments):
        original(self, *arguments)
        self._limit = limit

    monkeypatch.setattr(RunningUpdate, "__init__", limited)
    found = lcgd(model, demonstrations, lr=0.3, epochs=2)
    assert relative_error(found.value_errors, expected.value_errors) < 1e-5
    assert relative_error(found.gradient_norms, expected.gradient_norms) < 1e-5


@pytest.mark.parametrize("shape", ["three_layers", "norms_before_and_after", "post_norm", "rotary_rms_grouped_gated"])
def test_label_losses_go_back_through_few_positions_as_through_all(shape):
    """A hook that changes nothing makes them go through all."""
    model, demonstrations = make_model(shape), make_demonstrations(4, max_text=12)
    few = lcgd(model, demonstrations, lr=0.3, **LABELS)
    with model.hooks(fwd_hooks=[(f"blocks.{layer}.hook_mlp_out", lambda out, hook: out) for layer in range(model.cfg.n_layers)]):
        every = lcgd(model, demonstrations, lr=0.3, **LABELS)
    assert not torch.equal(few.value_errors, torch.zeros_like(few.value_errors))
    assert relative_error(few.key_errors, every.key_errors) < 1e-5
    assert relative_error(few.value_errors, every.value_errors) < 1e-5


@pytest.mark.parametrize("place", ["mlp.hook_post", "hook_mlp_out", "hook_resid_post"])
def test_a_hook_that_stops_gradients_stops_them_in_label_losses(place):
    """Values are as before, so only the hook's presence tells."""
    model, demonstrations = make_model(), make_demonstrations(3, max_text=12)
    plain = lcgd(model, demonstrations, lr=0.3, **LABELS)
    stops = [(f"blocks.{layer}.{place}", lambda tensor, hook: tensor.detach()) for layer in range(model.cfg.n_layers)]
    with model.hooks(fwd_hooks=stops):
        stopped = lcgd(model, demonstrations, lr=0.3, **LABELS)
    assert relative_error(stopped.value_errors[:, :5], plain.value_errors[:, :5]) > 1e-2


@pytest.mark.parametrize(("blocks", "rows"), [(1, 128), (2, 128), (8, 128), (8, 1), (2, 8)])
@pytest.mark.parametrize("options", [{}, LABELS])
def test_how_many_blocks_are_read_out_at_once_changes_nothing(blocks, rows, options, monkeypatch):
    model, demonstrations = make_model(n_layers=5), make_demonstrations(3, max_text=12)
    expected = lcgd(model, demonstrations, lr=0.3, **options)
    monkeypatch.setattr("iclgd_lens.updates.backward.BLOCKS_AT_ONCE", blocks)
    monkeypatch.setattr("iclgd_lens.updates.backward.ROWS_AT_ONCE", rows)
    found = lcgd(model, demonstrations, lr=0.3, **options)
    assert relative_error(found.value_errors, expected.value_errors) < 1e-5
    assert relative_error(found.losses, expected.losses) < 1e-6


@pytest.mark.parametrize("options", [{}, LABELS], ids=["vocabulary", "labels"])
@pytest.mark.parametrize("method", [gd, lcgd])
@pytest.mark.parametrize("schedule", ["online", "batch"])
def test_no_step_waits_for_a_gpu(schedule, method, options):
    model, demonstrations = make_model(), make_demonstrations(4, max_text=12)
    once, often = (
        waits(lambda epochs=epochs: method(model, demonstrations, lr=0.1, schedule=schedule, epochs=epochs, **options))
        for epochs in (1, 4)
    )
    assert often - once == 3, "more than one question, whether the update is finite, per epoch"
