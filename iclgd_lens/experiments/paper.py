"""What *In-context Learning and Gradient Descent Revisited* (Deutch et al., NAACL 2024) did and reports, as data.

Its model is a 24-layer GPT of 1.3 billion parameters with a context window of 2048 tokens. What it calls SimAOU in its result files
is SimAOU_norm here (Dai et al.'s metric); the averages in its text are of SimAOU without normalisation.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperTask:
    """One task of the paper.

    Attributes:
        lr: The learning rate of GD and LCGD.
        seeds: The seeds of the demonstrations.
        sim_aou_norm: Reported SimAOU_norm of GD and of LCGD, the mean over seeds.
        sim_am_delta: Reported SimAM_Δ of GD and of LCGD, the mean over seeds.
    """

    lr: float
    seeds: tuple[int, ...]
    sim_aou_norm: tuple[float, float]
    sim_am_delta: tuple[float, float]


PAPER: dict[str, PaperTask] = {
    "sst2": PaperTask(0.0005, (2, 3, 4), (0.111, 0.223), (0.150, 0.299)),
    "sst5": PaperTask(0.00016, (5, 6, 7), (0.092, 0.107), (0.308, 0.326)),
    "mr": PaperTask(0.003, (5, 6, 7), (0.216, 0.328), (0.139, 0.263)),
    "subj": PaperTask(0.003, (4, 5, 6), (0.177, 0.345), (0.254, 0.322)),
    "agnews": PaperTask(0.2, (3, 4, 5), (0.308, 0.327), (0.505, 0.432)),
    "cb": PaperTask(0.08, (3, 4, 5), (0.205, 0.344), (0.246, 0.382)),
}
"""The tasks of the paper, by the names that `load_task` knows."""

AVERAGES: dict[str, tuple[float, float]] = {"sim_aou": (0.102, 0.167), "sim_am_delta": (0.267, 0.336)}
"""Reported averages over tasks, of GD and of LCGD, by metric."""

GD_SIM_AOU_RANGE: dict[str, tuple[float, float]] = {"trained": (0.04, 0.17), "untrained": (0.07, 0.18)}
"""Reported range over tasks of GD's SimAOU, on the trained model and on untrained ones."""

ALPHA_RANGE = (0.1, 0.2)
"""Reported α, about."""


def reported(task: str, metric: str) -> tuple[float, float] | None:
    """The paper's figure of a metric on a task, of GD and of LCGD; None where it reports none."""
    if task in PAPER and metric in ("sim_aou_norm", "sim_am_delta"):
        return getattr(PAPER[task], metric)
    return None
