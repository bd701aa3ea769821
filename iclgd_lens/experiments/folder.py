"""The folder of a run: its frames, and the setting that is needed to run it again."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from transformer_lens import HookedTransformer

from iclgd_lens.experiments.results import write_frame
from iclgd_lens.files import write_text
from iclgd_lens.models.fingerprint import fingerprint

PACKAGES = ("iclgd-lens", "transformer-lens", "torch", "transformers", "tokenizers", "datasets", "numpy")
SHAPE = ("n_layers", "n_heads", "d_model", "d_head", "n_ctx", "d_vocab", "normalization_type", "positional_embedding_type")
SETTING = "setting.json"
"""The file of the setting. It is written when all is done, so that the folder of a run that was stopped has none."""


@dataclass(frozen=True, eq=False)
class RunFolder:
    """A run as its folder holds it.

    Attributes:
        path: The folder.
        frames: Its frames by name, as `write_frames` wrote them.
        setting: What `write_setting` wrote.
    """

    path: Path
    frames: Mapping[str, pd.DataFrame]
    setting: Mapping[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> RunFolder:
        """Read the folder of a run that is done.

        Raises:
            FileNotFoundError: If it is not one.
        """
        path = Path(path)
        if not (path / SETTING).is_file() or not (path / "frame.parquet").is_file():
            raise FileNotFoundError(
                f"{path} is not the folder of a finished run: it needs {SETTING} and frame.parquet, which iclgd demo, kernels and "
                "reproduce write"
            )
        frames = {file.stem: pd.read_parquet(file) for file in sorted(path.glob("*.parquet"))}
        return cls(path, frames, json.loads((path / SETTING).read_text(encoding="utf-8")))


def write_frames(folder: Path, frames: Mapping[str, pd.DataFrame]) -> None:
    """Write frames as parquet files of their names."""
    for name, frame in frames.items():
        write_frame(frame, folder / f"{name}.parquet")


def write_setting(folder: Path, model: HookedTransformer, name: str, run: Mapping[str, Any]) -> None:
    """Write the model's name, shape and fingerprint, what was run, and versions, as JSON.

    Args:
        folder: The folder of the run.
        model: The model.
        name: What it is called.
        run: The `command` and everything that was set, defaults filled in.
    """
    setting = {
        "model": {
            "name": name,
            "fingerprint": fingerprint(model),
            "dtype": str(model.cfg.dtype).removeprefix("torch."),
            "device": str(model.cfg.device),
            **{key: getattr(model.cfg, key) for key in SHAPE},
        },
        **run,
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
    }
    write_text(folder / SETTING, json.dumps(setting, indent=2) + "\n")
