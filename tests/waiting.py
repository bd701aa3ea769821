"""What makes a program wait for a GPU: operations that hand a value of a tensor to Python."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "is_nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}


class Waits(TorchDispatchMode):
    """Counts, within a `with` block, operations that need the value of a tensor in order to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in _WAITING
        return func(*args, **(kwargs or {}))


def waits(work: Any) -> int:
    """How often some work waits."""
    with Waits() as found:
        work()
    return found.count
