"""The method once more, naively: weights that are really trained, full prompts one at a time, and metrics as plain loops.

Written from the paper's description and independent of `iclgd_lens`, of which it imports two dataclasses only.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from iclgd_lens.data.prompts import Demonstration, Query
from iclgd_lens.models.hooked import HookedTransformer

PARAMETERS = ("W_K", "b_K", "W_V", "b_V")


class Trained(NamedTuple):
    """A trained copy of a model, and of each training step the gradients' norms `[layer step]` and the loss `[step]`."""

    model: HookedTransformer
    gradient_norms: Tensor
    losses: Tensor


def parameter(model: HookedTransformer, layer: int, name: str) -> torch.nn.Parameter:
    """One of `W_K`, `b_K`, `W_V`, `b_V` as it is stored: by key-value heads where attention is grouped."""
    stored = dict(model.blocks[layer].attn.named_parameters())
    return stored[name] if name in stored else stored[f"_{name}"]


def reference_update(
    model: HookedTransformer,
    demonstrations: Sequence[Demonstration],
    *,
    method: str,
    lr: float,
    loss_on: str = "demonstration",
    readout: str = "vocab",
    schedule: str = "online",
    epochs: int = 1,
    parameters: Sequence[str] = PARAMETERS,
    label_tokens: Sequence[Tensor] = (),
) -> Trained:
    """Train a deep copy of the model by `torch.optim.SGD`."""
    model = copy.deepcopy(model)
    model.requires_grad_(False)
    by_layer = [[parameter(model, layer, name) for name in parameters] for layer in range(model.cfg.n_layers)]
    trained = [p.requires_grad_(True) for layer in by_layer for p in layer]
    columns = sorted({int(token) for word in label_tokens for token in word}) if readout == "labels" else None
    loss_of = {"gd": _output_loss, "lcgd": _layerwise_loss}[method]
    optimizer = torch.optim.SGD(trained, lr=lr)
    steps = [demonstrations] if schedule == "batch" else [[demonstration] for demonstration in demonstrations]
    norms, values = [], []
    with torch.enable_grad():
        for step in [step for _ in range(epochs) for step in steps]:
            losses = [loss_of(model, demonstration, token_loss_of(demonstration, loss_on, columns)) for demonstration in step]
            for loss in losses:
                values.append(loss.detach())
                gradients = torch.autograd.grad(loss, trained, retain_graph=True, materialize_grads=True)
                squares = [gradient.square().sum() for gradient in gradients]
                norms.append(torch.stack(squares).view(len(by_layer), -1).sum(-1).sqrt())
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
    return Trained(model.requires_grad_(False), torch.stack(norms, dim=1), torch.stack(values))


def reference_capture(
    model: HookedTransformer, queries: Sequence[Query], context: Sequence[Demonstration] | None = None
) -> dict[str, Tensor | list[Tensor]]:
    """Run every query in its full prompt, by itself, and read what the paper reads at its last token.

    Returns:
        `attn_out [query layer d_model]`; `query_scores`, one `[layer head own_pos]` a query; `context_scores
        [query layer head context_pos]`; `label_log_probs [query label]`; `lens_logits [query layer label]`.
    """
    layers = range(model.cfg.n_layers)
    found: dict[str, list[Tensor]] = {
        name: [] for name in ("attn_out", "query_scores", "context_scores", "label_log_probs", "lens_logits")
    }
    with torch.no_grad():
        for query in queries:
            own = query.tokens[1:]
            prompt = full_prompt(query, context)
            n_before = len(prompt) - len(own)
            _, cache = model.run_with_cache(prompt[None])
            scores = torch.stack([cache[f"blocks.{layer}.attn.hook_attn_scores"][0, :, -1] for layer in layers])
            found["attn_out"].append(torch.stack([cache[f"blocks.{layer}.hook_attn_out"][0, -1] for layer in layers]))
            found["query_scores"].append(scores[:, :, n_before:].masked_fill(scores[:, :, n_before:] == -math.inf, 0.0))
            found["context_scores"].append(scores[:, :, 1:n_before])
            firsts = [int(word[0]) for word in query.label_tokens]
            found["lens_logits"].append(
                torch.stack([readout_logits(model, cache[f"blocks.{layer}.hook_resid_post"][0, -1])[firsts] for layer in layers])
            )
            found["label_log_probs"].append(
                torch.tensor([_label_log_prob(model, prompt, word) for word in query.label_tokens], dtype=torch.float64)
            )
    return {name: rows if name == "query_scores" else torch.stack(rows) for name, rows in found.items()}


