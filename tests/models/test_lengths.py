"""Windows and rotary frequencies are read wherever a configuration writes them down."""

from types import SimpleNamespace

import pytest
import torch
import transformers as hf

from iclgd_lens.models.lengths import RopeSwitch, context_window, lengths_of_change, rope_switches, text_config, windows

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def phi3(**changes):
    return hf.Phi3Config(**{**SIZES, "pad_token_id": 0, **changes})


def with_vision(text):
    return hf.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)


def gpt_neo(*kinds):
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_layers": len(kinds), "num_heads": 4}
    return hf.GPTNeoConfig(**sizes, attention_types=[[list(kinds), 1]], window_size=6, max_position_embeddings=64)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (hf.LlamaConfig(**SIZES), ()),
        (hf.MistralConfig(**SIZES, sliding_window=5), (5,)),
        (hf.MistralConfig(**SIZES, sliding_window=None), ()),
        (hf.MistralConfig(**SIZES, sliding_window=4096), (4096,)),
        (hf.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1), (5,)),
        (hf.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=3), ()),
        (hf.Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=5, max_window_layers=1), ()),
        (hf.Qwen2Config(**SIZES, use_sliding_window=True, **MIXED), (5,)),
        (hf.Qwen3MoeConfig(**SIZES, use_sliding_window=False, sliding_window=5, num_local_experts=4), ()),
        (hf.MixtralConfig(**SIZES, sliding_window=None, num_local_experts=4), ()),
        (hf.Gemma2Config(**SIZES, sliding_window=5), (5,)),
        (hf.Gemma3TextConfig(**SIZES, **MIXED), (5,)),
        (with_vision(hf.Gemma3TextConfig(**SIZES, **MIXED)), (5,)),
        (hf.Cohere2Config(**SIZES, **{**MIXED, "layer_types": ["full_attention"] * 3}), ()),
        (hf.Llama4TextConfig(**SIZES, attention_chunk_size=8, no_rope_layers=[1, 0, 1]), (8,)),
        (hf.Llama4TextConfig(**SIZES, attention_chunk_size=8, layer_types=["full_attention"] * 3), ()),
        (hf.ModernBertDecoderConfig(**SIZES, local_attention=6, global_attn_every_n_layers=2), (3,)),
        (hf.Starcoder2Config(**SIZES, sliding_window=7), (7,)),
        (hf.GptOssConfig(**SIZES, **MIXED, num_local_experts=4), (5,)),
        (phi3(sliding_window=9), (9,)),
        (gpt_neo("global", "local"), (6,)),
        (gpt_neo("global", "global"), ()),
        (hf.Gemma3TextConfig(**SIZES, **MIXED, per_layer_config={0: {"sliding_window": 7}}), (5, 7)),
        (SimpleNamespace(sliding_window=[4, None, 9]), (4, 9)),
        (SimpleNamespace(sliding_window=-1), ()),
        (SimpleNamespace(window_size=3, use_sliding_window=True), (3,)),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, tuple) else str(value),
)
def test_windows_are_those_that_some_layer_has(config, expected):
    assert windows(config) == expected


def test_the_windows_are_those_that_hugging_face_masks_by():
    """A token changes the last position's logits in one layer exactly where a window of this length reaches it."""
    config = hf.ModernBertDecoderConfig(
        **{**SIZES, "num_hidden_layers": 1},
        intermediate_size=48,
        local_attention=6,
        layer_types=["sliding_attention"],
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model, tokens = hf.ModernBertDecoderForCausalLM(config).eval(), torch.arange(1, 11)[None]
    reached = []
    for back in range(10):
        other = tokens.clone()
        other[0, -1 - back] = 30
        with torch.no_grad():
            reached.append(not torch.equal(model(tokens).logits[0, -1], model(other).logits[0, -1]))
    assert (sum(reached),) == windows(config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (hf.LlamaConfig(**SIZES), ()),
        (hf.LlamaConfig(**SIZES, rope_parameters=YARN), ()),
        (hf.LlamaConfig(**SIZES, rope_scaling={"type": "linear", "factor": 2.0}), ()),
        (hf.LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 4.0}), (RopeSwitch("dynamic", 64),)),
        (hf.LlamaConfig(**SIZES, rope_scaling={"type": "dynamic", "factor": 4.0}), (RopeSwitch("dynamic", 64),)),
        (phi3(original_max_position_embeddings=16, rope_parameters=LONGROPE), (RopeSwitch("longrope", 16),)),
        (phi3(original_max_position_embeddings=16, rope_scaling={**LONGROPE, "type": "su"}), (RopeSwitch("longrope", 16),)),
        (SimpleNamespace(rope_scaling={"type": "su", "original_max_position_embeddings": 16}), (RopeSwitch("longrope", 16),)),
        (SimpleNamespace(rope_scaling={"type": "su"}, max_position_embeddings=32), (RopeSwitch("longrope", 32),)),
        (
            SimpleNamespace(
                rope_parameters={
                    "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 16},
                    "sliding_attention": {"rope_type": "default"},
                    "other": None,
                }
            ),
            (RopeSwitch("longrope", 16),),
        ),
        (
            with_vision(
                hf.Gemma3TextConfig(
                    **SIZES,
                    **MIXED,
                    rope_parameters={
                        "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
                        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    },
                )
            ),
            (RopeSwitch("dynamic", 64),),
        ),
    ],
)
def test_rotary_frequencies_that_depend_on_the_length_of_a_run_are_found(config, expected):
    assert rope_switches(config) == expected


def test_the_two_scales_of_phi_moe_are_a_switch_whatever_its_frequencies():
    rope = {**YARN, "short_mscale": 1.0, "long_mscale": 1.2}
    assert rope_switches(SimpleNamespace(rope_parameters=rope)) == (RopeSwitch("longrope", 16),)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (hf.LlamaConfig(**SIZES), ()),
        (hf.MistralConfig(**SIZES, sliding_window=63), (63,)),
        (hf.MistralConfig(**SIZES, sliding_window=64), ()),
        (phi3(sliding_window=9, original_max_position_embeddings=16, rope_parameters=LONGROPE), (9, 16)),
        (hf.LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 4.0}), ()),
        (hf.Llama4TextConfig(**SIZES, attention_chunk_size=8, floor_scale=20), (8, 20)),
        (hf.Ministral3Config(**SIZES, rope_parameters={**YARN, "llama_4_scaling_beta": 0.1}), (16,)),
        (SimpleNamespace(window_size=3), (3,)),
    ],
)
def test_lengths_of_change_are_those_that_a_prompt_can_pass(config, expected):
    assert lengths_of_change(config) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (hf.LlamaConfig(**SIZES), 64),
        (hf.GPT2Config(n_positions=96), 96),
        (with_vision(hf.Gemma3TextConfig(**SIZES)), 64),
        (hf.MptConfig(max_seq_len=32), 32),
        (hf.BloomConfig(), None),
    ],
)
def test_the_context_window_is_what_the_configuration_says(config, expected):
    assert context_window(config) == expected


def test_a_configuration_of_several_languages_is_read_itself():
    config = hf.MusicgenConfig(text_encoder=hf.T5Config(), audio_encoder=hf.EncodecConfig(), decoder=hf.MusicgenDecoderConfig())
    assert text_config(config) is config
