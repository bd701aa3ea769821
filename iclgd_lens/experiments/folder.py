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

from iclgd_lens.experiments.comparison import COLUMNS, PARTS
from iclgd_lens.experiments.results import EPISODE
from iclgd_lens.files import write_frame, write_text
from iclgd_lens.models.fingerprint import fingerprint
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.models.quantisation import quantisation_of

PACKAGES = ("iclgd-lens", "transformer-lens", "torch", "transformers", "tokenizers", "datasets", "numpy")
SHAPE = ("n_layers", "n_heads", "d_model", "d_head", "n_ctx", "d_vocab", "normalization_type", "positional_embedding_type")

FRAMES = (*PARTS, "rates", "searched", "curve")
"""The frames of a run of a protocol; other runs have those of a comparison alone."""

SETTING = "setting.json"
"""The file of the setting. It is written when all is done, so that the folder of a run that was stopped has none."""

EXAMPLE = "attention.json"
"""The file of the run's example of attention."""

REPORT = "report.html"

_ABOUT_MODEL = {"name", "fingerprint", "dtype", "device", *SHAPE}
_ABOUT_ROWS = {*EPISODE, "order", "n_queries", "model"}


@dataclass(frozen=True, eq=False)
class RunFolder:
    """A run as its folder holds it.

    Attributes:
        path: The folder.
        frames: Its frames by name, as `write_frames` wrote them: those of a comparison, and of a protocol where it was one.
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
            ValueError: If a file in it is damaged, or of another version.
        """
        path = Path(path)
        if not (path / SETTING).is_file() or not (path / "frame.parquet").is_file():
            raise FileNotFoundError(
                f"{path} is not the folder of a finished run: it needs {SETTING} and frame.parquet, which iclgd demo, kernels and "
                "reproduce write"
            )
        setting = _read_setting(path / SETTING)
        names = FRAMES if "protocol" in setting else PARTS
        return cls(path, {name: _read_frame(path / f"{name}.parquet", name) for name in names}, setting)


def other_version(file: Path, what: str) -> ValueError:
    """The error for a file that this version cannot have written."""
    return ValueError(f"{file} {what}: it is damaged, or another version wrote it; run its command again")


def begin_run(folder: Path) -> None:
    """Take from a folder what says that a run in it is done."""
    for name in (SETTING, EXAMPLE, REPORT):
        (folder / name).unlink(missing_ok=True)


def write_frames(folder: Path, frames: Mapping[str, pd.DataFrame]) -> None:
    """Write frames as parquet files of their names."""
    for name, frame in frames.items():
        write_frame(frame, folder / f"{name}.parquet")


def write_setting(folder: Path, model: HookedModel, name: str, run: Mapping[str, Any]) -> None:
    """Write the model's name, shape, fingerprint and quantisation, what was run, and versions, as JSON.

    Args:
        folder: The folder of the run.
        model: The model.
        name: What it is called.
        run: The `command` and everything that was set, defaults filled in.
    """
    setting = {
        "model": {
            "name": name,
            "class": type(model).__name__,
            "fingerprint": fingerprint(model),
            "dtype": str(model.cfg.dtype).removeprefix("torch."),
            "device": str(model.cfg.device),
            "quantisation": quantisation_of(model),
            **{key: getattr(model.cfg, key) for key in SHAPE},
        },
        **run,
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
    }
    write_text(folder / SETTING, json.dumps(setting, indent=2) + "\n")


def _read_setting(file: Path) -> Mapping[str, Any]:
    try:
        setting = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise other_version(file, f"is not JSON ({error})") from None
    model = setting.get("model") if isinstance(setting, dict) else None
    if not isinstance(model, dict) or not set(model) >= _ABOUT_MODEL or "command" not in setting:
        raise other_version(file, "does not say which command was run on which model")
    return setting


def _read_frame(file: Path, name: str) -> pd.DataFrame:
    if not file.is_file():
        raise other_version(file, "is missing")
    try:
        frame = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise other_version(file, f"is not a frame ({error})") from None
    if missing := sorted({*_ABOUT_ROWS, *COLUMNS[name]} - set(frame)) if name in PARTS else []:
        raise other_version(file, f"has no column {missing[0]!r}")
    if name == "frame" and frame.empty:
        raise other_version(file, "has no rows")
    return frame
