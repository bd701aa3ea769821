"""The naive path: the same quantities as a plain implementation gets them, to be measured against and checked against.

It does what the authors' released code does (Deutch et al. 2024): every query runs in its full prompt, one at a time; a deep copy
of the model is trained by `torch.optim.SGD`, autograd forming the gradients of the stored key and value parameters; LCGD detaches
every block's input and reads every block's output out through the final norm and the full unembedding; similarities are loops
over queries, layers and heads. It works for any model that TransformerLens can run and uses nothing of `iclgd_lens` but the two
dataclasses of examples.

It is naive, not slow on purpose. One `run_with_cache` per prompt gives all activations and the label scores, and caches only the
hooks that are read; the logit lens of a query reads all layers in one call of `model.unembed`; only the parameters that are trained
ask for gradients; one backward pass is made per demonstration.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from iclgd_lens.data.prompts import Demonstration, Query
from iclgd_lens.models.hooked import HookedTransformer

PARAMETERS = ("W_K", "b_K", "W_V", "b_V")

READ = ("attn.hook_attn_scores", "hook_attn_out", "hook_resid_post")
"""What is cached of every block."""


def naive_capture(
    model: HookedTransformer, queries: Sequence[Query], context: Sequence[Demonstration] | None = None
) -> dict[str, Tensor]:
    """Run every query in its full prompt, by itself, and read every attention layer at its last token.

    Returns:
        What `capture` keeps by default, under the same names and in the same shapes; `context_scores` with a context only.
    """
    rows: dict[str, list[Tensor]] = {}
    longest = max(len(query.tokens) - 1 for query in queries)
    with torch.no_grad():
        for query in queries:
            for name, row in _read_query(model, query, context).items():
                padded = F.pad(row, (longest - row.shape[-1], 0)) if name == "query_scores" else row
                rows.setdefault(name, []).append(padded)
    return {name: torch.stack(each) for name, each in rows.items()}


def naive_update(
    model: HookedTransformer,
    demonstrations: Sequence[Demonstration],
    method: str,
    *,
    lr: float,
    loss_on: str = "demonstration",
    readout: str = "vocab",
    label_tokens: Sequence[Int[Tensor, "_label_pos"]] = (),
) -> HookedTransformer:
    """Train a deep copy of the model by plain SGD, one step per demonstration, in order.

    Args:
        model: The model; it is left as it is.
        demonstrations: What to train on.
        method: `"gd"` or `"lcgd"`.
        lr: The step size.
        loss_on: As in `gd`, as are `readout` and `label_tokens`.
        readout: See `loss_on`.
        label_tokens: See `loss_on`.

    Returns:
        The trained copy.
    """
    trained_copy = copy.deepcopy(model).requires_grad_(False)
    stored = [parameter(trained_copy, layer, name) for layer in range(model.cfg.n_layers) for name in PARAMETERS]
    optimizer = torch.optim.SGD([each.requires_grad_(True) for each in stored], lr=lr)
    columns = torch.cat(list(label_tokens)).unique().to(model.cfg.device) if readout == "labels" else None
    with torch.enable_grad():
        for demonstration in demonstrations:
            tokens = demonstration.tokens.to(model.cfg.device)
            n_predicted = demonstration.n_label_tokens if loss_on == "label" else len(tokens) - 1
            logits = [_output(trained_copy, tokens)] if method == "gd" else _every_layer(trained_copy, tokens)
            loss = torch.stack([_cross_entropy(each, tokens, n_predicted, columns) for each in logits]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return trained_copy.requires_grad_(False)


def naive_compare(
    models: dict[str, HookedTransformer],
    demonstrations: Sequence[Demonstration],
    queries: Sequence[Query],
    *,
    lr: float,
    methods: Sequence[str] = ("gd", "lcgd"),
) -> dict[tuple[str, str, str], list[float]]:
    """Make a whole comparison: zero-shot, in-context and finetuned, and the paper's two similarities.

    Args:
        models: The models by name: a trained one and, say, its untrained twin.
        demonstrations: What to put in front, and to train on.
        queries: What to run.
        lr: The step size.
        methods: `"gd"`, `"lcgd"` or both.

    Returns:
        By model, method and metric (`"sim_aou"`, `"sim_am_delta"`), one mean per layer over queries, and heads.
    """
    found: dict[tuple[str, str, str], list[float]] = {}
    layers = range(next(iter(models.values())).cfg.n_layers)
    for name, model in models.items():
        zsl, icl = naive_capture(model, queries), naive_capture(model, queries, demonstrations)
        for method in methods:
            ft = naive_capture(naive_update(model, demonstrations, method, lr=lr), queries)
            for metric, of in (("sim_aou", "attn_out"), ("sim_am_delta", "query_scores")):
                found[name, method, metric] = [_mean_similarity(icl[of], ft[of], zsl[of], layer) for layer in layers]
    return found


def parameter(model: HookedTransformer, layer: int, name: str) -> torch.nn.Parameter:
    """One of `W_K`, `b_K`, `W_V`, `b_V` as it is stored: by key-value heads where attention is grouped."""
    stored = dict(model.blocks[layer].attn.named_parameters())
    return stored[name] if name in stored else stored[f"_{name}"]


def _read_query(model: HookedTransformer, query: Query, context: Sequence[Demonstration] | None) -> dict[str, Tensor]:
    pieces = [query.tokens[:1]]
    for demonstration in context or ():
        pieces += [demonstration.tokens[1:], demonstration.separator]
    before = sum(map(len, pieces))
    prompt = torch.cat([*pieces, query.tokens[1:]]).to(model.cfg.device)
    run: Any = model.run_with_cache(prompt[None], names_filter=lambda name: name.endswith(READ))
    logits, cache = run
    layers = range(model.cfg.n_layers)
    scores = torch.stack([cache[f"blocks.{layer}.attn.hook_attn_scores"][0, :, -1] for layer in layers])
    row = {
        "attn_out": torch.stack([cache[f"blocks.{layer}.hook_attn_out"][0, -1] for layer in layers]),
        # What a local window hides is left out.
        "query_scores": scores[:, :, before:].masked_fill(scores[:, :, before:].isinf(), 0.0),
        "label_log_probs": _label_log_probs(model, prompt, query, logits[0, -1].log_softmax(dim=-1)),
    }
    if context is not None:
        row["context_scores"] = scores[:, :, 1:before]
    residuals = torch.stack([cache[f"blocks.{layer}.hook_resid_post"][0, -1] for layer in layers])
    firsts = [int(word[0]) for word in query.label_tokens]
    row["lens_logits"] = _unembed(model, residuals[None])[0, :, firsts]
    return row


def _label_log_probs(
    model: HookedTransformer, prompt: Int[Tensor, "pos"], query: Query, first: Float[Tensor, "d_vocab"]
) -> Float[Tensor, "label"]:
    """Mean log-likelihood per token of every label word; a run of its own only for words of several tokens."""
    scores = []
    for word in query.label_tokens:
        tokens = word.to(prompt.device)
        score = first[tokens[0]]
        if len(tokens) > 1:
            log_probs = model(torch.cat([prompt, tokens[:-1]])[None])[0, len(prompt) :].log_softmax(dim=-1)
            score = score + log_probs.gather(-1, tokens[1:, None]).sum()
        scores.append(score / len(tokens))
    return torch.stack(scores)


def _output(model: HookedTransformer, tokens: Int[Tensor, "pos"]) -> Float[Tensor, "pos d_vocab"]:
    """GD: the logits at the model's output."""
    return model(tokens[None])[0]


