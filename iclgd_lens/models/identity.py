"""Which model a name stands for: a folder, a GGUF file, or a repository on the hub; and a digest of its weights, unloaded."""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path

import huggingface_hub
from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

from iclgd_lens import hub
from iclgd_lens.models.bundled.learner import NAME, WEIGHTS

PICKLED_BY_TRANSFORMER_LENS = ("NeelNanda/", "ArthurConmy/", "Baidicoot/")
"""Whose models TransformerLens keeps as pickles on the hub, and unpickles without a check."""

_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".onnx")
"""How the names of files with weights end."""

_BLOCK = 65_536
_BLOCKS = 64
"""How much of a large file is read: so many blocks, spread all over it."""


def hub_name(name: str) -> str:
    """What the hub calls a model that TransformerLens has a name for; other names are their own."""
    return _aliases().get(name.lower(), name)


def known_to_transformer_lens(name: str) -> bool:
    """Whether TransformerLens has a name for a model."""
    return name.lower() in _aliases()


def model_path(name: str | Path) -> Path | None:
    """The folder or file that a name stands for, with `~` expanded; None where it is a name of the hub or of TransformerLens.

    Raises:
        ValueError: If it is written as a path, and there is no such folder or file.
    """
    path = _expanded(name)
    if path.is_dir() or path.is_file():
        return path
    if isinstance(name, Path) or _looks_like_a_path(name, path):
        raise ValueError(f"there is no folder or file {str(name)!r}{_nearest(path)}")
    return None


def shown_name(name: str) -> str:
    """What a model is called in results: its name; or its folder's, or its file's without the ending, without the path."""
    path = _expanded(name)
    if name != NAME and path.is_dir():
        return path.name or path.resolve().name
    return path.stem if path.is_file() else name


def require_model(name: str) -> None:
    """Check that a name may be a model's, without fetching it.

    Raises:
        ValueError: If it is neither `"bundled"`, a folder, a GGUF file, a name that TransformerLens knows nor one that the hub
            might know; or if its weights are a pickle.
    """
    if name == NAME:
        return
    path = model_path(name)
    if path is not None:
        if path.is_file() and path.suffix == ".safetensors":
            raise ValueError(
                f"{path} holds weights alone; give the folder that holds it with config.json and the tokenizer: "
                f"{path.absolute().parent}"
            )
        if path.is_file() and path.suffix != ".gguf":
            raise ValueError(f"{path} is neither a folder with a Hugging Face model nor a .gguf file")
        return
    if hub_name(name).startswith(PICKLED_BY_TRANSFORMER_LENS):
        raise ValueError(
            f"the weights of {name!r} ({hub_name(name)} on the hub) are a pickle, and reading one runs whatever code it holds. "
            f"Where you trust it, load it yourself, HookedTransformer.from_pretrained_no_processing({name!r}), and use that model"
        )
    if "/" in name or known_to_transformer_lens(name):
        return
    close = difflib.get_close_matches(name, [NAME, *_aliases()], n=3)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    raise ValueError(
        f"unknown model {name!r}{hint} It may be 'bundled', a folder with a Hugging Face model, a .gguf file, or a name that "
        "TransformerLens knows"
    )


def model_digest(name: str) -> str:
    """Tell the weights that a name stands for from others, in 16 hex digits.

    Of the bundled learner it is a digest of its file, and so it is of a GGUF file. Of a folder it is one of the names and sizes of
    the files in it and of their content, of which large files are read at 64 places. Of a model on the hub it is its revision: a
    commit there says what all files hold.

    Raises:
        ValueError: If there is no such model, as in `load_model`.
        OSError: If the hub cannot be reached and its cache does not hold the model.
    """
    require_model(name)
    if name == NAME:
        return _files_digest([WEIGHTS])
    path = model_path(name)
    if path is None:
        return _revision(hub_name(name))
    return _files_digest([path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file()))


def _aliases() -> dict[str, str]:
    """The hub's names of models by the names that TransformerLens knows them by."""
    named = {name.lower(): name for name in OFFICIAL_MODEL_NAMES}
    return named | {alias.lower(): name for name, found in MODEL_ALIASES.items() for alias in found}


def _expanded(name: str | Path) -> Path:
    """A name as a path, whose `~` is the user's home where there is one."""
    path = Path(name)
    try:
        return path.expanduser()
    except RuntimeError:  # there is no such user
        return path


def _looks_like_a_path(name: str, path: Path) -> bool:
    """Whether a name that is no folder or file was meant as one: the hub's names have one slash at most, and begin otherwise."""
    if name.startswith((".", "/", "~")) or "\\" in name or path.is_absolute():
        return True
    if name.endswith(("/", *_FILES)) or name.count("/") > 1:
        return True
    return "/" in name and path.parent.is_dir()


def _nearest(path: Path) -> str:
    """The models that stand where a path that is not there would have been."""
    if not path.parent.is_dir():
        return f", nor a folder {str(path.parent)!r}"
    there = [each.name for each in path.parent.iterdir() if each.is_dir() or each.suffix == ".gguf"]
    close = difflib.get_close_matches(path.name, there, n=1)
    return f"; did you mean {str(path.parent / close[0])!r}?" if close else ""


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
