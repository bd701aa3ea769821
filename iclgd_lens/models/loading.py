"""Loading models by name or from a folder, with the defaults that comparing with gradient descent needs."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformer_lens import HookedTransformer, loading_from_pretrained
from transformer_lens.loading_from_pretrained import make_model_alias_map
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from iclgd_lens import hub
from iclgd_lens.models.bundled.learner import load_bundled

SAME_OUTPUTS = {64: 1e-5, 32: 1e-4, 16: 0.05}
"""How much log-probabilities may differ between a model and its conversion, relative to the largest, by the bits of its dtype."""


def load_model(
    name: str | Path = "bundled",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    process_weights: bool = False,
) -> HookedTransformer:
    """Load a hooked model, by default with its weights as they were trained.

    Weight processing (folding layer norms, centring) leaves a model's outputs as they are but changes what a gradient step
    does; `gd` and `lcgd` warn of it.

    Args:
        name: `"bundled"` for the small in-context learner that ships with the package, the path of a folder that holds a Hugging
            Face model and its tokenizer, or any model name that TransformerLens knows; those are fetched from the hub.
        device: A torch device; by default CUDA where there is one, else the CPU.
        dtype: The dtype of the weights.
        process_weights: Fold and centre the weights, as `HookedTransformer.from_pretrained` does by default.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If torch has no such device here, TransformerLens knows no such model, or the folder holds none that it can
            convert.
        OSError: If the hub cannot be reached and its cache does not hold the model.
    """
    place = parse_device(device)
    if name == "bundled":
        model = load_bundled(device=place, dtype=dtype)
        if process_weights:
            model.process_weights_()
        return model
    if Path(name).is_dir():
        return _load_folder(Path(name), place, dtype, process_weights)
    known = make_model_alias_map()
    if str(name).lower() not in known:
        close = difflib.get_close_matches(str(name), ["bundled", *known], n=3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
        raise ValueError(
            f"unknown model {str(name)!r}{hint} It may be 'bundled', a folder with a Hugging Face model, or a name that "
            "TransformerLens knows"
        )
    load = HookedTransformer.from_pretrained if process_weights else HookedTransformer.from_pretrained_no_processing
    with hub.asked(f"the model {name!r}", "give the path of a folder that holds the model, or use 'bundled'."):
        return load(str(name), device=place, dtype=dtype).eval()


def _load_folder(folder: Path, device: str, dtype: torch.dtype, process_weights: bool) -> HookedTransformer:
    """Convert a Hugging Face model in a folder, as TransformerLens converts those it knows by name, and check what came out."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"the folder {folder} holds no Hugging Face model: there is no config.json")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with _no_progress_bar():
            read: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
        hf_model, loaded = read
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of any of the libraries that read the files
        raise ValueError(f"the folder {folder} does not hold a whole model and tokenizer: {error}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"the weights in {folder} lack {len(missing)} tensors, {missing[0]} among them")
    if not tokenizer.encode("Label", add_special_tokens=False):
        raise ValueError(f"the folder {folder} holds no tokenizer that knows words; save the model's tokenizer there")
    if "n_positions" in config:
        # TransformerLens reads GPT-2's window under an older name, which newer files leave out.
        config.setdefault("n_ctx", config["n_positions"])
    try:
        model = _convert(config, hf_model, tokenizer, device, dtype, process_weights)
    except Exception as error:  # whatever a converter for another shape of model stumbles over
        architecture = ", ".join(config.get("architectures") or ["none named"])
        raise ValueError(f"TransformerLens cannot convert the model in {folder} (architecture {architecture}): {error}") from error
    model.cfg.model_name, model.cfg.tokenizer_name = folder.name, str(folder)
    _require_same_outputs(model, hf_model.eval(), folder)
    return model.eval()


def _convert(
    config: dict[str, Any], hf_model: Any, tokenizer: Any, device: str, dtype: torch.dtype, process_weights: bool
) -> HookedTransformer:
    # TransformerLens takes the architecture from a name before it looks at the configuration; this folder's name says nothing.
    with TemporaryDirectory() as neutral:
        (Path(neutral) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        cfg = loading_from_pretrained.get_pretrained_model_config(
            neutral, hf_cfg=hf_model.config.to_dict(), fold_ln=process_weights, device=device, dtype=dtype
        )
        state = loading_from_pretrained.get_pretrained_state_dict(neutral, cfg, hf_model, dtype=dtype)
    model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    model.load_and_process_state_dict(
        state, **dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), process_weights)
    )
    model.move_model_modules_to_device()
    return model


def _require_same_outputs(model: HookedTransformer, hf_model: Any, folder: Path) -> None:
    """A configuration may say something that the conversion does not read, such as another base of rotary positions."""
    tokens = torch.arange(min(64, model.cfg.n_ctx, model.cfg.d_vocab))[None]
    with torch.no_grad():
        ours = model(tokens.to(model.cfg.device)).float().log_softmax(dim=-1).cpu()
        theirs = hf_model(tokens).logits.float().log_softmax(dim=-1)
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference < SAME_OUTPUTS[torch.finfo(model.cfg.dtype).bits]:
        raise ValueError(
            f"TransformerLens converts the model in {folder} to another one, with log-probabilities that are {difference:.1e} off; "
            "it does not read all of this configuration"
        )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def parse_device(device: str | torch.device | None) -> str:
    """Turn a device argument into a torch device name, the best one present for None.

    Raises:
        ValueError: If torch has no such device here, naming those it has.
    """
    present = ["cpu"]
    if torch.cuda.is_available():
        present += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        present.append("mps")
    if device is None:
        return "cuda" if "cuda" in present else "cpu"
    # torch's own name for the CPU may carry a number, which means nothing.
    wanted = "cpu" if str(device) == "cpu:0" else str(device)
    if wanted not in present:
        raise ValueError(f"device={str(device)!r} is not available; here there is {', '.join(present)}")
    return wanted