def _every_layer(model: HookedTransformer, tokens: Int[Tensor, "pos"]) -> list[Float[Tensor, "pos d_vocab"]]:
    """LCGD: the logits after every block, whose input is detached."""
    embedded: Any = model.input_to_embed(tokens[None])
    residual, logits = embedded[0], []
    for block in model.blocks:
        residual = block(residual.detach())
        logits.append(_unembed(model, residual)[0])
    return logits


def _unembed(model: HookedTransformer, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
    """The logit lens: the model's own final norm, unembedding and soft cap."""
    if model.cfg.normalization_type is not None:
        residual = model.ln_final(residual)
    logits = model.unembed(residual)
    cap = model.cfg.output_logits_soft_cap
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


def _cross_entropy(
    logits: Float[Tensor, "pos d_vocab"], tokens: Int[Tensor, "pos"], n_predicted: int, columns: Int[Tensor, "token"] | None
) -> Float[Tensor, ""]:
    predicted, targets = logits[-n_predicted - 1 : -1], tokens[-n_predicted:]
    if columns is not None:
        predicted, targets = predicted[:, columns], torch.searchsorted(columns, targets)
    return F.cross_entropy(predicted, targets)


def _mean_similarity(icl: Tensor, ft: Tensor, zsl: Tensor, layer: int) -> float:
    """The mean over queries, and heads, of the cosine of the changes that two runs make; undefined ones are left out."""
    cosines = []
    for query in range(len(zsl)):
        first, second, origin = (run[query, layer].reshape(-1, run.shape[-1]) for run in (icl, ft, zsl))
        for one, other, start in zip(first, second, origin, strict=True):
            cosine = float(F.cosine_similarity(one - start, other - start, dim=0, eps=0.0))
            if not math.isnan(cosine):
                cosines.append(cosine)
    return sum(cosines) / len(cosines) if cosines else math.nan
