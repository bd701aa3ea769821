"""`ParameterUpdate`: its dual form, its file and the model that it belongs to."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
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


def without_a_token(update: ParameterUpdate, token: int) -> ParameterUpdate:
    """The update as if one of its tokens had been lost everywhere."""
    left = [number for number in range(len(update.position)) if number != token]
    of_tokens = {name: getattr(update, name)[:, left] for name in ("inputs", "key_errors", "value_errors")}
    return replace(update, **of_tokens, demonstration=update.demonstration[left], position=update.position[left])


def changed(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[..., -1] = value
    return tensor


UNSOUND = {
    "nan_error": (lambda u: replace(u, key_errors=changed(u.key_errors, math.nan)), "key_errors has .* not finite"),
    "infinite_input": (lambda u: replace(u, inputs=changed(u.inputs, math.inf)), "inputs has .* not finite"),
    "nan_loss": (lambda u: replace(u, losses=changed(u.losses, math.nan)), "losses has 1 of"),
    "nan_norm": (lambda u: replace(u, gradient_norms=changed(u.gradient_norms, math.nan)), "gradient_norms has"),
    "fewer_errors": (lambda u: replace(u, value_errors=u.value_errors[:, 1:]), "value_errors has .* along the axis 'token'"),
    "fewer_layers": (lambda u: replace(u, inputs=u.inputs[:1]), "along the axis 'layer'"),
    "flat": (lambda u: replace(u, key_errors=u.key_errors.flatten(2)), r"key_errors must be \[layer token kv_head d_head\]"),
    "no_tokens": (lambda u: replace(u, inputs=u.inputs[:, :0]), "inputs has 0 along the axis 'token'"),
    "half_errors": (lambda u: replace(u, key_errors=u.key_errors.half()), "key_errors must have torch.float32 or"),
    "fractional_positions": (lambda u: replace(u, position=u.position.float()), "position must have torch.int64"),
    "negative_position": (lambda u: replace(u, position=u.position - 1), "position has a negative entry, -1"),
    "negative_demonstration": (lambda u: replace(u, demonstration=u.demonstration - 1), "demonstration must go from 0"),
    "one_token_lost": (lambda u: without_a_token(u, 2), "some are missing"),
    "first_token_of_an_epoch_lost": (lambda u: without_a_token(u, len(u.position) // 2), "some are missing"),
    "a_demonstration_lost": (
        lambda u: replace(u, losses=u.losses[:-2], gradient_norms=u.gradient_norms[:, :-2]),
        "demonstration must go from 0 to 1 in order",
    ),
}


@pytest.mark.parametrize("fault", UNSOUND)
@pytest.mark.unchecked_shapes
def test_unsound_updates_are_neither_saved_nor_read(fault, tmp_path, update, monkeypatch):
    make, message = UNSOUND[fault]
    broken, path = make(update), tmp_path / "broken"
    with pytest.raises(ValueError, match=message):
        broken.save(path)
    monkeypatch.setattr("iclgd_lens.updates.dual.require_sound", lambda tensors, epochs: None)
    broken.save(path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=f"broken is not a sound update: .*{message}"):
        ParameterUpdate.load(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"settings": {"method": "sgd"}}, "method must be one of 'gd', 'lcgd'; got 'sgd'"),
        ({"settings": {"parameters": ["W_Q"]}}, "parameters must be some of .*W_Q"),
        ({"settings": {"parameters": 5}}, "parameters must be a list, got 5"),
        ({"settings": {"parameters": [5]}}, "parameters must be some of"),
        ({"settings": {"lr": "fast"}}, "lr must be a number"),
        ({"settings": {"lr": -1.0}}, "lr must be a number, finite and not negative"),
        ({"settings": {"epochs": 0}}, "epochs must be at least 1"),
        ({"settings": {"epochs": 4}}, "some are missing"),
        ({"settings": {"momentum": 0.9}}, "its settings must be method, lr"),
        ({"fingerprint": "bundled"}, "fingerprint must be 16 hex digits"),
        ({"fingerprint": ""}, "fingerprint must be 16 hex digits"),
        ({"fingerprint": None}, "fingerprint must be 16 hex digits, got None"),
        ({"examples": None}, "examples must be 16 hex digits, got None"),
    ],
    ids=repr,
)
def test_files_with_unknown_settings_or_origins_are_refused(tmp_path, metadata, message, update):
    update.save(tmp_path / "update")
    with safe_open(tmp_path / "update", framework="pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in TENSORS}
    settings = json.loads(about["settings"]) | metadata.pop("settings", {})
    about = {name: each for name, each in (about | {"settings": json.dumps(settings)} | metadata).items() if each is not None}
    save_file(tensors, tmp_path / "odd", metadata=about)
    with pytest.raises(ValueError, match=f"odd is not a sound update: .*{message}"):
        ParameterUpdate.load(tmp_path / "odd")


def test_settings_that_no_json_holds_are_refused(tmp_path, update):
    update.save(tmp_path / "update")
    with safe_open(tmp_path / "update", framework="pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in TENSORS}
    for settings in ("{", "[]", "gd"):
        save_file(tensors, tmp_path / "odd", metadata=about | {"settings": settings})
        with pytest.raises(ValueError, match="odd is not a sound update: its settings must be method, lr"):
            ParameterUpdate.load(tmp_path / "odd")


@pytest.mark.parametrize("epochs", [True, 0, 3, 1.0, -1], ids=repr)
def test_epochs_that_an_update_was_not_made_in_are_refused(epochs, update):
    with pytest.raises(ValueError, match=f"epochs={epochs}, but the update was made in 2"):
        update.first_epochs(epochs)


def test_a_method_of_no_such_name_is_refused(update):
    with pytest.raises(ValueError, match="method must be one of 'gd', 'lcgd'; got 'adam'"):
        replace(update.settings, method="adam")
