"""Does a hooked model compute what the Hugging Face model does that it was made of?

A configuration may say something that TransformerLens does not read: a base of rotary positions, a scale of logits, a window. The
two are run on a short prompt and on one that is longer than every window, and than every length at which the model changes; see
`lengths.lengths_of_change`. Tokens are drawn at random, by a seed of their own. Of the long prompt the last positions alone are
read out, so no logits of the whole prompt are ever held.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from iclgd_lens.models.hooked import HookedModel, is_bridge
from iclgd_lens.models.lengths import context_window, lengths_of_change, text_config
from iclgd_lens.models.readout import LogitLens
from iclgd_lens.models.sites import sites_of

SAME_OUTPUTS = {64: 1e-5, 32: 1e-4, 16: 0.05}
"""How much log-probabilities may differ between a model and its conversion, relative to the largest, by the bits of its dtype."""

SHORT, LONG = 24, 256
"""Tokens of the short prompt, and at least how many the long one has where the context window is that long."""

BEYOND = 8
"""How many tokens the long prompt has beyond the last length of change; as many positions at its end are compared."""

LONGEST = 8_448
"""The most tokens of a prompt at loading. Eager attention holds a matrix of their square for each head."""

_logger = logging.getLogger(__name__)


def comparison_prompts(config: Any, n_ctx: int) -> tuple[Int[Tensor, "1 _pos"], ...]:
    """The prompts, one or two, of a comparison.

    Args:
        config: The configuration of the Hugging Face model.
        n_ctx: The longest prompt that both models can read, in tokens.

    Returns:
        The short prompt, and a longer one where `n_ctx` allows it. A length of change that would take more than `LONGEST` tokens
        is left out, and the log says so.
    """
    changes = lengths_of_change(config)
    within = [length for length in changes if length + BEYOND <= LONGEST]
    if len(within) < len(changes) and within != [length for length in changes if length < n_ctx]:
        _logger.warning(
            "this model changes at prompts of %d tokens, and at loading outputs are compared on shorter ones alone; "
            "compare outputs on a prompt that long before relying on any",
            changes[len(within)],
        )
    longest = min(n_ctx, max(LONG, *(length + BEYOND for length in within), 0))
    known = _ordinary_tokens(config)
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randint(len(known), (1, longest), generator=generator, device="cpu")
    tokens = known[drawn]
    return (tokens[:, :SHORT],) if longest <= SHORT else (tokens[:, :SHORT], tokens)


def hugging_face_outputs(
    hf_model: Any, prompts: tuple[Int[Tensor, "1 _pos"], ...]
) -> tuple[Float[Tensor, "1 _last_pos token"], ...]:
    """The log-probabilities of a Hugging Face model at each prompt's last positions, in float32 on the CPU or wider."""
    found = []
    with torch.no_grad(), rotary_state_kept(hf_model):
        for tokens in prompts:
            last = tokens.shape[1] if tokens.shape[1] <= SHORT else BEYOND
            found.append(_log_probs(hf_model(tokens.to(hf_model.device), **_options(hf_model, last)).logits[:, -last:]))
    return tuple(found)


def require_same_outputs(
    model: HookedModel,
    prompts: tuple[Int[Tensor, "1 _pos"], ...],
    expected: tuple[Float[Tensor, "1 _last_pos token"], ...],
    what: str,
) -> None:
    """Check that a model and its readout compute, at each prompt's last positions, what the Hugging Face model does.

    Args:
        model: The hooked model.
        prompts: As `comparison_prompts` makes them.
        expected: What `hugging_face_outputs` found on them.
        what: The model, as a message names it.

    Raises:
        ValueError: If log-probabilities differ by more than `SAME_OUTPUTS`, or either is not finite.
    """
    largest = 0.0
    for tokens, theirs in zip(prompts, expected, strict=True):
        for ours in _outputs(model, tokens, theirs.shape[1]):
            difference = float((ours - theirs).abs().max() / theirs.abs().max())
            if not difference < SAME_OUTPUTS[torch.finfo(model.cfg.dtype).bits]:
                raise ValueError(
                    f"{what} comes out as another model, with log-probabilities that are {difference:.1e} off on a prompt of "
                    f"{tokens.shape[1]} tokens: TransformerLens does not read all of its configuration"
                )
            largest = max(largest, difference)
    lengths = " and ".join(str(tokens.shape[1]) for tokens in prompts)
    _logger.info("%s: log-probabilities are Hugging Face's to %.0e, on prompts of %s tokens", what, largest, lengths)


def shared_window(config: Any, n_ctx: int | None = None) -> int:
    """How many tokens a prompt may have in a Hugging Face model and a hooked model of context window `n_ctx`."""
    return min(length for length in (context_window(config), n_ctx, LONGEST) if length is not None)


@contextmanager
def rotary_state_kept(model: nn.Module) -> Iterator[None]:
    """Give a model the rotary frequencies back that it came with: some are made anew by a run, and stay for the next."""
    rotary = [module for module in model.modules() if any(name.endswith("inv_freq") for name in module._buffers)]
    before = [
        (
            {name: (buffer, buffer.clone()) for name, buffer in module._buffers.items() if buffer is not None},
            {name: value for name, value in vars(module).items() if name.endswith(("max_seq_len_cached", "attention_scaling"))},
        )
        for module in rotary
    ]
    try:
        yield
    finally:
        for module, (buffers, settings) in zip(rotary, before, strict=True):
            for name, (buffer, values) in buffers.items():
                module._buffers[name] = buffer.copy_(values)
            vars(module).update(settings)


def _outputs(model: Any, tokens: Int[Tensor, "1 pos"], last: int) -> Iterator[Float[Tensor, "1 last_pos token"]]:
    """A hooked model's log-probabilities at a prompt's last positions: its own and, by its last residual stream, the readout's.

    A `HookedTransformer` makes logits of all positions or of none, so of a long prompt its readout alone is used.
    """
    tokens = tokens.to(model.cfg.device)
    with torch.no_grad(), rotary_state_kept(model):
        if is_bridge(model):
            sites, seen = sites_of(model), list[Tensor]()
            with sites.attach([(sites.residual_out[-1], lambda residual, hook: seen.append(residual))]):
                yield _log_probs(model(tokens, **_options(model.original_model, last))[:, -last:])
            residual = seen[0]
        else:
            if tokens.shape[1] == last:
                yield _log_probs(model(tokens))
            residual = model(tokens, stop_at_layer=model.cfg.n_layers)
        yield _log_probs(LogitLens.of(model)(residual[:, -last:]))


def _options(hf_model: Any, last: int) -> dict[str, Any]:
    """What a model is told so that it makes no more than is compared, where it can be told so."""
    accepted = inspect.signature(hf_model.forward).parameters
    return {name: value for name, value in (("use_cache", False), ("logits_to_keep", last)) if name in accepted}


def _log_probs(logits: Float[Tensor, "1 pos token"]) -> Float[Tensor, "1 pos token"]:
    logits = logits.cpu()
    return logits.log_softmax(dim=-1) if logits.dtype == torch.float64 else logits.float().log_softmax(dim=-1)


def _ordinary_tokens(config: Any) -> Int[Tensor, "token"]:
    """The vocabulary without the tokens that configurations give a meaning, such as an image's place."""
    named = {**vars(config), **vars(text_config(config))}
    special = {value for name, value in named.items() if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)}
    known = [token for token in range(text_config(config).vocab_size) if token not in special]
    return torch.tensor(known, device="cpu")
