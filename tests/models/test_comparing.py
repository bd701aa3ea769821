"""Loading compares outputs beyond every window, so that no window that TransformerLens does not read goes unseen."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
import transformers as hf

from iclgd_lens.models import converting
from iclgd_lens.models.comparing import LONGEST, comparison_prompts, rotary_state_kept
from iclgd_lens.models.converting import longer_window
from iclgd_lens.models.hooked import is_bridge
from iclgd_lens.models.loading import load_model
from tests.hf_zoo import draw
from tests.models_zoo import require_hooked_transformer
from tests.tokenizers_zoo import gpt2_style

SIZES = {
    "vocab_size": 800,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 160,
    "attn_implementation": "eager",
}
WINDOWED = {"use_sliding_window": True, "max_window_layers": 1}


def make(family, **changes):
    model = getattr(hf, f"{family}ForCausalLM")(getattr(hf, f"{family}Config")(**{**SIZES, **changes}))
    draw(model)
    return model.eval()


def saved(model, folder):
    model.save_pretrained(folder)
    gpt2_style().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("window", [5, 100])
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_a_folder_whose_window_no_hooked_transformer_has_gets_a_bridge_and_computes_what_it_does(family, window, tmp_path):
    require_hooked_transformer()
    plain = make(family, sliding_window=window, **WINDOWED)
    folder = saved(plain, tmp_path / "windowed")
    model = load_model(folder, device="cpu")
    tokens = torch.randint(800, (1, 150), generator=torch.Generator().manual_seed(1))
    assert is_bridge(model)
    with torch.no_grad():
        assert (model(tokens) - plain(tokens).logits).abs().max() < 1e-4
    with pytest.raises(ValueError, match=rf"comes out as another model: some of its layers look back {window} tokens alone"):
        load_model(folder, device="cpu", backend="hooked")


@pytest.mark.parametrize("window", [5, 100])
def test_outputs_alone_tell_a_window_that_was_not_read(window, monkeypatch):
    require_hooked_transformer()
    monkeypatch.setattr(converting, "_require_same_lengths", lambda *args: None)
    with pytest.raises(ValueError, match=r"comes out as another model, with log-probabilities that are .* off on a prompt of"):
        load_model(hf_model=make("Qwen2", sliding_window=window, **WINDOWED), backend="hooked")


def test_a_folder_without_a_window_stays_a_hooked_transformer(tmp_path):
    require_hooked_transformer()
    folder = saved(make("Qwen2", use_sliding_window=False, sliding_window=5), tmp_path / "plain")
    assert not is_bridge(load_model(folder, device="cpu"))


def test_a_folder_whose_context_window_transformer_lens_caps_gets_a_bridge_unless_hooked_is_asked_for(tmp_path):
    require_hooked_transformer()
    folder = saved(make("Qwen3", max_position_embeddings=4096, use_sliding_window=False), tmp_path / "long")
    whole, capped = load_model(folder, device="cpu"), load_model(folder, device="cpu", backend="hooked")
    assert is_bridge(whole)
    assert (whole.cfg.n_ctx, longer_window(whole)) == (4096, None)
    assert (capped.cfg.n_ctx, longer_window(capped)) == (2048, 4096)


@pytest.mark.parametrize(
    ("config", "n_ctx", "lengths"),
    [
        (SimpleNamespace(vocab_size=50, sliding_window=300), 4096, [24, 308]),
        (SimpleNamespace(vocab_size=50, sliding_window=[30, 900]), 4096, [24, 908]),
        (SimpleNamespace(vocab_size=50, sliding_window=300), 302, [24, 302]),
        (SimpleNamespace(vocab_size=50), 4096, [24, 256]),
        (SimpleNamespace(vocab_size=50), 64, [24, 64]),
        (SimpleNamespace(vocab_size=50), 16, [16]),
    ],
)
def test_the_long_prompt_is_longer_than_every_window(config, n_ctx, lengths):
    assert [prompt.shape[1] for prompt in comparison_prompts(config, n_ctx)] == lengths


def test_prompts_are_varied_and_the_same_each_time_and_have_no_special_tokens():
    config = SimpleNamespace(vocab_size=50, pad_token_id=0, image_token_id=7, text_config=None)
    short, long = comparison_prompts(config, 4096)
    assert short.equal(comparison_prompts(config, 4096)[0])
    assert set(long.flatten().tolist()) == set(range(50)) - {0, 7}


def test_a_length_too_long_to_be_compared_at_is_in_the_log(caplog):
    config = SimpleNamespace(vocab_size=50, sliding_window=[64, LONGEST])
    with caplog.at_level(logging.WARNING):
        assert comparison_prompts(config, 100_000)[-1].shape[1] == 256
    assert f"changes at prompts of {LONGEST} tokens" in caplog.text


DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "model",
    [
        lambda: make("Llama", rope_parameters=DYNAMIC, max_position_embeddings=64),
        lambda: make("Phi3", rope_parameters=LONGROPE, original_max_position_embeddings=16, pad_token_id=0),
    ],
    ids=["dynamic", "longrope"],
)
def test_rotary_frequencies_are_afterwards_what_they_were(model):
    model = model()
    [rotary] = [module for module in model.modules() if hasattr(module, "inv_freq")]
    before, length = rotary.inv_freq.clone(), rotary.max_seq_len_cached
    with torch.no_grad(), rotary_state_kept(model):
        model(torch.arange(100)[None])
        assert not rotary.inv_freq.equal(before)
    assert rotary.inv_freq.equal(before)
    assert rotary.max_seq_len_cached == length


def test_rotary_frequencies_are_after_loading_what_they_were():
    plain = make("Phi3", rope_parameters=LONGROPE, original_max_position_embeddings=16, pad_token_id=0)
    model, short = load_model(hf_model=copy.deepcopy(plain)), torch.arange(12)[None]
    [frequencies] = [buffer for name, buffer in model.original_model.named_buffers() if name.endswith(".inv_freq")]
    assert frequencies.equal(plain.model.rotary_emb.inv_freq)
    with torch.no_grad():
        assert (model(short) - plain(short).logits).abs().max() < 1e-5
