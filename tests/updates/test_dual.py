"""`ParameterUpdate`: its dual form, its file and the model that it belongs to."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file

from iclgd_lens.runs.capture import capture
from iclgd_lens.updates.dual import ParameterUpdate
from iclgd_lens.updates.gradient import gd, lcgd
from tests.models_zoo import make_demonstrations, make_model, make_queries
from tests.reference import PARAMETERS, parameter, relative_error

TENSORS = ("inputs", "key_errors", "value_errors", "demonstration", "position", "gradient_norms", "losses")
LR = 0.05


@pytest.fixture(scope="module")
def model():
    return make_model("rotary_rms_grouped_gated")


@pytest.fixture(scope="module")
def update(model):
    return lcgd(model, make_demonstrations(), lr=LR, epochs=2)


def test_delta_is_the_sum_of_outer_products_of_inputs_and_errors(update):
    for name, errors in (("K", update.key_errors), ("V", update.value_errors)):
        for layer, (inputs, at_layer) in enumerate(zip(update.inputs, errors, strict=True)):
            weight = sum(torch.stack([torch.outer(x, e) for e in heads]) for x, heads in zip(inputs, at_layer, strict=True))
            assert relative_error(update.delta(f"W_{name}", layer), weight) < 1e-5
            assert relative_error(update.delta(f"b_{name}", layer), sum(at_layer)) < 1e-5


@pytest.mark.parametrize("shape", ["three_layers", "rotary_rms_grouped_gated"])
def test_delta_has_the_layout_of_the_stored_parameter(shape):
    model = make_model(shape)
    update = gd(model, make_demonstrations(1), lr=LR)
    for name in PARAMETERS:
        assert update.delta(name, 0).shape == parameter(model, 0, name).shape
        assert update.delta(name, 0).dtype == torch.float32
        assert torch.equal(update.delta(name, -1), update.delta(name, model.cfg.n_layers - 1))


@pytest.mark.parametrize(("name", "layer"), [("W_Q", 0), ("K", 0), ("W_K", 2), ("W_K", -3)])
def test_delta_of_no_such_parameter_or_layer_is_refused(name, layer, update):
    with pytest.raises(ValueError, match=f"{name!r}|layer={layer}, but the update has 2 layers"):
        update.delta(name, layer)


def test_delta_is_zero_and_norms_silent_for_what_was_not_trained(model):
    update = gd(model, make_demonstrations(), lr=LR, parameters=("W_K", "b_V"))
    assert update.norms.keys() == {"W_K", "b_V"}
    assert all(not update.delta(name, 0).any() for name in ("b_K", "W_V"))
    assert all(update.delta(name, 0).any() for name in ("W_K", "b_V"))


def test_norms_are_frobenius_norms_of_the_deltas(update):
    assert update.norms.keys() == set(PARAMETERS)
    for name, norms in update.norms.items():
        expected = torch.tensor([float(update.delta(name, layer).square().sum()) ** 0.5 for layer in range(2)])
        assert relative_error(norms, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_saved_update_is_read_back_bit_by_bit(tmp_path, dtype):
    model = make_model("rms", dtype=dtype)
    made = gd(model, make_demonstrations(), lr=LR, loss_on="label", schedule="batch", parameters=("b_K", "W_V"))
    path = tmp_path / "new" / "folder" / "update.safetensors"
    made.save(path)
    read = ParameterUpdate.load(path)
    for name in TENSORS:
        assert getattr(read, name).dtype == getattr(made, name).dtype
        assert torch.equal(getattr(read, name), getattr(made, name))
    assert read.settings == made.settings
    assert read.fingerprint == made.fingerprint
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_saved_update_acts_as_the_one_that_was_saved(tmp_path, model, update):
    update.save(tmp_path / "update")
    read = ParameterUpdate.load(str(tmp_path / "update"))
    expected, found = (capture(model, make_queries(), update=u) for u in (update, read))
    assert expected.kept.keys() == found.kept.keys()
    assert all(torch.equal(found.kept[name], tensor) for name, tensor in expected.kept.items())


def test_saving_again_replaces_the_file(tmp_path, model, update):
    path = tmp_path / "update"
    gd(model, make_demonstrations(1), lr=LR).save(path)
    update.save(path)
    assert ParameterUpdate.load(path).settings == update.settings


def test_a_save_that_fails_leaves_the_old_file(tmp_path, update, monkeypatch):
    path = tmp_path / "update"
    update.save(path)

    def fail(tensors, filename, metadata):
        raise OSError("no space left on device")

    monkeypatch.setattr("iclgd_lens.updates.dual.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        update.save(path)
    assert torch.equal(ParameterUpdate.load(path).inputs, update.inputs)


def test_files_that_are_something_else_are_refused(tmp_path, update):
    text, empty, other, cut = (tmp_path / name for name in ("text", "empty", "other", "cut"))
    text.write_text("lr = 0.05")
    empty.touch()
    save_file({"inputs": torch.zeros(2)}, other)
    update.save(cut)
    cut.write_bytes(cut.read_bytes()[:-100])
    for path in (text, empty, other, cut):
        with pytest.raises(ValueError, match=f"{path.name} is not a saved update"):
            ParameterUpdate.load(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        ParameterUpdate.load(tmp_path / "nowhere")


def test_update_is_for_any_model_of_the_same_weights(model, update):
    twin = copy.deepcopy(model)
    expected, found = (capture(m, make_queries(), update=update).attn_out for m in (model, twin))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "other",
    [
        lambda: make_model("rotary_rms_grouped_gated", seed=1),
        lambda: make_model("rotary"),
        lambda: make_model("rotary_rms_grouped_gated", dtype=torch.bfloat16),
    ],
    ids=["weights", "shape", "dtype"],
)
def test_update_of_another_model_is_refused(other, update):
    other = other()
    with pytest.raises(ValueError, match="this update belongs to another model"):
        update.fwd_hooks(other)
    with pytest.raises(ValueError, match="this update belongs to another model"), update.attached(other):
        pass
    with pytest.raises(ValueError, match="this update belongs to another model"):
        capture(other, make_queries(), update=update)
    assert not other.list_hooks()


def test_update_is_refused_once_its_model_was_trained_on(update):
    model = make_model("rotary_rms_grouped_gated")
    update.fwd_hooks(model)
    model.blocks[1].attn.W_O.data *= 1.001
    with pytest.raises(ValueError, match="this update belongs to another model"):
        update.fwd_hooks(model)


def test_update_stands_while_another_is_attached(model, update):
    with update.attached(model):
        assert update.fwd_hooks(model)
