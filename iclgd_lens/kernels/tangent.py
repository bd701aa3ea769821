"""The tangent kernel of a layer's label logits, and what functional gradient descent with it predicts.

Let `f(p)` be the logits of the label words' first tokens that the logit lens reads after block ℓ at the last token of a prompt p,
as a function of that layer's key and value projections θ. To first order, a gradient step on θ is functional gradient descent with
the kernel (Jacot et al. 2018, section 4; here of one layer, with its inputs held)

    Θ(p, p')[c, c'] = ∂f_c(p)/∂θ · ∂f_c'(p')/∂θ

so a layer-causal step on the labels of demonstrations d, with cross-entropy restricted to the label words, changes a query's logits
by

    f(q) − lr Σ_d Θ(q, d) (p_d − y_d)

with `p_d` the softmax of `f(d)` and `y_d` the one-hot label (Deutch et al. 2024, section 3.2, "projected to the label space"). A
demonstration stands here for its prompt without the label, whose last token predicts it.

A gradient of a linear map is a sum over tokens of inputs ⊗ errors, and the inner product of two such sums needs neither of them
formed:

    Θ(p, p')[c, c'] = Σᵢⱼ ⟨xᵢ, xⱼ⟩ ⟨gᵢ[c], gⱼ[c']⟩,    gᵢ[c] = ∂f_c(p)/∂(key or value at token i)

with `⟨xᵢ, xⱼ⟩ + 1` where biases are trained too, summed over keys and values. So kernels are made of inputs and errors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from iclgd_lens.checks import require_count, require_not_negative
from iclgd_lens.data.episodes import require_known_tokens
from iclgd_lens.data.prompts import Demonstration, Query
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.models.precision import wide, wide_dtype
from iclgd_lens.models.readout import LogitLens
from iclgd_lens.models.sites import HookSites, NamedHook, sites_of
from iclgd_lens.models.surroundings import ordinary_modes
from iclgd_lens.runs.activations import label_words_digest
from iclgd_lens.runs.passes import passes
from iclgd_lens.runs.prefix import Prefix
from iclgd_lens.updates.backward import Recorder, pull_back
from iclgd_lens.updates.dual import ALL_PARAMETERS, require_parameters
from iclgd_lens.updates.inject import Parameter

LARGEST = 2**25
"""How many numbers a temporary may hold; queries are taken a few at a time to keep to it."""


@dataclass(frozen=True, eq=False)
class TangentKernel:
    """The tangent kernels of every layer's label logits.

    Attributes:
        between: `[layer demonstration demonstration label label]`: Θ among demonstrations.
        to_queries: `[layer query demonstration label label]`: Θ of queries with demonstrations.
        demonstration_logits: `[layer demonstration label]`: f of the demonstrations, each a prompt of its own without its label.
        query_logits: `[layer query label]`: f of the queries, zero-shot.
        targets: `[demonstration label]`: the demonstrations' labels, one-hot.
    """

    between: Float[Tensor, "layer demonstration other label label2"]
    to_queries: Float[Tensor, "layer query demonstration label label2"]
    demonstration_logits: Float[Tensor, "layer demonstration label"]
    query_logits: Float[Tensor, "layer query label"]
    targets: Float[Tensor, "demonstration label"]

    @property
    def residuals(self) -> Float[Tensor, "layer demonstration label"]:
        """p − y of every demonstration: the gradient of its cross-entropy by its logits."""
        return self.demonstration_logits.softmax(dim=-1) - self.targets

    def prediction(self, lr: float) -> Float[Tensor, "layer query label"]:
        """The change of the queries' logits that one layer-causal step makes to first order: `−lr Σ_d Θ(q, d) (p_d − y_d)`.

        Raises:
            ValueError: If `lr` is not finite or negative.
        """
        require_not_negative("lr", lr)
        return -lr * einsum(
            self.to_queries, self.residuals, "layer query demonstration a b, layer demonstration b -> layer query a"
        )

    def shuffled(self, order: Sequence[int]) -> TangentKernel:
        """The same kernel with its demonstrations dealt out anew to queries, and the residuals where they were: a baseline.

        Raises:
            ValueError: If `order` does not name every demonstration once.
        """
        order, count = list(order), self.to_queries.shape[2]
        if sorted(order) != list(range(count)):
            raise ValueError(f"order must name each of the {count} demonstrations once, counted from 0; got {order}")
        return replace(self, to_queries=self.to_queries[:, :, order])

    @property
    def per_label(self) -> Float[Tensor, "layer query demonstration"]:
        """The kernel of queries with demonstrations as one number: Θ's mean over labels, `Σ_c Θ[c, c] / C`."""
        return self.to_queries.diagonal(dim1=-2, dim2=-1).mean(dim=-1)


