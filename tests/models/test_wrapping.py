"""What cannot be hooked is refused with the reason and the way out."""

import accelerate
import peft
import pytest
import torch
import transformers as hf
from torch import nn

from iclgd_lens.models.loading import load_model
from tests.hf_zoo import make_hf_model
from tests.models_zoo import D_VOCAB


def llama():
    return make_hf_model("llama")


def adapted():
    return peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False))


@pytest.mark.parametrize(
    ("wrapped", "message"),
    [
        (lambda: nn.DataParallel(llama()), r"got DataParallel.*give hf_model\.module instead"),
        (lambda: torch.compile(llama()), r"got OptimizedModule, of torch\.compile: give hf_model\._orig_mod instead"),
        (adapted, r"got PeftModel.*give hf_model\.base_model\.model instead.*hf_model\.merge_and_unload\(\)"),
        (lambda: load_model(hf_model=llama()), "hf_model is a TransformerBridge, a hooked model already; use it as it is"),
        (lambda: load_model("bundled"), "a hooked model already; use it as it is"),
        (lambda: 3, r"a transformers\.PreTrainedModel; got int$"),
    ],
    ids=["parallel", "compiled", "adapted", "bridge", "bundled", "no model"],
)
def test_what_is_around_a_model_names_the_way_to_it(wrapped, message):
    with pytest.raises(ValueError, match=message):
        load_model(hf_model=wrapped())


def test_the_ways_out_lead_to_models_that_load():
    compiled, parallel, lora, tokens = torch.compile(llama()), nn.DataParallel(llama()), adapted(), torch.arange(20)[None]
    with torch.no_grad():
        with_adapters = lora(tokens).logits
        for model in (compiled._orig_mod, parallel.module):
            assert torch.allclose(load_model(hf_model=model)(tokens), llama()(tokens).logits, atol=1e-5)
        assert not torch.allclose(with_adapters, llama()(tokens).logits, atol=1e-2)
        assert torch.allclose(load_model(hf_model=lora.base_model.model)(tokens), with_adapters, atol=1e-5)


def test_weights_that_are_off_loaded_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not all in memory: model\.embed_tokens\.weight is off-loaded.*without device_map"):
        load_model(hf_model=accelerate.cpu_offload(llama(), execution_device="cpu"))
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    split = accelerate.dispatch_model(llama(), places, offload_dir=str(tmp_path), force_hooks=True, main_device="cpu")
    for backend in ("bridge", "hooked"):
        with pytest.raises(ValueError, match=r"not all in memory: model\.layers\.1\.\S* is off-loaded"):
            load_model(hf_model=split, backend=backend)


def test_a_model_dispatched_to_one_device_loads():
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        model = load_model(hf_model=accelerate.dispatch_model(llama(), {"": "cpu"}))
        assert torch.allclose(model(tokens), llama()(tokens).logits, atol=1e-5)


def test_inference_tensors_are_refused():
    with torch.inference_mode():
        model = llama()
    with pytest.raises(ValueError, match=r"made within torch\.inference_mode\(\): \S+ is an inference tensor"):
        load_model(hf_model=model)


def test_attention_that_is_chosen_when_a_model_is_made_says_so_and_what_to_do():
    sizes = {"vocab_size": D_VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False}
    with pytest.raises(
        ValueError, match=r"takes its attention when it is made.*Make the model anew with attn_implementation='eager'"
    ):
        load_model(hf_model=hf.FalconForCausalLM(hf.FalconConfig(**sizes)))
    load_model(hf_model=hf.FalconForCausalLM(hf.FalconConfig(**sizes, attn_implementation="eager")))


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_is_converted_keeps_its_mode_and_its_attention(training):
    model = llama().train(training)
    model.set_attn_implementation("sdpa")
    load_model(hf_model=model, backend="hooked")
    assert (model.training, model.config._attn_implementation) == (training, "sdpa")
