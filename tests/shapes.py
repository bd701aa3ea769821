"""What annotations say of arrays, their shapes and dtypes, checked at run time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray, config, install_import_hook

PACKAGE = Path(__file__).parents[1] / "iclgd_lens"


def check_shapes() -> None:
    """Check them from now on, in all modules of the package that have such annotations; none of them may have been imported."""
    files = [file for file in sorted(PACKAGE.rglob("*.py")) if "from jaxtyping import" in file.read_text(encoding="utf-8")]
    modules = [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in files]
    install_import_hook(modules, "tests.shapes.checking_arrays")


@contextmanager
def unchecked() -> Iterator[None]:
    """Check nothing within a `with` block: what the package is given is wrong on purpose, and it is to say so itself."""
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", False)


def checking_arrays(function: Any) -> Any:
    """Check what a function is given and gives back, as far as it is arrays; the rest is for the type checker.

    What is checked is a stand-in that does nothing. Functions within functions have a new one at every call of the outer one, and
    all of them are the same.
    """
    hints = {name: hint if _holds_arrays(hint) else Any for name, hint in function.__annotations__.items()}
    key = (function.__module__, function.__qualname__, repr(hints))
    if key not in _CHECKING:
        function.__annotations__ = hints
        _CHECKING[key] = beartype(function)
    return _CHECKING[key]


_CHECKING: dict[tuple[str, str, str], Any] = {}


def _holds_arrays(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(map(_holds_arrays, get_args(hint)))
