"""Which weights a name stands for, found without loading them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import huggingface_hub

from iclgd_lens import hub
from iclgd_lens.models.bundled.learner import WEIGHTS
from iclgd_lens.models.loading import hub_name, require_model

_BLOCK = 65_536
_BLOCKS = 64
"""How much of a large file is read: so many blocks, spread all over it."""


def model_digest(name: str) -> str:
    """Tell the weights that a name stands for from others, in 16 hex digits.

    Of the bundled learner it is a digest of its file. Of a folder it is one of the names and sizes of the files in it and of their
    content, of which large files are read at 64 places. Of a model on the hub it is its revision: a commit there says what all
    files hold.

    Raises:
        ValueError: If there is no such model, as in `load_model`.
        OSError: If the hub cannot be reached and its cache does not hold the model.
    """
    require_model(name)
    if name == "bundled":
        return _files_digest([WEIGHTS])
    if Path(name).is_dir():
        return _files_digest(sorted(path for path in Path(name).iterdir() if path.is_file()))
    return _revision(hub_name(name))


def _files_digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}/{size}/".encode())
        with file.open("rb") as content:
            if size <= _BLOCK * _BLOCKS:
                digest.update(content.read())
                continue
            for block in range(_BLOCKS):
                content.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(content.read(_BLOCK))
    return digest.hexdigest()[:16]


def _revision(repository: str) -> str:
    """The commit of a repository, asked of the hub, or found in its cache."""
    with hub.asked(f"the revision of {repository!r}", "give the path of a folder that holds the model, or use 'bundled'."):
        try:
            commit = huggingface_hub.model_info(repository, timeout=10).sha
        except Exception:
            cached = huggingface_hub.try_to_load_from_cache(repository, "config.json")
            if not isinstance(cached, str):
                raise
            # .../snapshots/COMMIT/config.json
            commit = Path(cached).parent.name
    return str(commit)[:16]
