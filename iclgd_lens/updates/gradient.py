"""Gradient descent on demonstrations: vanilla (GD) and layer-causal (LCGD).

Both train every layer's key and value projections by plain SGD, one step per demonstration, in order, so that demonstration j is
seen by weights already updated on 1 … j−1 (Deutch et al. 2024, section 3.1 and the authors' code). They differ in the loss:

- **GD**: the loss at the model's output; its gradient for layer ℓ depends on all layers above ℓ too.
- **LCGD**: every block's input is cut off from the graph, every block's output is read out through the final norm and the
  unembedding and has its own loss, and the losses are summed (section 3.2). So layer ℓ's update depends on layers ≤ ℓ only,
  as the change that demonstrations make in-context does.

No weight is touched, and no gradient of a weight is formed by autograd (`backward.py`). For LCGD the gradients of a few blocks, or
of one where demonstrations are long, are taken inside the hook at the last one's output, and their graph is dropped before the next
one runs, so memory does not grow with depth.

>>> from iclgd_lens.data.registry import load_task
>>> from iclgd_lens.models.loading import load_model
>>> model = load_model("bundled")
>>> episode = load_task("bundled/remapped").episode(model, k=4, n_queries=1, seed=0)
>>> update = lcgd(model, episode.demonstrations, lr=0.01)
>>> list(update.gradient_norms.shape)
[4, 4]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from iclgd_lens.data.episodes import require_known_tokens
from iclgd_lens.data.prompts import Demonstration, as_label_tokens, demonstrations_digest
from iclgd_lens.models.fingerprint import fingerprint
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.models.readout import LogitLens
from iclgd_lens.models.sites import HookSites, sites_of, warn_if_processed
from iclgd_lens.models.surroundings import ordinary_modes
from iclgd_lens.updates.backward import Gradients, Loss, layer_causal_gradients, output_gradients
from iclgd_lens.updates.dual import ALL_PARAMETERS, LossOn, ParameterUpdate, Readout, Schedule, UpdateSettings
from iclgd_lens.updates.inject import PARAMETERS_OF, Parameter
from iclgd_lens.updates.running import RunningUpdate


class DivergedError(ValueError):
    """Gradient steps made an update that is not finite: the learning rate is too large."""


def gd(
    model: HookedModel,
    demonstrations: Sequence[Demonstration],
    *,
    lr: float,
    loss_on: LossOn = "demonstration",
    readout: Readout = "vocab",
    schedule: Schedule = "online",
    epochs: int = 1,
    parameters: Sequence[Parameter] = ALL_PARAMETERS,
    label_tokens: Sequence[Int[Tensor, "_label_pos"]] | None = None,
) -> ParameterUpdate:
    """Make the update of vanilla gradient descent: the loss is at the model's output.

    Args:
        model: The model; it is only read. Hooks that are on it act, but for those on the final norm and the unembedding: losses are
            read out from the residual stream (`models/readout.py`).
        demonstrations: What to train on, in order.
        lr: Step size of plain SGD (no momentum, no decay).
        loss_on: `"demonstration"`: mean cross-entropy over all predicted tokens of the demonstration (the authors' code);
            `"label"`: over its label tokens.
        readout: `"vocab"`: over the full vocabulary (the authors' code); `"labels"`: restricted to the tokens that occur in any
            label word ("projected to the label space", Figure 1), which needs `loss_on="label"` and `label_tokens`.
        schedule: `"online"`: one step per demonstration, in order. `"batch"`: one step per epoch on the sum of the
            demonstrations' losses, all gradients taken at the same weights; as lr → 0 the two agree to first order.
        epochs: Passes over the demonstrations.
        parameters: Which of every layer's `W_K`, `b_K`, `W_V`, `b_V` are trained.
        label_tokens: The tokens of each label word, `episode.label_tokens`; needed for `readout="labels"`.

    Returns:
        The update in dual form: inputs in the model's dtype, errors and all sums in at least float32.

    Raises:
        TypeError: If the model is neither a `HookedTransformer` nor a `TransformerBridge`.
        ValueError: If an option is unknown or does not fit another, there are no demonstrations, one is longer than the context
            window, has a token that is not in the model's vocabulary, or, with `readout="labels"`, a label that is not among
            `label_tokens`.
        DivergedError: If the update becomes non-finite (the message names the demonstration and the layer).
        RuntimeError: If another thread is capturing this model, or has an update attached to it.
    """
    settings = UpdateSettings("gd", lr, loss_on, readout, schedule, epochs, parameters)
    return _descend(model, demonstrations, settings, label_tokens, output_gradients)


def lcgd(
    model: HookedModel,
    demonstrations: Sequence[Demonstration],
    *,
    lr: float,
    loss_on: LossOn = "demonstration",
    readout: Readout = "vocab",
    schedule: Schedule = "online",
    epochs: int = 1,
    parameters: Sequence[Parameter] = ALL_PARAMETERS,
    label_tokens: Sequence[Int[Tensor, "_label_pos"]] | None = None,
) -> ParameterUpdate:
    """Make the update of layer-causal gradient descent: every layer has its own logit-lens loss, and nothing flows below it.

    Arguments, return value and errors are those of `gd`. The last layer's first step is `gd`'s.
    """
    settings = UpdateSettings("lcgd", lr, loss_on, readout, schedule, epochs, parameters)
    return _descend(model, demonstrations, settings, label_tokens, layer_causal_gradients)


def _descend(
    model: HookedModel,
    demonstrations: Sequence[Demonstration],
    settings: UpdateSettings,
    label_tokens: Sequence[Int[Tensor, "_label_pos"]] | None,
    gradients_of: Callable[..., Gradients],
) -> ParameterUpdate:
    """Plain SGD over the demonstrations, gradients from `gradients_of`."""
    demonstrations = tuple(demonstrations)
    words = None if label_tokens is None else as_label_tokens(label_tokens)
    sites = sites_of(model)
    sites.require_trainable()
    # Gradients are wanted whatever the caller's modes of torch: notebooks often switch autograd off, or autocast on.
    with ordinary_modes():
        columns = _check(model, demonstrations, settings, words)
        lens = LogitLens.of(model, columns)
        warn_if_processed(sites)
        lengths = [len(demonstration.tokens) for demonstration in demonstrations] * settings.epochs
        running = RunningUpdate(sites, settings.parameters, sum(lengths), settings.lr)
        norms: list[Float[Tensor, "layer"]] = []
        losses: list[Float[Tensor, ""]] = []
        for _ in range(settings.epochs):
            for demonstration in demonstrations:
                tokens = demonstration.tokens.to(model.cfg.device, copy=True)
                loss = _loss(lens, tokens, demonstration.n_label_tokens, settings, columns)
                found = gradients_of(sites, tokens, running.hooks(), loss, settings.parameters)
                norms.append(running.record(found))
                losses.append(found.loss)
                # Online, a gradient changes what the next demonstration meets; in a batch it waits for the end of the epoch.
                if settings.schedule == "online":
                    running.apply()
            running.apply()
            # Asking at every step would make a GPU wait for each.
            _refuse_non_finite(torch.stack(norms), settings, len(demonstrations))
        return _in_dual_form(sites, demonstrations, settings, running, norms, losses)


def _loss(
    lens: LogitLens,
    tokens: Int[Tensor, "pos"],
    n_label_tokens: int,
    settings: UpdateSettings,
    columns: Int[Tensor, "token"] | None,
) -> Loss:
    """Mean cross-entropy, in nats, of the demonstration's predicted tokens or of its label tokens."""
    n_predicted = n_label_tokens if settings.loss_on == "label" else len(tokens) - 1
    targets = tokens[-n_predicted:]
    if columns is not None:
        targets = torch.searchsorted(columns, targets)
    return Loss(lens, slice(len(tokens) - n_predicted - 1, len(tokens) - 1), targets)


def _in_dual_form(
    sites: HookSites,
    demonstrations: Sequence[Demonstration],
    settings: UpdateSettings,
    running: RunningUpdate,
    norms: list[Float[Tensor, "layer"]],
    losses: list[Float[Tensor, ""]],
) -> ParameterUpdate:
    device = running.inputs.device
    lengths = [len(demonstration.tokens) for demonstration in demonstrations] * settings.epochs
    numbers = torch.arange(len(demonstrations)).repeat(settings.epochs)
    keys, values = (
        rearrange(running.errors[kind], "layer token (kv_head d_head) -> layer token kv_head d_head", kv_head=sites.n_kv_heads)
        for kind in PARAMETERS_OF
    )
    return ParameterUpdate(
        inputs=running.inputs,
        key_errors=keys,
        value_errors=values,
        demonstration=numbers.repeat_interleave(torch.tensor(lengths)).to(device),
        position=torch.cat([torch.arange(length) for length in lengths]).to(device),
        gradient_norms=torch.stack(norms, dim=1),
        losses=torch.stack(losses),
        settings=settings,
        fingerprint=fingerprint(sites.model),
        examples=demonstrations_digest(demonstrations),
    )


def _refuse_non_finite(norms: Float[Tensor, "step layer"], settings: UpdateSettings, count: int) -> None:
    # Its square too: what is larger than that cannot be run with.
    finite = (settings.lr * norms).square().isfinite()
    if not bool(finite.all()):
        step, layer = (~finite).nonzero()[0].tolist()
        raise DivergedError(
            f"lr={settings.lr:g} made the {settings.method} update non-finite at demonstration {step % count} of {count} (counted "
            f"from 0), layer {layer}; use a smaller learning rate"
        )


def _check(
    model: HookedModel,
    demonstrations: Sequence[Demonstration],
    settings: UpdateSettings,
    label_tokens: Sequence[Int[Tensor, "_label_pos"]] | None,
) -> Int[Tensor, "token"] | None:
    """Validate demonstrations and label words; return the vocabulary columns of a restricted readout, sorted."""
    if not demonstrations:
        raise ValueError("no demonstrations: a gradient step needs at least one")
    require_known_tokens(demonstrations, model.cfg.d_vocab, label_tokens or ())
    for number, demonstration in enumerate(demonstrations):
        if len(demonstration.tokens) > model.cfg.n_ctx:
            raise ValueError(
                f"demonstration {number} has {len(demonstration.tokens)} tokens, more than the model's context window of "
                f"{model.cfg.n_ctx}"
            )
    if settings.readout == "vocab":
        return None
    if not label_tokens:
        raise ValueError("readout='labels' needs label_tokens, the tokens of every label word (episode.label_tokens)")
    columns = torch.cat([tokens.to(model.cfg.device) for tokens in label_tokens]).unique(sorted=True)
    for number, demonstration in enumerate(demonstrations):
        if not torch.isin(demonstration.tokens[-demonstration.n_label_tokens :].to(columns.device), columns).all():
            raise ValueError(f"the label of demonstration {number} is not among label_tokens")
    return columns