def full_prompt(query: Query, context: Sequence[Demonstration] | None) -> Tensor:
    """BOS · demonstration · separator · … · query, with one BOS."""
    pieces = [query.tokens[:1]]
    for demonstration in context or ():
        pieces += [demonstration.tokens[1:], demonstration.separator]
    return torch.cat([*pieces, query.tokens[1:]])


def readout_logits(model: HookedTransformer, residual: Tensor) -> Tensor:
    """The logit lens: the model's own final norm, unembedding and soft cap."""
    if model.cfg.normalization_type is not None:
        residual = model.ln_final(residual)
    logits = model.unembed(residual)
    cap = model.cfg.output_logits_soft_cap
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


def cosine(a: Tensor, b: Tensor) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / (_length(a) * _length(b))


def sim_aou(icl: Tensor, ft: Tensor, zsl: Tensor) -> float:
    """Of one query's attention outputs `[d_model]` at one layer."""
    return cosine(icl - zsl, ft - zsl)


def sim_aou_norm(icl: Tensor, ft: Tensor, zsl: Tensor) -> float:
    """`sim_aou` of the outputs scaled to unit length."""
    return sim_aou(icl / _length(icl), ft / _length(ft), zsl / _length(zsl))


def sim_am(icl: Tensor, ft: Tensor) -> float:
    """Of one query's scores `[own_pos]` at one layer and head."""
    return cosine(icl, ft)


def sim_am_delta(icl: Tensor, ft: Tensor, zsl: Tensor) -> float:
    """Of the changes of one query's scores `[own_pos]` at one layer and head."""
    return cosine(icl - zsl, ft - zsl)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected entry; both must be non-finite in the same places."""
    finite = expected.isfinite()
    assert actual.shape == expected.shape
    assert torch.equal(actual.isfinite(), finite)
    actual, expected = actual.detach()[finite].double(), expected.detach()[finite].double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny))


def _length(vector: Tensor) -> float:
    return math.sqrt(sum(float(x) ** 2 for x in vector))


def _output_loss(model: HookedTransformer, demonstration: Demonstration, token_loss: Callable[[Tensor], Tensor]) -> Tensor:
    """GD: the loss at the model's output."""
    return token_loss(model(demonstration.tokens[None])[0])


def _layerwise_loss(model: HookedTransformer, demonstration: Demonstration, token_loss: Callable[[Tensor], Tensor]) -> Tensor:
    """LCGD: every block's input detached, every block's output read out, the losses summed."""
    residual = model.input_to_embed(demonstration.tokens[None])[0]
    losses = []
    for block in model.blocks:
        residual = block(residual.detach())
        losses.append(token_loss(readout_logits(model, residual)[0]))
    return torch.stack(losses).sum()


def token_loss_of(demonstration: Demonstration, loss_on: str, columns: list[int] | None) -> Callable[[Tensor], Tensor]:
    """Mean cross-entropy as a function of all of a demonstration's logits `[pos d_vocab]`."""
    tokens = demonstration.tokens.tolist()
    first = len(tokens) - demonstration.n_label_tokens if loss_on == "label" else 1

    def loss(logits: Tensor) -> Tensor:
        terms = []
        for position in range(first, len(tokens)):
            row, target = logits[position - 1], tokens[position]
            if columns is not None:
                row, target = row[columns], columns.index(target)
            terms.append(F.cross_entropy(row, torch.tensor(target)))
        return torch.stack(terms).mean()

    return loss


def _label_log_prob(model: HookedTransformer, prompt: Tensor, word: Tensor) -> float:
    """Mean log-likelihood per token of a label word behind a prompt, teacher-forced."""
    log_probs = model(torch.cat([prompt, word])[None])[0].log_softmax(-1)
    return sum(float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(word.tolist())) / len(word)
