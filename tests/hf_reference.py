"""The method once more, on plain Hugging Face models: weights that are really trained, and full prompts one at a time.

Written from the paper's description and independent of TransformerLens and `iclgd_lens`, of which it imports two dataclasses only;
losses as functions of logits are those of `tests/reference.py`.
Attention scores are taken from what Hugging Face's own attention gives to its softmax.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iclgd_lens.data.prompts import Demonstration, Query
from tests.reference import PARAMETERS, full_prompt, token_loss_of


class Trained(NamedTuple):
    """A trained copy of a model.

    `deltas` holds by name what was added to every layer's parameters, `[kv_head d_model d_head]` or `[kv_head d_head]`, and
    `losses` the loss of each step.
    """

    model: Any
    deltas: Mapping[str, list[Tensor]]
    losses: Tensor


def blocks(model: Any) -> nn.ModuleList:
    """A model's blocks."""
    inner = model.base_model
    inner = getattr(inner, "decoder", inner)
    return inner.h if hasattr(inner, "h") else inner.layers


def final_norm(model: Any) -> nn.Module:
    """The norm before the unembedding."""
    inner = model.base_model
    inner = getattr(inner, "decoder", inner)
    (found,) = (
        getattr(inner, name)
        for name in ("ln_f", "final_layer_norm", "norm", "final_layernorm")
        if isinstance(getattr(inner, name, None), nn.Module)
    )
    return found


def attention(block: Any) -> Any:
    """The module with a block's key and value projections."""
    found = next(getattr(block, name) for name in ("attn", "attention", "self_attn") if hasattr(block, name))
    return getattr(found, "attention", found)


def attention_adds(block: Any) -> nn.Module:
    """The module whose output attention adds to the residual stream: with two norms around a part, the second of them."""
    return block.post_attention_layernorm if hasattr(block, "pre_feedforward_layernorm") else attention(block)


def key_and_value_parts(model: Any, layer: int) -> dict[str, tuple[nn.Parameter, Callable[[Tensor], Tensor]]]:
    """Which parameter `W_K`, `b_K`, `W_V` and `b_V` of a layer lie in, and how to see them in it in TransformerLens's axes."""
    at = attention(blocks(model)[layer])
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    d_model = config.hidden_size
    parts: dict[str, tuple[nn.Parameter, Callable[[Tensor], Tensor]]] = {}
    for number, kind in ((1, "K"), (2, "V")):
        if hasattr(at, "c_attn"):  # [d_model, 3 · head · d_head], as GPT-2's matrices are the other way round
            parts[f"W_{kind}"] = at.c_attn.weight, lambda W, n=number: W.view(d_model, 3, heads, -1)[:, n].permute(1, 0, 2)
            parts[f"b_{kind}"] = at.c_attn.bias, lambda b, n=number: b.view(3, heads, -1)[n]
        elif hasattr(at, "query_key_value"):  # [head · 3 · d_head, d_model]
            parts[f"W_{kind}"] = at.query_key_value.weight, lambda W, n=number: W.view(heads, 3, -1, d_model)[:, n].mT
            parts[f"b_{kind}"] = at.query_key_value.bias, lambda b, n=number: b.view(heads, 3, -1)[:, n]
        else:  # [head · d_head, d_model]
            linear = at.k_proj if kind == "K" else at.v_proj
            parts[f"W_{kind}"] = linear.weight, lambda W: W.view(heads, -1, d_model).mT
            if linear.bias is not None:
                parts[f"b_{kind}"] = linear.bias, lambda b: b.view(heads, -1)
    return parts


