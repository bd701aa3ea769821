"""Which weights a name stands for is found without loading them."""

import os

import huggingface_hub
import pytest

from iclgd_lens.models.identity import model_digest


def test_the_bundled_learner_has_a_digest():
    assert model_digest("bundled") == model_digest("bundled")


@pytest.mark.parametrize("size", [1_000, 10_000_000])
def test_a_folder_s_digest_is_of_names_sizes_and_content(tmp_path, size):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(os.urandom(size))
    first = model_digest(str(tmp_path))
    assert model_digest(str(tmp_path)) == first
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    second = model_digest(str(tmp_path))
    weights.rename(tmp_path / "other.safetensors")
    assert len({first, second, model_digest(str(tmp_path))}) == 3


def test_a_hub_model_s_digest_is_its_revision(monkeypatch):
    def info(name, timeout):
        assert name == "openai-community/gpt2" or name == "gpt2"
        return type("Info", (), {"sha": "0123456789abcdef0123"})

    monkeypatch.setattr(huggingface_hub, "model_info", info)
    assert model_digest("gpt2") == "0123456789abcdef"


def test_without_a_connection_the_revision_is_that_of_the_cache(tmp_path, monkeypatch):
    def away(name, timeout):
        raise ConnectionError("no route")

    file = tmp_path / "snapshots" / "fedcba9876543210fedc" / "config.json"
    monkeypatch.setattr(huggingface_hub, "model_info", away)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, filename: str(file))
    assert model_digest("someone/model") == "fedcba9876543210"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, filename: None)
    with pytest.raises(OSError, match=r"cannot load the revision of 'someone/model'.*no route"):
        model_digest("someone/model")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown model 'gtp2'"):
        model_digest("gtp2")