@ordinary_modes()
def tangent_kernel(
    model: HookedModel,
    demonstrations: Sequence[Demonstration],
    queries: Sequence[Query],
    *,
    parameters: Sequence[Parameter] = ALL_PARAMETERS,
    batch_size: int = 32,
) -> TangentKernel:
    """Compute every layer's tangent kernel of the label logits, from inputs and gradients at keys and values.

    No ΔW and no Jacobian over parameters is formed. Queries stream through the model batch by batch, and layer by layer within it.
    Held are, of the demonstrations, `layer × demonstration × pos × (d_model + label × 2 kv_head × d_head)` numbers, of the queries
    one batch at one layer, and the kernels returned.

    Args:
        model: The model; hooks that are on it act.
        demonstrations: Demonstrations with known labels.
        queries: Queries with label words.
        parameters: Which of a layer's `W_K`, `b_K`, `W_V`, `b_V` are trained.
        batch_size: How many prompts run at once.

    Raises:
        ValueError: If there are no demonstrations, one has no label index, queries have different label words, two label words
            share their first token, a parameter is unknown, `batch_size` is below 1, a token is not in the model's vocabulary, or
            a prompt is longer than the context window.
    """
    require_count("batch_size", batch_size)
    demonstrations, queries = tuple(demonstrations), tuple(queries)
    sites, firsts = sites_of(model), first_label_tokens(queries)
    sites.require_trainable()
    targets = torch.nn.functional.one_hot(_label_indices(demonstrations, len(firsts)), len(firsts))
    require_known_tokens([*demonstrations, *queries], model.cfg.d_vocab)
    trained = require_parameters(parameters)
    # A demonstration without its label is a prompt whose last token predicts it.
    unlabelled = [demonstration.tokens[: -demonstration.n_label_tokens] for demonstration in demonstrations]
    require_window("demonstration", unlabelled, model.cfg.n_ctx)
    require_window("query", [query.tokens for query in queries], model.cfg.n_ctx)
    reader = _Reader(sites, LogitLens.of(model, firsts.to(model.cfg.device)), trained, batch_size)

    n, shape = len(demonstrations), (len(firsts), len(firsts))
    empty = torch.zeros(0, dtype=wide_dtype(model.cfg.dtype), device=model.cfg.device)
    between = empty.new_zeros(sites.n_layers, n, n, *shape)
    to_queries = empty.new_zeros(sites.n_layers, len(queries), n, *shape)
    demonstration_logits = empty.new_zeros(sites.n_layers, n, len(firsts))
    query_logits = empty.new_zeros(sites.n_layers, len(queries), len(firsts))
    held: list[list[tuple[Int[Tensor, "batch"], LabelGradients]]] = [[] for _ in range(sites.n_layers)]

    def hold(layer: int, rows: Int[Tensor, "batch"], found: LabelGradients) -> None:
        held[layer].append((rows, found))
        demonstration_logits[layer, rows] = found.logits

    def meet(layer: int, rows: Int[Tensor, "batch"], found: LabelGradients) -> None:
        query_logits[layer, rows] = found.logits
        for others, other in held[layer]:
            to_queries[layer, rows[:, None], others] = theta(found, other, trained)

    reader.visit(unlabelled, hold)
    for layer, batches in enumerate(held):
        for rows, found in batches:
            for others, other in batches:
                between[layer, rows[:, None], others] = theta(found, other, trained)
    reader.visit([query.tokens for query in queries], meet)
    return TangentKernel(between, to_queries, demonstration_logits, query_logits, targets.to(between))


@dataclass(frozen=True, eq=False)
class LabelGradients:
    """Label logits of prompts at one layer, and what they say about its projections.

    Attributes:
        logits: `[prompt label]`.
        inputs: `[prompt pos d_model]`: xᵢ, what the projections multiply.
        gradients: By kind of projection, `"K"` or `"V"`, where it is trained: `[prompt label pos width]`, gᵢ at its output.
    """

    logits: Float[Tensor, "prompt label"]
    inputs: Float[Tensor, "prompt pos d_model"]
    gradients: dict[str, Float[Tensor, "prompt label pos width"]]


