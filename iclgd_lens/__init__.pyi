from .data.bundled import bundled_task
from .data.episodes import Episode
from .data.prompts import Demonstration, PromptFormat, Query
from .data.registry import load_task, register_task, task_names
from .data.tasks import Task
from .experiments.claims import claims
from .experiments.compare import compare
from .experiments.comparison import Comparison
from .experiments.learning_rate import similarity_by_rate
from .experiments.protocol import Protocol
from .experiments.reproduce import reproduce
from .experiments.results import paired_difference, summarise
from .metrics.agreement import accuracy, correct, js_divergence, rec2ftp, same_prediction
from .metrics.controls import random_update
from .metrics.similarity import alpha, sim_am, sim_am_delta, sim_aou, sim_aou_norm
from .models.loading import load_model
from .models.untrained import untrained_twin
from .runs.activations import Activations
from .runs.capture import capture
from .updates.dual import ParameterUpdate
from .updates.gradient import gd, lcgd
from .updates.random_weights import random_weights

__all__ = [
    "Activations",
    "Comparison",
    "Demonstration",
    "Episode",
    "ParameterUpdate",
    "PromptFormat",
    "Protocol",
    "Query",
    "Task",
    "accuracy",
    "alpha",
    "bundled_task",
    "capture",
    "claims",
    "compare",
    "correct",
    "gd",
    "js_divergence",
    "lcgd",
    "load_model",
    "load_task",
    "paired_difference",
    "random_update",
    "random_weights",
    "rec2ftp",
    "register_task",
    "reproduce",
    "same_prediction",
    "sim_am",
    "sim_am_delta",
    "sim_aou",
    "sim_aou_norm",
    "similarity_by_rate",
    "summarise",
    "task_names",
    "untrained_twin",
]
