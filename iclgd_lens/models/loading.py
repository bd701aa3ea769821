"""Loading models by name or from a folder, with the defaults that comparing with gradient descent needs."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformer_lens import HookedTransformer, loading_from_pretrained
from transformer_lens.loading_from_pretrained import make_model_alias_map
from transformers import AutoModelForCausalLM, AutoTokenizer

from iclgd_lens import hub
from iclgd_lens.models.bundled.learner import load_bundled


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
    """Convert a Hugging Face model in a folder, as TransformerLens converts those it knows by name."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ValueError(f"the folder {folder} holds no Hugging Face model: there is no config.json")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    architecture = (config.get("architectures") or ["none named"])[0]
    if "n_positions" in config:
        # TransformerLens reads GPT-2's window under an older name, which newer files leave out.
        config.setdefault("n_ctx", config["n_positions"])
    try:
        hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"the folder {folder} does not hold a whole model and tokenizer: {error}") from error
    # TransformerLens takes the architecture from a name before it looks at the configuration; this name says nothing.
    with TemporaryDirectory() as neutral:
        (Path(neutral) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            cfg = loading_from_pretrained.get_pretrained_model_config(
                neutral, hf_cfg=hf_model.config.to_dict(), fold_ln=process_weights, device=device, dtype=dtype
            )
            state = loading_from_pretrained.get_pretrained_state_dict(neutral, cfg, hf_model, dtype=dtype)
        except (NotImplementedError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(
                f"TransformerLens cannot convert the model in {folder} (architecture {architecture}): {error}"
            ) from error
    cfg.model_name, cfg.tokenizer_name = folder.name, str(folder)
    model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    model.load_and_process_state_dict(
        state, **dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), process_weights)
    )
    model.move_model_modules_to_device()
    return model.eval()


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