def theta(a: LabelGradients, b: LabelGradients, trained: Sequence[Parameter]) -> Float[Tensor, "prompt other label label2"]:
    """Θ of two lots of prompts at one layer: `Σᵢⱼ (⟨xᵢ, xⱼ⟩ + 1) ⟨gᵢ[c], gⱼ[c']⟩` over keys and values."""
    parts = []
    for kind, others in b.gradients.items():
        # The tokens of b are summed first: that leaves one axis of labels, not two, in the largest temporary.
        n_others, n_labels, _, width = others.shape
        chunk = max(1, LARGEST // (a.inputs.shape[1] * n_others * n_labels * width))
        rows = []
        for inputs, mine in zip(a.inputs.split(chunk), a.gradients[kind].split(chunk), strict=True):
            products = einsum(inputs, b.inputs, "prompt i d_model, other j d_model -> prompt i other j")
            kernel = products * float(f"W_{kind}" in trained) + float(f"b_{kind}" in trained)
            mixed = einsum(kernel, others, "prompt i other j, other label j width -> prompt i other label width")
            rows.append(einsum(mine, mixed, "prompt a i width, prompt i other b width -> prompt other a b"))
        parts.append(torch.cat(rows))
    return torch.stack(parts).sum(dim=0)


class _Reader:
    """Runs prompts and takes the gradients of their label logits, layer by layer."""

    def __init__(self, sites: HookSites, lens: LogitLens, trained: tuple[Parameter, ...], batch_size: int) -> None:
        self.sites, self.lens, self.trained, self.batch_size = sites, lens, trained, batch_size

    def visit(
        self,
        prompts: Sequence[Int[Tensor, "_pos"]],
        each: Callable[[int, Int[Tensor, "batch"], LabelGradients], None],
    ) -> None:
        """Call a function with every layer of every batch; what it does not keep is dropped before the next layer runs."""
        lengths = [len(prompt) for prompt in prompts]
        whole = Prefix.empty(self.sites)
        with torch.enable_grad():
            for rows in (found.rows for found in passes(self.sites, lengths, batch_size=self.batch_size)):
                hooks: list[NamedHook] = []
                recorder = Recorder(self.sites, self.trained)
                for layer in range(self.sites.n_layers):
                    hooks.append((self.sites.residual_in[layer], lambda residual, hook: residual.detach()))
                    hooks += recorder.hooks(layer, cut=True)
                    hooks.append((self.sites.residual_out[layer], self._take(layer, rows, recorder, each)))
                # Put on so that leaves are what the projections put out, before any hook of the user's.
                with self.sites.attach(hooks):
                    whole.continue_with([prompts[row] for row in rows.tolist()], [])

    def _take(
        self,
        layer: int,
        rows: Int[Tensor, "batch"],
        recorder: Recorder,
        each: Callable[[int, Int[Tensor, "batch"], LabelGradients], None],
    ) -> Callable[..., Tensor]:
        def take(residual: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
            logits, outputs = wide(self.lens(residual[:, -1])), recorder.take_outputs()
            by_label = [pull_back(logit.sum(), outputs, again=True) for logit in logits.unbind(dim=-1)]
            kinds = [kind for kind in ("K", "V") if {f"W_{kind}", f"b_{kind}"} & set(self.trained)]
            gradients = {
                kind: rearrange(wide(torch.stack(found)), "label prompt pos kv_head d_head -> prompt label pos (kv_head d_head)")
                for kind, found in zip(kinds, zip(*by_label, strict=True), strict=True)
            }
            with torch.no_grad():
                each(layer, rows, LabelGradients(logits.detach(), wide(recorder.take_inputs(layer)), gradients))
            return residual.detach()

        return take


def first_label_tokens(queries: Sequence[Query]) -> Int[Tensor, "label"]:
    """The first token of every label word of the queries.

    Raises:
        ValueError: If there are no queries or label words, queries have different label words, or two words share their first
            token.
    """
    if not queries or not len(queries[0].label_tokens):
        raise ValueError("the tangent kernel is one of label logits, so it needs queries with label words")
    # Queries of an episode share their label words' tensors, which are looked at once.
    digests = {id(query.label_tokens): label_words_digest(query.label_tokens) for query in queries}
    for number, query in enumerate(queries):
        if digests[id(query.label_tokens)] != digests[id(queries[0].label_tokens)]:
            raise ValueError(f"query {number} has other label words than query 0; make a kernel for each")
    firsts = torch.stack([tokens[0] for tokens in queries[0].label_tokens])
    if len(firsts.unique()) < len(firsts):
        raise ValueError(
            f"two label words share their first token (first tokens: {firsts.tolist()}), so their logits are the same; the tangent "
            "kernel needs label words that differ in it"
        )
    return firsts


def require_window(what: str, prompts: Sequence[Int[Tensor, "_pos"]], n_ctx: int) -> None:
    """Check that prompts, each run on its own, fit the context window.

    Raises:
        ValueError: If one does not, naming it.
    """
    for number, prompt in enumerate(prompts):
        if len(prompt) > n_ctx:
            raise ValueError(f"{what} {number} makes a prompt of {len(prompt)} tokens, longer than the context window of {n_ctx}")


def _label_indices(demonstrations: Sequence[Demonstration], n_labels: int) -> Int[Tensor, "demonstration"]:
    labels = []
    for number, demonstration in enumerate(demonstrations):
        if demonstration.label is None or not 0 <= demonstration.label < n_labels:
            raise ValueError(f"demonstration {number} has the label index {demonstration.label}; need one of 0 to {n_labels - 1}")
        labels.append(demonstration.label)
    if not labels:
        raise ValueError("no demonstrations: a kernel needs at least one point")
    return torch.tensor(labels)
