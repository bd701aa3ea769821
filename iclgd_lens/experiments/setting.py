"""The setting of a run, written beside its results: what is needed to run it again."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from transformer_lens import HookedTransformer

from iclgd_lens.experiments.protocol import Protocol
from iclgd_lens.files import write_text
from iclgd_lens.models.fingerprint import fingerprint

PACKAGES = ("iclgd-lens", "transformer-lens", "torch", "transformers", "tokenizers", "datasets", "numpy")


def write_setting(
    path: Path, model: HookedTransformer, name: str, protocol: Protocol, more: Mapping[str, str | int | None] | None = None
) -> None:
    """Write the model's name, shape and fingerprint, the protocol with its defaults filled in, whatever more was set, and versions,
    as JSON.
    """
    shape = ("n_layers", "n_heads", "d_model", "d_head", "n_ctx", "d_vocab", "normalization_type", "positional_embedding_type")
    setting = {
        "model": {
            "name": name,
            "fingerprint": fingerprint(model),
            "dtype": str(model.cfg.dtype).removeprefix("torch."),
            "device": str(model.cfg.device),
            **{key: getattr(model.cfg, key) for key in shape},
        },
        **(more or {}),
        "protocol": asdict(protocol),
        "plans": {task: asdict(protocol.plan(task)) for task in protocol.tasks},
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
    }
    write_text(path, json.dumps(setting, indent=2) + "\n")
