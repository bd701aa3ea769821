"""Loading by name: the bundled model comes without a network, plain and quiet, and unknown names list the known."""

import json
import logging
import shutil
import socket
import warnings

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, GPT2Config, GPTNeoConfig, GPTNeoXConfig, OPTConfig

from iclgd_lens import capture, lcgd, load_task
from iclgd_lens.models.hooked import HookedTransformer, is_bridge
from iclgd_lens.models.loading import load_model, parse_device
from tests.models_zoo import require_hooked_transformer
from tests.tokenizers_zoo import FIXTURES, gpt2_style


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a test that needs no network opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
def test_the_bundled_model_loads_offline_as_a_plain_hooked_transformer_in_evaluation_mode():
    model = load_model("bundled", backend="hooked")
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


# Folders

SPECIAL = {"vocab_size": 800, "bos_token_id": 0, "eos_token_id": 0}
SHAPE = {"max_position_embeddings": 96, "hidden_size": 32, **SPECIAL}
DEEP = {"num_hidden_layers": 2, "num_attention_heads": 2, **SHAPE}
CONFIGS = {
    "gpt2": GPT2Config(n_positions=96, n_embd=32, n_layer=2, n_head=2, **SPECIAL),
    "gpt_neo": GPTNeoConfig(num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=8, **SHAPE),
    "gpt_neox": GPTNeoXConfig(intermediate_size=64, **DEEP),
    "opt": OPTConfig(ffn_dim=64, word_embed_proj_dim=32, pad_token_id=1, **DEEP),
}
ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "gpt_neo": "GPTNeoForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "opt": "OPTForCausalLM",
}

on_all_families = pytest.mark.parametrize("family", list(CONFIGS))


def random_model(config):
    """A Hugging Face model whose every parameter is random, norms and biases too."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a model and a tokenizer for each family."""
    made = {}
    for family, config in CONFIGS.items():
        made[family] = tmp_path_factory.mktemp("models") / f"tiny-{family}"
        random_model(config).save_pretrained(made[family])
        gpt2_style().save_pretrained(made[family])
    return made


def some_tokens() -> torch.Tensor:
    return torch.randint(800, (2, 40), generator=torch.Generator().manual_seed(0))


