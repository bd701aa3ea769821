"""Models in GGUF files, and paths that are no model's."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from iclgd_lens.experiments.folder import write_setting
from iclgd_lens.models import folders
from iclgd_lens.models.hooked import is_bridge
from iclgd_lens.models.identity import model_digest, require_model, shown_name
from iclgd_lens.models.loading import load_model
from iclgd_lens.models.quantisation import quantisation_of
from iclgd_lens.models.untrained import untrained_twin
from tests.models.gguf_zoo import write_gguf
from tests.tokenizers_zoo import gpt2_style


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """The path of a GGUF file, and the Hugging Face model that it stands for."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    return file, write_gguf(file)


TOKENS = torch.randint(1, 800, (2, 40), generator=torch.Generator().manual_seed(0))
STORED = {"quant_method": "gguf", "file_type": "MOSTLY_Q8_0", "tensors": {"F32": 7, "Q8_0": 14}}


@pytest.mark.parametrize("backend", ["auto", "bridge"])
def test_a_gguf_file_computes_what_its_dequantised_weights_do(gguf, backend):
    file, plain = gguf
    model = load_model(str(file), device="cpu", backend=backend)
    with torch.no_grad():
        assert (model(TOKENS) - plain(TOKENS).logits).abs().max() < 1e-4
    text = "Sentence: the café Label: Positive"
    assert model.tokenizer.encode(text, add_special_tokens=False) == gpt2_style().encode(text, add_special_tokens=False)
    assert model.cfg.model_name == "tiny.Q8_0"


@pytest.mark.parametrize("backend", ["auto", "bridge"])
def test_the_quantisation_of_a_gguf_file_is_in_the_setting_and_its_twin_knows(gguf, backend, tmp_path):
    model = load_model(gguf[0], device="cpu", backend=backend, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    write_setting(tmp_path, model, "tiny", {"command": "demo"})
    assert json.loads((tmp_path / "setting.json").read_text())["model"]["quantisation"] == STORED
    assert quantisation_of(untrained_twin(model)) == STORED


def test_a_model_that_never_was_quantised_says_so(bundled):
    assert quantisation_of(bundled) is None


def test_a_gguf_model_in_memory_works_and_has_twins(gguf):
    file, plain = gguf
    hf_model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = load_model(hf_model=hf_model, tokenizer=tokenizer)
    assert is_bridge(model)
    assert quantisation_of(model)["quant_method"] == "gguf"
    with torch.no_grad():
        assert (model(TOKENS) - plain(TOKENS).logits).abs().max() < 1e-4
        assert untrained_twin(model)(TOKENS).isfinite().all()


def test_a_folder_that_holds_a_gguf_file_alone_says_to_give_the_file(gguf):
    with pytest.raises(ValueError, match=r"no config\.json; to load the GGUF file in it, give its path: .*tiny\.Q8_0\.gguf"):
        load_model(gguf[0].parent)


def test_without_the_package_a_gguf_file_is_refused_by_the_extra(gguf, monkeypatch):
    monkeypatch.setattr(folders, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the package gguf.*pip install 'iclgd-lens\[gguf\]'"):
        load_model(gguf[0])


def test_a_file_that_is_no_gguf_file_is_named(tmp_path):
    file = tmp_path / "cut.gguf"
    file.write_bytes(b"GGUF nothing")
    with pytest.raises(ValueError, match=r"the file .*cut\.gguf does not hold a whole model and tokenizer"):
        load_model(file)


def test_a_gguf_file_has_a_digest_and_a_short_name(gguf):
    require_model(str(gguf[0]))
    assert shown_name(str(gguf[0])) == "tiny.Q8_0"
    assert model_digest(str(gguf[0])) == model_digest(str(gguf[0]))


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """A home and working directory with an empty folder `models`."""
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("at_home")
@pytest.mark.parametrize(
    "name",
    ["./nothing_here", "./models/mine", "../mine", "/no/such/place", "~/mine", "models/mine", "a/b/c", "mine.gguf", "gone/"],
)
def test_a_path_that_is_not_there_is_named(name):
    for ask in (load_model, require_model, model_digest):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            ask(name)
        assert f"there is no folder or file {name!r}" in str(error.value)


def test_a_path_that_is_nearly_there_is_suggested(at_home):
    (at_home / "models" / "smollm").mkdir()
    with pytest.raises(ValueError, match=r"did you mean 'models/smollm'"):
        load_model("models/smolm")


def test_the_home_is_expanded(at_home):
    with pytest.raises(ValueError, match=rf"the folder {at_home}/models holds no Hugging Face model"):
        load_model("~/models")
    assert shown_name("~/models") == "models"


@pytest.mark.parametrize(
    ("name", "message"),
    [("model.safetensors", "holds weights alone; give the folder"), ("notes.txt", "neither a folder with a Hugging Face model")],
)
def test_a_file_that_is_no_whole_model_says_what_to_give(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / name)
