"""How far a layer-causal step is functional gradient descent with the tangent kernel: prediction against what happens.

The prediction is first order in the step, so its error falls in proportion to the learning rate. At a rate in use it says how much
of the step a kernel method with a fixed kernel explains, the *lazy* regime (Jacot et al. 2018; Chizat et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iclgd_lens.checks import require_count
from iclgd_lens.data.episodes import require_known_tokens
from iclgd_lens.data.prompts import Demonstration, Query
from iclgd_lens.kernels.tangent import first_label_tokens, require_window
from iclgd_lens.metrics.similarity import cosine
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.models.precision import wide, wide_dtype
from iclgd_lens.models.readout import LogitLens
from iclgd_lens.models.sites import HookSites, NamedHook, sites_of
from iclgd_lens.models.surroundings import ordinary_modes
from iclgd_lens.runs.passes import passes
from iclgd_lens.runs.prefix import Prefix
from iclgd_lens.updates.dual import ALL_PARAMETERS, ParameterUpdate, Schedule
from iclgd_lens.updates.gradient import lcgd
from iclgd_lens.updates.inject import Parameter


@dataclass(frozen=True, eq=False)
class Linearity:
    """The predicted change of label logits against the actual one, over queries and labels, layer by layer.

    Attributes:
        cosine: `[layer]`: their cosine; NaN where either is zero.
        error: `[layer]`: `‖actual − predicted‖ / ‖actual‖`; NaN where nothing changes.
    """

    cosine: Float[Tensor, "layer"]
    error: Float[Tensor, "layer"]


def linearity(predicted: Float[Tensor, "layer query label"], actual: Float[Tensor, "layer query label"]) -> Linearity:
    """Compare a predicted change of label logits with the actual one.

    Args:
        predicted: `kernel.prediction(lr)`.
        actual: `own_layer_change` for the claim about the kernel; a finetuned run's `lens_logits` minus the zero-shot run's, for
            what the updates of the layers below add.

    Raises:
        ValueError: If they differ in shape, or have another number of axes.
    """
    if predicted.shape != actual.shape or predicted.ndim != 3:
        raise ValueError(
            "predicted and actual must both be [layer query label], of the same layers, queries and labels; predicted has the "
            f"shape {list(predicted.shape)}, actual {list(actual.shape)}"
        )
    a, b = predicted.flatten(1), actual.flatten(1)
    length = b.norm(dim=-1)
    return Linearity(cosine(a, b), (b - a).norm(dim=-1) / length.masked_fill(length == 0, torch.nan))


def label_step(
    model: HookedModel,
    demonstrations: Sequence[Demonstration],
    queries: Sequence[Query],
    *,
    lr: float,
    schedule: Schedule = "batch",
    parameters: Sequence[Parameter] = ALL_PARAMETERS,
) -> ParameterUpdate:
    """Make the layer-causal update that the tangent kernel is about: the loss on each label's first token, among the label words'.

    Arguments and errors are those of `lcgd`, and of `first_label_tokens`; the queries tell the label words.
    """
    firsts = first_label_tokens(tuple(queries))
    shortened = [
        replace(each, tokens=each.tokens[: len(each.tokens) - each.n_label_tokens + 1], n_label_tokens=1) for each in demonstrations
    ]
    words = [token[None] for token in firsts]
    return lcgd(
        model,
        shortened,
        lr=lr,
        loss_on="label",
        readout="labels",
        schedule=schedule,
        parameters=parameters,
        label_tokens=words,
    )


@ordinary_modes()
def own_layer_change(
    model: HookedModel, update: ParameterUpdate, queries: Sequence[Query], *, batch_size: int = 8
) -> Float[Tensor, "layer query label"]:
    """The change of every layer's label logits under the update of that layer alone, its inputs held as they were.

    All layers are done in two passes: the second runs under the whole update, with every block's input put back to what it was in
    the first. Held at a time is the residual stream of one batch at all layers.

    Raises:
        ValueError: If the update belongs to another model, `batch_size` is below 1, a query is longer than the context window or
            has a token that is not in the model's vocabulary, or as `first_label_tokens`.
    """
    require_count("batch_size", batch_size)
    queries = tuple(queries)
    sites, firsts = sites_of(model), first_label_tokens(queries).to(model.cfg.device)
    require_known_tokens(queries, model.cfg.d_vocab)
    require_window("query", [query.tokens for query in queries], model.cfg.n_ctx)
    lens = LogitLens.of(model, firsts)
    change = torch.zeros(sites.n_layers, len(queries), len(firsts), dtype=wide_dtype(model.cfg.dtype), device=model.cfg.device)
    for rows in (found.rows for found in passes(sites, [len(query.tokens) for query in queries], batch_size=batch_size)):
        prompts = [queries[row].tokens for row in rows.tolist()]
        streams: dict[int, Float[Tensor, "batch pos d_model"]] = {}
        before = _label_logits(sites, prompts, lens, streams)
        change[:, rows] = _label_logits(sites, prompts, lens, streams, update) - before
    return change


def _label_logits(
    sites: HookSites,
    prompts: Sequence[Int[Tensor, "_pos"]],
    lens: LogitLens,
    streams: dict[int, Tensor],
    update: ParameterUpdate | None = None,
) -> Float[Tensor, "layer batch label"]:
    """Every layer's label logits, each block's input being that in `streams`, or put there where there is none yet."""
    logits: list[Float[Tensor, "batch label"]] = []

    def enter(layer: int) -> Callable[..., Tensor]:
        return lambda residual, hook: streams.setdefault(layer, residual)

    hooks: list[NamedHook] = []
    for layer in range(sites.n_layers):
        hooks.append((sites.residual_in[layer], enter(layer)))
        hooks.append((sites.residual_out[layer], lambda residual, hook: logits.append(wide(lens(residual[:, -1])))))
    # On before the update's, so that the update reads a block's input as it is put back.
    with sites.attach(hooks), nullcontext() if update is None else update.attached(sites.model):
        Prefix.empty(sites).continue_with(prompts, [])
    return torch.stack(logits)
