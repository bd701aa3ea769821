"""A tiny Llama as a GGUF file, and the same model with the weights that the file's blocks stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tokenizers_zoo import VOCABULARY, gpt2_backend

HEADS, KV_HEADS, LAYERS = 4, 2, 2


def write_gguf(file: Path, kind: str = "Q8_0") -> Any:
    """Write a Llama with weights of the projections stored as `kind`, and return the Hugging Face model of what is stored."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=96,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = LlamaForCausalLM(config).eval()
    writer = GGUFWriter(file, "llama")
    _write_settings(writer, config)
    _write_tokenizer(writer)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = (parameter.ndim == 1) + 0.2 * torch.randn(parameter.shape, generator=generator)
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        stored = values if heads is None else _interleaved(values, heads)
        type_ = GGMLQuantizationType[kind] if parameter.ndim > 1 and "layers" in name else GGMLQuantizationType.F32
        blocks = gguf.quantize(stored.numpy(), type_)
        writer.add_tensor(_name(name), blocks, raw_dtype=type_)
        read = torch.from_numpy(np.array(gguf.dequantize(blocks, type_)).reshape(stored.shape))
        with torch.no_grad():
            parameter.copy_(read if heads is None else _in_halves(read, heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _write_settings(writer: GGUFWriter, config: LlamaConfig) -> None:
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)


def _write_tokenizer(writer: GGUFWriter) -> None:
    backend = json.loads(gpt2_backend())["model"]
    words = sorted(backend["vocab"], key=backend["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word == "<|endoftext|>" else 1 for word in words])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in backend["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def _interleaved(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries and keys as the files of Llama have them: the two that rotate together stand side by side."""
    return values.view(heads, 2, -1, values.shape[1]).transpose(1, 2).reshape(values.shape).contiguous()


def _in_halves(values: torch.Tensor, heads: int) -> torch.Tensor:
    return values.view(heads, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)


def _name(name: str) -> str:
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
    }
    for theirs, ours in parts.items():
        name = name.replace(theirs, ours)
    return name
