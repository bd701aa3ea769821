"""Weights are never unpickled and code beside them is never run, whatever a folder or a repository holds."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from iclgd_lens.models import identity, loading
from iclgd_lens.models.hooked import HookedTransformer, is_bridge
from iclgd_lens.models.identity import require_model
from iclgd_lens.models.loading import load_model
from tests.models_zoo import require_hooked_transformer
from tests.tokenizers_zoo import gpt2_style


def make_model() -> GPT2LMHeadModel:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=800, n_positions=48, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        ).eval()


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "plain"
    make_model().save_pretrained(folder)
    gpt2_style().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(plain, tmp_path) -> Path:
    return shutil.copytree(plain, tmp_path / "given")


@pytest.fixture
def trace(tmp_path) -> Path:
    """A file that code from a folder would write if it ran."""
    return tmp_path / "ran"


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.write_text, (self.trace, "ran")


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "final.pth"])
@pytest.mark.parametrize("backend", ["auto", "bridge"])
def test_a_folder_of_pickled_weights_alone_is_refused_unread_and_says_how_to_convert_it(folder, trace, name, backend):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Malicious(trace)))
    with pytest.raises(ValueError, match=rf"the weights in .*given are a pickle \({name}\).*\.save_pretrained\(folder\)"):
        load_model(folder, device="cpu", backend=backend)
    assert not trace.exists()


def test_the_advice_for_pickled_weights_makes_a_folder_that_loads(folder):
    (folder / "model.safetensors").unlink()
    torch.save(make_model().state_dict(), folder / "pytorch_model.bin")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(load_model(folder, device="cpu", backend="bridge")(tokens), make_model()(tokens).logits, atol=1e-5)


def test_a_pickle_beside_weights_that_are_none_is_left_unread(folder, trace):
    for name in ("training_args.bin", "pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Malicious(trace)))
    load_model(folder, device="cpu")
    assert not trace.exists()


@pytest.fixture
def with_code(folder, trace, monkeypatch) -> Path:
    """A folder whose configuration and tokenizer name code beside them; asking somebody whether to run it fails, too."""
    (folder / "beside.py").write_text(
        f"import pathlib\npathlib.Path({str(trace)!r}).write_text('ran')\n"
        "from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast\n"
        "class Config(GPT2Config):\n    model_type = 'beside'\n"
        "class Model(GPT2LMHeadModel):\n    config_class = Config\n"
        "class Words(PreTrainedTokenizerFast):\n    pass\n"
    )
    edit(folder / "config.json", auto_map={"AutoConfig": "beside.Config", "AutoModelForCausalLM": "beside.Model"})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "beside.Words"]})

    def ask(*args):
        raise AssertionError("asked whether to run code")

    monkeypatch.setattr("builtins.input", ask)
    return folder


@pytest.mark.parametrize("backend", ["auto", "bridge"])
def test_code_beside_a_model_that_is_known_is_not_run(with_code, trace, backend):
    model, tokens = load_model(with_code, device="cpu", backend=backend), torch.arange(20)[None]
    assert not trace.exists()
    with torch.no_grad():
        assert torch.allclose(model(tokens), make_model()(tokens).logits, atol=1e-5)


def test_a_model_that_needs_the_code_beside_it_is_refused_and_nobody_asked(with_code, trace):
    edit(with_code / "config.json", model_type="beside", architectures=["Model"])
    with pytest.raises(ValueError, match=r"the folder .*given does not hold a whole model and tokenizer: .*custom code"):
        load_model(with_code, device="cpu")
    assert not trace.exists()


def test_the_folder_with_code_would_run_it_if_it_were_trusted(with_code, trace, monkeypatch, tmp_path):
    """So that the tests above can fail."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    edit(with_code / "config.json", model_type="beside", architectures=["Model"])
    AutoModelForCausalLM.from_pretrained(with_code, trust_remote_code=True)
    assert trace.exists()


def test_a_name_that_resembles_one_of_a_pickle_is_not_refused():
    require_model("someone/NeelNanda")


@pytest.mark.parametrize("name", ["solu-1l", "NeelNanda/GELU_2L512W_C4_Code", "redwood_attn_2l"])
def test_models_that_transformer_lens_would_unpickle_are_refused_by_name(name):
    for ask in (load_model, require_model, identity.model_digest):
        with pytest.raises(ValueError, match=rf"weights of '{name}' .*are a pickle.*from_pretrained_no_processing\('{name}'\)"):
            ask(name)


def test_models_for_which_transformer_lens_would_run_the_hub_s_code_get_a_bridge_that_does_not(asked, monkeypatch):
    require_hooked_transformer()

    def never(*args, **options):
        raise AssertionError("ran code from the hub")

    monkeypatch.setattr(HookedTransformer, "from_pretrained", never)
    with pytest.raises(OSError, match="there is no hub here"):
        load_model("microsoft/phi-2", device="cpu")
    [(name, options)] = asked
    assert name == "microsoft/phi-2"
    assert (options["trust_remote_code"], options["use_safetensors"]) == (False, True)
    with pytest.raises(ValueError, match=r"runs code from the hub to make a HookedTransformer of 'microsoft/phi-2'.*'bridge'"):
        load_model("microsoft/phi-2", device="cpu", backend="hooked")


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_a_model_by_name_is_read_from_safetensors_alone_and_computes_what_it_does(folder, monkeypatch, backend):
    if backend == "hooked":
        require_hooked_transformer()
        edit(folder / "config.json", n_ctx=48)  # where TransformerLens looks for it
        monkeypatch.setattr("transformer_lens.loading_from_pretrained.get_official_model_name", lambda name: str(folder))
    monkeypatch.setattr(loading, "hub_name", lambda name: str(folder))
    tokens = torch.arange(20)[None]
    model = load_model("gpt2", device="cpu", backend=backend)
    assert is_bridge(model) == (backend == "bridge")
    with torch.no_grad():
        assert torch.allclose(model(tokens), make_model()(tokens).logits, atol=1e-5)
    (folder / "model.safetensors").unlink()
    torch.save(make_model().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_model("gpt2", device="cpu", backend=backend)
