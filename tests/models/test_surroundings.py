"""Weights that are loaded or drawn do not depend on torch's global settings."""

from contextlib import contextmanager

import pytest
import torch

from iclgd_lens.models.loading import load_model
from iclgd_lens.models.surroundings import ordinary_tensors
from iclgd_lens.models.untrained import untrained_twin
from tests.hf_zoo import make_hf_model
from tests.tokenizers_zoo import gpt2_style


@contextmanager
def default_dtype(dtype):
    was = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(was)


SETTINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "another device": lambda: torch.device("meta"),
    "no gradients": torch.no_grad,
}
under_each = pytest.mark.parametrize("setting", list(SETTINGS))


def tensors(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


def same(first, second):
    first, second = tensors(first), tensors(second)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor.dtype, tensor.device, tensor.is_inference()) == (second[name].dtype, second[name].device, False), name
        assert torch.equal(tensor, second[name]), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_hf_model("llama").save_pretrained(folder)
    gpt2_style().save_pretrained(folder)
    return folder


@under_each
@pytest.mark.parametrize("backend", ["auto", "bridge"])
def test_a_folder_loads_the_same(folder, setting, backend):
    with SETTINGS[setting]():
        loaded = load_model(folder, device="cpu", backend=backend)
    same(loaded, load_model(folder, device="cpu", backend=backend))


@under_each
def test_the_bundled_learner_and_its_twin_are_the_same(setting, bundled):
    with SETTINGS[setting]():
        loaded = load_model("bundled", device="cpu")
        twin = untrained_twin(bundled, seed=3)
    same(loaded, bundled)
    same(twin, untrained_twin(bundled, seed=3))


@under_each
@pytest.mark.parametrize("architecture", ["gpt2", "opt", "mixtral", "gemma2"])
def test_a_bridge_s_twin_is_the_same(setting, architecture):
    model = load_model(hf_model=make_hf_model(architecture))
    with SETTINGS[setting]():
        twin = untrained_twin(model, seed=3, keep=())
    same(twin, untrained_twin(model, seed=3, keep=()))


@under_each
def test_a_model_in_memory_loads(setting):
    model = make_hf_model("llama")
    with SETTINGS[setting]():
        loaded = load_model(hf_model=model)
    assert all(not tensor.is_inference() for tensor in tensors(loaded).values())
    loss = loaded(torch.arange(10)[None]).sum()
    loss.backward()


def test_settings_are_afterwards_what_they_were():
    with default_dtype(torch.float64), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        with pytest.raises(KeyError), ordinary_tensors():
            raise KeyError
        assert torch.get_default_dtype() == torch.float64
        assert torch.is_autocast_enabled("cpu")
        assert torch.empty(1).device.type == "meta"
