"""What is compared: the methods that make updates, and the controls that stand in an update's place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from iclgd_lens.checks import require_some_of
from iclgd_lens.updates.dual import ParameterUpdate
from iclgd_lens.updates.gradient import gd, lcgd

Method = Literal["gd", "lcgd"]
METHODS: dict[str, Callable[..., ParameterUpdate]] = {"gd": gd, "lcgd": lcgd}

Control = Literal["random", "random_weights", "shuffled_labels", "permuted", "other_task"]
"""What may stand in the place of the true update, while in-context learning keeps the true demonstrations:

- `"random"`: its effect on every vector is replaced by one in a random direction, of the same size (Dai et al. 2023);
- `"random_weights"`: ΔW and Δb are random, of the same norm in every layer;
- `"shuffled_labels"`: it is made on demonstrations whose labels were dealt out anew;
- `"permuted"`: on the same demonstrations in another order;
- `"other_task"`: on demonstrations of another task.

A control that has nothing to change (one demonstration to permute, labels that are all alike) has no rows.
"""
CONTROLS: tuple[Control, ...] = get_args(Control)


def require_methods(methods: Sequence[str]) -> None:
    """Check that there are methods, and that they are known.

    Raises:
        ValueError: If there are none, or one is unknown.
    """
    require_some_of("methods", methods, tuple(METHODS))
    if not methods:
        raise ValueError(f"methods must be some of {', '.join(METHODS)}; got none")
