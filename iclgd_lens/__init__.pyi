from .data.bundled import bundled_task
from .data.episodes import Episode
from .data.prompts import Demonstration, PromptFormat, Query
from .data.registry import load_task, register_task, task_names
from .data.tasks import Task
from .experiments.compare import compare
from .experiments.comparison import Comparison
from .experiments.results import paired_difference, summarise
from .metrics.agreement import accuracy, correct, rec2ftp
from .metrics.controls import random_update
from .metrics.similarity import alpha, sim_am, sim_am_delta, sim_aou, sim_aou_norm
from .models.loading import load_model
from .models.untrained import untrained_twin
from .runs.activations import Activations, capture
from .updates.dual import ParameterUpdate
from .updates.gradient import gd, lcgd

__all__ = [
    "Activations",
    "Comparison",
    "Demonstration",
    "Episode",
    "ParameterUpdate",
    "PromptFormat",
    "Query",
    "Task",
    "accuracy",
    "alpha",
    "bundled_task",
    "capture",
    "compare",
    "correct",
    "gd",
    "lcgd",
    "load_model",
    "load_task",
    "paired_difference",
    "random_update",
    "rec2ftp",
    "register_task",
    "sim_am",
    "sim_am_delta",
    "sim_aou",
    "sim_aou_norm",
    "summarise",
    "task_names",
    "untrained_twin",
]
