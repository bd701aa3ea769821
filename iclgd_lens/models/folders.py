"""Reading a Hugging Face model and its tokenizer from a folder or a GGUF file, without running or unpickling anything in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from iclgd_lens.models.quantisation import gguf_quantisation, quantisation_in

SAFE: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
"""How Hugging Face models are read: weights are never unpickled, and code beside them never run, nor anybody asked whether to."""


class Found(NamedTuple):
    """What a folder or a file held.

    Attributes:
        hf_model: The model, in evaluation mode and with eager attention, on the CPU.
        tokenizer: Its tokenizer.
        quantisation: How its weights were stored, as `quantisation_of` returns it.
        what: What a message calls the model.
    """

    hf_model: Any
    tokenizer: Any
    quantisation: dict[str, Any] | None
    what: str


def read_model(path: Path, dtype: torch.dtype) -> Found:
    """Read a model from a folder that Hugging Face's `save_pretrained` wrote, or else from a GGUF file.

    Args:
        path: The folder or file.
        dtype: The dtype of the weights. Those of a GGUF file are dequantised.

    Raises:
        ValueError: If the folder or file does not hold a whole model and its tokenizer, or its weights are a pickle.
        ImportError: If a GGUF file is given, and the package `gguf` is not installed.
    """
    return _read_folder(path, dtype) if path.is_dir() else _read_gguf(path, dtype)


def _read_folder(folder: Path, dtype: torch.dtype) -> Found:
    if not (folder / "config.json").is_file():
        raise ValueError(f"the folder {folder} holds no Hugging Face model: there is no config.json{_others(folder)}")
    _refuse_pickles(folder)
    hf_model, tokenizer = _read(folder, dtype, f"the folder {folder}", **SAFE)
    return Found(hf_model, tokenizer, quantisation_in(hf_model.config), f"the model in {folder}")


def _read_gguf(file: Path, dtype: torch.dtype) -> Found:
    if find_spec("gguf") is None:
        raise ImportError(
            f"reading {file} needs the package gguf, which is not installed; install it with pip install 'iclgd-lens[gguf]'"
        )
    # Newer versions of transformers keep weights in their blocks where they can, unless told otherwise.
    config = getattr(transformers, "GgufConfig", None)
    dense = {} if config is None else {"quantization_config": config(dequantize=True)}
    hf_model, tokenizer = _read(file.parent, dtype, f"the file {file}", file=file.name, **dense)
    return Found(hf_model, tokenizer, gguf_quantisation(file), f"the model in {file}")


def _read(folder: Path, dtype: torch.dtype, where: str, *, file: str | None = None, **options: Any) -> tuple[Any, Any]:
    """A model and its tokenizer, both whole."""
    part = {} if file is None else {"gguf_file": file}
    try:
        with _quiet():
            read: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                attn_implementation="eager",
                **part,
                **options,
            )
            hf_model, loaded = read
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **part)
    except Exception as error:  # of any of the libraries that read the files
        raise ValueError(f"{where} does not hold a whole model and tokenizer: {error}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"the weights in {folder if file is None else where} lack {len(missing)} tensors, {missing[0]} among them")
    if not tokenizer.encode("Label", add_special_tokens=False):
        raise ValueError(f"{where} holds no tokenizer that knows words; save the model's tokenizer there")
    return hf_model.eval(), tokenizer


def _others(folder: Path) -> str:
    """What a folder without a configuration may have been meant for."""
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if files:
        return f"; to load the GGUF file in it, give its path: {folder / files[0]}"
    if (folder / "adapter_config.json").is_file():
        return "; it holds an adapter, which load_model(hf_model=) takes in place in its model"
    return ""


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(file.name for suffix in ("bin", "pt", "pth") for file in folder.glob(f"*.{suffix}"))
    # Training leaves pickles of its arguments beside weights that are none.
    if pickles and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"the weights in {folder} are a pickle ({pickles[0]}), and reading one may run whatever code it holds. Where you trust "
            "it, write them as safetensors: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars, of which GGUF's reader has its own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