def reference_update(
    model: Any,
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
    """Train a deep copy of the model by `torch.optim.SGD`, in float64, so that differences of weights keep their digits.

    Where a projection has no bias, it is given one of zeros: a bias is among the trained parameters of the method.
    """
    model = copy.deepcopy(model).double().requires_grad_(False)
    layers = range(len(blocks(model)))
    for layer in layers:
        _give_biases(attention(blocks(model)[layer]))
    parts = [key_and_value_parts(model, layer) for layer in layers]
    before = [{name: view(parameter).clone() for name, (parameter, view) in of_layer.items()} for of_layer in parts]
    trained = {id(of_layer[name][0]): of_layer[name][0] for of_layer in parts for name in parameters}
    masks = {key: torch.zeros_like(parameter) for key, parameter in trained.items()}
    for of_layer in parts:
        for name in parameters:
            parameter, view = of_layer[name]
            view(masks[id(parameter)]).fill_(1)
    columns = sorted({int(token) for word in label_tokens for token in word}) if readout == "labels" else None
    loss_of = {"gd": _output_loss, "lcgd": _layerwise_loss}[method]
    optimizer = torch.optim.SGD([parameter.requires_grad_() for parameter in trained.values()], lr=lr)
    values = []
    steps = [demonstrations] if schedule == "batch" else [[demonstration] for demonstration in demonstrations]
    with torch.enable_grad():
        for step in [step for _ in range(epochs) for step in steps]:
            optimizer.zero_grad()
            losses = [loss_of(model, each.tokens, token_loss_of(each, loss_on, columns)) for each in step]
            torch.stack(losses).sum().backward()
            values += [loss.detach() for loss in losses]
            for key, parameter in trained.items():
                parameter.grad *= masks[key]
            optimizer.step()
    model.requires_grad_(False)
    deltas = {
        name: [
            view(parameter) - was[name] for of_layer, was in zip(parts, before, strict=True) for parameter, view in [of_layer[name]]
        ]
        for name in PARAMETERS
    }
    return Trained(model, deltas, torch.stack(values))


def reference_capture(
    model: Any, queries: Sequence[Query], context: Sequence[Demonstration] | None = None
) -> dict[str, Tensor | list[Tensor]]:
    """Run every query in its full prompt, by itself, and read what the paper reads at its last token.

    Returns:
        `attn_out [query layer d_model]`; `query_scores`, one `[layer head own_pos]` a query; `context_scores
        [query layer head context_pos]`; `label_log_probs [query label]`; `lens_logits [query layer label]`; `residual
        [query layer d_model]`; `demonstration_attention` and `label_attention [query layer head demonstration]`.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    with torch.no_grad():
        for query in queries:
            prompt = full_prompt(query, context)
            n_before = len(prompt) - len(query.tokens) + 1
            added, residuals, scores = _run(model, prompt)
            found["attn_out"].append(added)
            found["residual"].append(residuals)
            found["query_scores"].append(scores[:, :, n_before:].masked_fill(scores[:, :, n_before:] == -math.inf, 0.0))
            found["context_scores"].append(scores[:, :, 1:n_before])
            whole, labels = _attention_to(context or (), scores.softmax(dim=-1))
            found["demonstration_attention"].append(whole)
            found["label_attention"].append(labels)
            firsts = [int(word[0]) for word in query.label_tokens]
            found["lens_logits"].append(torch.stack([readout_logits(model, residual)[firsts] for residual in residuals]))
            found["label_log_probs"].append(torch.tensor([_label_log_prob(model, prompt, word) for word in query.label_tokens]))
    return {name: rows if name == "query_scores" else torch.stack(rows) for name, rows in found.items()}


def readout_logits(model: Any, residual: Tensor) -> Tensor:
    """The logit lens: the model's own final norm, unembedding and soft cap."""
    logits = model.lm_head(final_norm(model)(residual))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _attention_to(context: Sequence[Demonstration], pattern: Tensor) -> tuple[Tensor, Tensor]:
    """Attention `[layer head demonstration]` to all of a demonstration with its separator, and to its label."""
    whole, labels, start = [pattern.new_empty(*pattern.shape[:2], 0)], [pattern.new_empty(*pattern.shape[:2], 0)], 1
    for demonstration in context:
        end = start + len(demonstration.tokens) - 1
        after = end + len(demonstration.separator)
        whole.append(pattern[:, :, start:after].sum(-1, keepdim=True))
        labels.append(pattern[:, :, end - demonstration.n_label_tokens : end].sum(-1, keepdim=True))
        start = after
    return torch.cat(whole, dim=-1), torch.cat(labels, dim=-1)


def _run(model: Any, prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """At the last token, what attention adds `[layer d_model]`, the residual stream `[layer d_model]`, and the scores before
    softmax `[layer head pos]`, −inf where masked.
    """
    added: list[Tensor] = []
    residuals: list[Tensor] = []
    with ExitStack() as stack:
        for block in blocks(model):
            stack.enter_context(attention_adds(block).register_forward_hook(lambda m, i, out: added.append(_first(out)[0, -1])))
            stack.enter_context(block.register_forward_hook(lambda m, i, out: residuals.append(_first(out)[0, -1])))
        scores = stack.enter_context(_softmax_inputs(len(prompt)))
        model(prompt[None], use_cache=False)
    assert len(added) == len(residuals) == len(scores) == len(blocks(model))
    last = torch.stack([each[0, :, -1] for each in scores])
    # Masked scores have the least finite number added to them, or in their place.
    return torch.stack(added), torch.stack(residuals), last.masked_fill(last < -1e30, -math.inf)


@contextmanager
def _softmax_inputs(n_tokens: int) -> Iterator[list[Tensor]]:
    """What is given to a softmax over pairs of tokens; experts are chosen by one over fewer axes."""
    seen: list[Tensor] = []
    softmax = F.softmax

    def watched(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.ndim == 4 and x.shape[-2:] == (n_tokens, n_tokens):
            seen.append(x.detach().clone())
        return softmax(x, *args, **kwargs)

    with mock.patch.object(F, "softmax", watched):
        yield seen


def _output_loss(model: Any, tokens: Tensor, token_loss: Callable[[Tensor], Tensor]) -> Tensor:
    """GD: the loss at the model's output."""
    return token_loss(model(tokens[None], use_cache=False).logits[0])


def _layerwise_loss(model: Any, tokens: Tensor, token_loss: Callable[[Tensor], Tensor]) -> Tensor:
    """LCGD: every block's input detached, every block's output read out, the losses summed."""
    losses = []

    def cut(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert args or "hidden_states" in kwargs
        if args:
            return (args[0].detach(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach()}

    def read(block: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        losses.append(token_loss(readout_logits(model, _first(out)[0])))

    with ExitStack() as stack:
        for block in blocks(model):
            stack.enter_context(block.register_forward_pre_hook(cut, with_kwargs=True))
            stack.enter_context(block.register_forward_hook(read))
        model(tokens[None], use_cache=False)
    assert len(losses) == len(blocks(model))
    return torch.stack(losses).sum()


def _label_log_prob(model: Any, prompt: Tensor, word: Tensor) -> float:
    """Mean log-likelihood per token of a label word behind a prompt, teacher-forced."""
    log_probs = model(torch.cat([prompt, word])[None], use_cache=False).logits[0].log_softmax(-1)
    return sum(float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(word.tolist())) / len(word)


def _give_biases(at: Any) -> None:
    for linear in (getattr(at, "k_proj", None), getattr(at, "v_proj", None)):
        if linear is not None and linear.bias is None:
            linear.bias = nn.Parameter(linear.weight.new_zeros(len(linear.weight)), requires_grad=False)


def _first(out: Any) -> Tensor:
    """A module's output, or the first of several."""
    return out[0] if isinstance(out, tuple) else out
