"""Loading by name: the bundled model comes without a network, plain and quiet, and unknown names list the known."""

import socket

import pytest
import torch
from transformer_lens import HookedTransformer

from iclgd_lens.models.loading import load_model, parse_device


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a test that needs no network opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
def test_the_bundled_model_loads_offline_as_a_plain_hooked_transformer_in_evaluation_mode():
    model = load_model("bundled")
    assert type(model) is HookedTransformer
    assert not model.training
    assert model.cfg.normalization_type == "LN"
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_the_bundled_model_is_the_default():
    assert load_model().cfg.model_name == "bundled"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_loading_prints_nothing_and_takes_the_dtype_asked_for(capsys, dtype):
    model = load_model("bundled", dtype=dtype)
    assert model.cfg.dtype == dtype
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(torch.tensor([[1, 2]])).dtype == dtype
    assert capsys.readouterr() == ("", "")


def test_two_loads_share_no_weights():
    first, second = load_model("bundled"), load_model("bundled")
    with torch.no_grad():
        first.unembed.W_U.zero_()
    assert second.unembed.W_U.any()


def test_loading_leaves_torch_s_random_state_alone():
    torch.manual_seed(987)
    before = torch.get_rng_state()
    load_model("bundled")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("device", ["warp", "cuda:99", "xla"])
def test_an_unknown_device_lists_the_known(device):
    with pytest.raises(ValueError, match=f"device='{device}' is not available; here there is cpu"):
        load_model("bundled", device=device)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_device_may_be_a_name_or_a_torch_device(device):
    assert parse_device(device) == "cpu"


@pytest.mark.parametrize(
    ("cuda", "chosen", "present"), [(False, "cpu", ["cpu"]), (True, "cuda", ["cpu", "cuda", "cuda:0", "cuda:1"])]
)
def test_the_default_device_is_cuda_where_there_is_one(monkeypatch, cuda, chosen, present):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parse_device(None) == chosen
    assert [parse_device(device) for device in present] == present


@pytest.mark.usefixtures("no_network")
def test_an_unknown_model_name_is_refused_and_near_ones_suggested():
    with pytest.raises(ValueError, match=r"unknown model 'gtp2'; did you mean .*'gpt2'.*It may be 'bundled'"):
        load_model("gtp2")
    with pytest.raises(ValueError, match=r"unknown model 'zzzzzz'\. It may be 'bundled'"):
        load_model("zzzzzz")
