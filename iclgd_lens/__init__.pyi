from .checking.check import Check, check
from .data.bundled import bundled_task
from .data.episodes import Episode
from .data.formats import PromptFormat
from .data.prompts import ContextLayout, Demonstration, Query
from .data.registry import load_task, register_task, task_names
from .data.tasks import Task
from .experiments.claims import claims
from .experiments.compare import compare
from .experiments.comparison import Comparison
from .experiments.contrasts import contrasts
from .experiments.learning_rate import similarity_by_rate
from .experiments.protocol import Protocol
from .experiments.reproduce import reproduce
from .experiments.results import paired_difference, summarise
from .experiments.study import Study
from .experiments.sweep import run_sweep
from .experiments.sweep_results import load_results
from .kernels.alignment import centred_alignment
from .kernels.constructed import (
    GaussianSmoother,
    PositiveControl,
    gaussian_smoother,
    linear_attention,
    positive_control,
    regression_episode,
    regression_model,
    regression_step,
)
from .kernels.functional import Alignment, align_trajectories, functional_gd
from .kernels.implied import (
    Agreement,
    agreement,
    by_demonstration,
    demonstration_queries,
    icl_attention,
    implied_attention,
    other_demonstrations,
    proxy_attention,
    without_ends,
)
from .kernels.labels import (
    ChosenHead,
    choose_head,
    hidden_kernel,
    kernel_ridge,
    label_agreement,
    label_correlation,
    label_kernel,
    label_regression,
    median_bandwidth,
)
from .kernels.linearity import Linearity, label_step, linearity, own_layer_change
from .kernels.smoother import Decomposition, decompose, nadaraya_watson
from .kernels.tangent import TangentKernel, tangent_kernel
from .metrics.agreement import accuracy, correct, js_divergence, rec2ftp, same_prediction
from .metrics.controls import random_update
from .metrics.ranking import kendall_tau, shuffled_weights, spearman_rho, top_k_recall
from .metrics.similarity import alpha, sim_am, sim_am_delta, sim_aou, sim_aou_norm
from .models.loading import load_model
from .models.touched import same_at_every_position
from .models.untrained import untrained_twin
from .runs.activations import Activations
from .runs.capture import ATTENTION, capture, capture_batches
from .updates.attribution import Attribution
from .updates.dual import ParameterUpdate
from .updates.gradient import gd, lcgd
from .updates.random_weights import random_weights
from .views.attention import AttentionExample, attention_example, attention_patterns, changed_heads, rank_heads
from .views.circuits import View
from .views.figures import figures, write_figures
from .views.kernel_plots import head_figure, k_figure, smoothing_figure, trajectory_figure
from .views.plots import alpha_figure, gradient_figure, layer_figure, rate_figure

__all__ = [
    "ATTENTION",
    "Activations",
    "Agreement",
    "Alignment",
    "AttentionExample",
    "Attribution",
    "Check",
    "ChosenHead",
    "Comparison",
    "ContextLayout",
    "Decomposition",
    "Demonstration",
    "Episode",
    "GaussianSmoother",
    "Linearity",
    "ParameterUpdate",
    "PositiveControl",
    "PromptFormat",
    "Protocol",
    "Query",
    "Study",
    "TangentKernel",
    "Task",
    "View",
    "accuracy",
    "agreement",
    "align_trajectories",
    "alpha",
    "alpha_figure",
    "attention_example",
    "attention_patterns",
    "bundled_task",
    "by_demonstration",
    "capture",
    "capture_batches",
    "centred_alignment",
    "changed_heads",
    "check",
    "choose_head",
    "claims",
    "compare",
    "contrasts",
    "correct",
    "decompose",
    "demonstration_queries",
    "figures",
    "functional_gd",
    "gaussian_smoother",
    "gd",
    "gradient_figure",
    "head_figure",
    "hidden_kernel",
    "icl_attention",
    "implied_attention",
    "js_divergence",
    "k_figure",
    "kendall_tau",
    "kernel_ridge",
    "label_agreement",
    "label_correlation",
    "label_kernel",
    "label_regression",
    "label_step",
    "layer_figure",
    "lcgd",
    "linear_attention",
    "linearity",
    "load_model",
    "load_results",
    "load_task",
    "median_bandwidth",
    "nadaraya_watson",
    "other_demonstrations",
    "own_layer_change",
    "paired_difference",
    "positive_control",
    "proxy_attention",
    "random_update",
    "random_weights",
    "rank_heads",
    "rate_figure",
    "rec2ftp",
    "register_task",
    "regression_episode",
    "regression_model",
    "regression_step",
    "reproduce",
    "run_sweep",
    "same_at_every_position",
    "same_prediction",
    "shuffled_weights",
    "sim_am",
    "sim_am_delta",
    "sim_aou",
    "sim_aou_norm",
    "similarity_by_rate",
    "smoothing_figure",
    "spearman_rho",
    "summarise",
    "tangent_kernel",
    "task_names",
    "top_k_recall",
    "trajectory_figure",
    "untrained_twin",
    "without_ends",
    "write_figures",
]
