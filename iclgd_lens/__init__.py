"""In-context learning against gradient descent, layer by layer, on any TransformerLens model.

>>> import iclgd_lens as lens
>>> model = lens.load_model("bundled")
>>> episode = lens.load_task("bundled/remapped").episode(model, k=12, n_queries=16, seed=0)
>>> zsl = lens.capture(model, episode.queries)
>>> icl = lens.capture(model, episode.queries, context=episode.demonstrations)
>>> update = lens.lcgd(model, episode.demonstrations, lr=0.01)
>>> ft = lens.capture(model, episode.queries, update=update)
>>> list(lens.sim_aou(icl, ft, zsl).shape)
[16, 4]
"""

from iclgd_lens.capture.activations import Activations, capture
from iclgd_lens.data.episodes import Episode
from iclgd_lens.data.prompts import Demonstration, PromptFormat, Query
from iclgd_lens.data.tasks import Task, bundled_task, load_task
from iclgd_lens.experiments.compare import Comparison, compare
from iclgd_lens.experiments.results import paired_difference, summarise
from iclgd_lens.metrics.agreement import accuracy, rec2ftp
from iclgd_lens.metrics.controls import random_update
from iclgd_lens.metrics.similarity import alpha, sim_am, sim_am_delta, sim_aou, sim_aou_norm
from iclgd_lens.models.loading import load_model
from iclgd_lens.models.untrained import untrained_twin
from iclgd_lens.updates.dual import ParameterUpdate
from iclgd_lens.updates.gradient import gd, lcgd

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
    "gd",
    "lcgd",
    "load_model",
    "load_task",
    "paired_difference",
    "random_update",
    "rec2ftp",
    "sim_am",
    "sim_am_delta",
    "sim_aou",
    "sim_aou_norm",
    "summarise",
    "untrained_twin",
]