def differ(model: HookedTransformer, hf_model) -> float:
    """By how much the log-probabilities of two models differ at most."""
    with torch.no_grad():
        ours, theirs = model(some_tokens()), hf_model(some_tokens()).logits
    return float((ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max())


@pytest.mark.usefixtures("no_network")
@on_all_families
@pytest.mark.parametrize(("process_weights", "norm"), [(False, "LN"), (True, "LNPre")])
def test_a_model_in_a_folder_computes_what_the_hugging_face_model_does(folders, family, process_weights, norm):
    model = load_model(folders[family], device="cpu", backend="hooked", process_weights=process_weights)
    assert type(model) is HookedTransformer
    assert model.cfg.normalization_type == norm
    assert model.cfg.original_architecture == ARCHITECTURES[family]
    assert (model.cfg.model_name, model.cfg.n_ctx, model.cfg.d_vocab) == (f"tiny-{family}", 96, 800)
    assert not model.training
    assert differ(model, random_model(CONFIGS[family])) < 1e-5


@on_all_families
def test_weights_from_a_folder_are_as_they_were_trained_unless_processing_is_asked_for(folders, family):
    hf_model = random_model(CONFIGS[family])
    unembedding = hf_model.get_output_embeddings().weight.T
    plain, processed = (
        load_model(folders[family], device="cpu", backend="hooked", process_weights=process) for process in (False, True)
    )
    assert plain.W_U.equal(unembedding)
    assert not processed.W_U.allclose(unembedding, atol=1e-2)
    assert plain.ln_final.w.std() > 0.01


@on_all_families
def test_a_folder_s_tokenizer_is_the_model_s(folders, family):
    model = load_model(str(folders[family]), device="cpu")
    text = "Sentence: the café 🙂 Label: Positive"
    assert model.tokenizer.encode(text, add_special_tokens=False) == gpt2_style().encode(text, add_special_tokens=False)
    assert model.tokenizer.bos_token_id == model.tokenizer.eos_token_id == 0
    theirs, own = (
        load_task("sst2", data=FIXTURES).episode(owner, k=3, n_queries=2)
        for owner in (model, load_model(folders["gpt2"], device="cpu"))
    )
    assert theirs.digest == own.digest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_a_folder_takes_the_dtype_asked_for(folders, dtype):
    model = load_model(folders["gpt2"], device="cpu", dtype=dtype)
    assert model.cfg.dtype == dtype
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(some_tokens()).dtype == dtype
    if dtype == torch.float64:
        assert differ(model, random_model(CONFIGS["gpt2"]).double()) < 1e-12


def test_the_name_of_a_folder_does_not_matter(folders, tmp_path):
    for name in ("my-llama", "pythia-opt-neox", "bundled"):
        folder = shutil.copytree(folders["gpt2"], tmp_path / name)
        model = load_model(folder, device="cpu", backend="hooked")
        assert (model.cfg.model_name, model.cfg.original_architecture) == (name, "GPT2LMHeadModel")
        assert differ(model, random_model(CONFIGS["gpt2"])) < 1e-5


def without(*names: str):
    def remove(folder):
        for name in names:
            (folder / name).unlink()

    return remove


def with_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")

    return change


def truncated(name: str):
    def cut(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return cut


def as_bert(folder):
    without("config.json", "model.safetensors")(folder)
    config = BertConfig(vocab_size=800, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertForMaskedLM(config).save_pretrained(folder)


def as_unheard_of(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": "unheard", "architectures": ["Unheard"]}), encoding="utf-8"
    )


def as_ctrl(folder):
    without("config.json", "model.safetensors")(folder)
    config = transformers.CTRLConfig(n_positions=96, n_embd=8, n_layer=1, n_head=1, dff=8, vocab_size=800)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("config.json"), r"the folder .*spoilt holds no Hugging Face model: there is no config\.json"),
        (without("model.safetensors"), "the folder .*spoilt does not hold a whole model and tokenizer"),
        (without("tokenizer.json", "tokenizer_config.json"), "the folder .*spoilt holds no tokenizer that knows words"),
        (with_config(n_layer=3), r"the weights in .*spoilt lack \d+ tensors, transformer\.h\.2"),
        (with_config(n_embd=16), "the folder .*spoilt does not hold a whole model and tokenizer"),
        (truncated("model.safetensors"), "the folder .*spoilt does not hold a whole model and tokenizer"),
        (truncated("config.json"), "the folder .*spoilt does not hold a whole model and tokenizer"),
        (as_unheard_of, "the folder .*spoilt does not hold a whole model and tokenizer"),
        (
            as_bert,
            r"cannot convert the model in .*spoilt \(architecture BertForMaskedLM\).*; and the bridge for BertLMHead",
        ),
        (as_ctrl, r"cannot convert the model in .*spoilt \(architecture CTRLLMHeadModel\).*no bridge for the model in .*spoilt"),
    ],
    ids=[
        "no config",
        "no weights",
        "no tokenizer",
        "fewer weights",
        "other weights",
        "cut weights",
        "cut config",
        "unknown to transformers",
        "bert",
        "unknown to TransformerLens",
    ],
)
def test_a_folder_that_holds_no_whole_or_no_known_model_is_named(folders, tmp_path, spoil, message):
    require_hooked_transformer()
    folder = shutil.copytree(folders["gpt2"], tmp_path / "spoilt")
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(("process_weights", "method"), [(False, "from_pretrained_no_processing"), (True, "from_pretrained")])
def test_a_hub_out_of_reach_gives_one_error_that_says_what_to_do(monkeypatch, process_weights, method):
    require_hooked_transformer()

    def fail(*args, **kwargs):
        logger = logging.getLogger("huggingface_hub.utils._http")
        assert not logger.isEnabledFor(logging.ERROR)
        raise OSError("We couldn't connect to the hub\nand a long story")

    monkeypatch.setattr(HookedTransformer, method, fail)
    with pytest.raises(OSError, match="cannot load the model 'gpt2' from the hub or its local cache: We couldn't connect") as error:
        load_model("gpt2", process_weights=process_weights)
    assert "give the path of a folder that holds the model, or use 'bundled'" in str(error.value)
    assert "\n" not in str(error.value)


@on_all_families
@pytest.mark.parametrize("process_weights", [False, True])
def test_an_episode_of_files_runs_through_capture_and_gradient_steps_and_processed_weights_warn(folders, family, process_weights):
    model = load_model(folders[family], device="cpu", process_weights=process_weights)
    episode = load_task("sst2", data=FIXTURES).episode(model, k=2, n_queries=2)
    zsl = capture(model, episode.queries)
    icl = capture(model, episode.queries, context=episode.demonstrations)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        update = lcgd(model, episode.demonstrations, lr=0.01)
    about = [
        str(warning.message) for warning in said if "weights are processed: its layer norms are folded" in str(warning.message)
    ]
    assert len(about) == len(said) == int(process_weights)
    ft = capture(model, episode.queries, update=update)
    assert update.gradient_norms.isfinite().all()
    assert all(step.attn_out.isfinite().all() for step in (zsl, icl, ft))
    assert not ft.attn_out.allclose(zsl.attn_out)


def test_a_model_that_the_conversion_makes_another_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["gpt_neox"], tmp_path / "spoilt")
    with_config(rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.25})(folder)
    with pytest.raises(ValueError, match="comes out as another model, with log-probabilities that are"):
        load_model(folder, device="cpu", backend="hooked")


def test_a_model_that_cannot_be_converted_gets_a_bridge_and_computes_what_it_does(folders, tmp_path):
    folder = shutil.copytree(folders["gpt_neox"], tmp_path / "other rotary base")
    with_config(rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.25})(folder)
    model, tokens = load_model(folder, device="cpu"), torch.arange(20)[None]
    assert is_bridge(model)
    assert model.cfg.model_name == "other rotary base"
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()(tokens).logits
        assert (model(tokens) - expected).abs().max() < 1e-5
