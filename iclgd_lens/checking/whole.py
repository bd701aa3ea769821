"""Whole prompts on the hooked model, one at a time: no cached prefix, no padding, nothing of `capture`.

What `capture` and the updates promise is compared with these runs, in which hooks read the places that `sites_of` names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge.generalized_components.joint_qkv_attention import JointQKVAttentionBridge
from transformer_lens.model_bridge.generalized_components.position_embeddings_attention import PositionEmbeddingsAttentionBridge

from iclgd_lens.checking.plain import PlainModel
from iclgd_lens.checking.prompts import Prompts
from iclgd_lens.data.prompts import Demonstration, Query, context_tokens
from iclgd_lens.models.hooked import HookedModel, is_bridge
from iclgd_lens.models.precision import wide
from iclgd_lens.models.readout import LogitLens
from iclgd_lens.models.sites import HookSites, NamedHook, sites_of

Result = TypeVar("Result")


@dataclass(eq=False)
class Subject:
    """The model that is checked, and how much it has run.

    Attributes:
        model: The hooked model.
        sites: The names of its places.
        plain: The plain model.
        prompts: Draws prompts for it.
        tokens: How many tokens ran so far, of all prompts together.
        longest: How many tokens the longest prompt had.
        known: What two rows need, and is computed once.
    """

    model: HookedModel
    sites: HookSites
    plain: PlainModel
    prompts: Prompts
    tokens: int = field(default=0)
    longest: int = field(default=0)
    known: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: HookedModel, longest: int) -> Subject:
        """Look at a model, without running it.

        Raises:
            TypeError: If the model is neither a `HookedTransformer` nor a `TransformerBridge`.
            ValueError: If it is one that the package refuses.
        """
        return cls(model, sites_of(model), PlainModel.of(model), Prompts.of(model, longest))

    @property
    def score_places(self) -> tuple[str, ...]:
        """The hooks at attention scores; none where Hugging Face's own attention runs, whose hook there sees something else."""
        blocks: Any = self.model.blocks  # type: ignore[attr-defined]
        step_by_step = (JointQKVAttentionBridge, PositionEmbeddingsAttentionBridge)
        return self.sites.scores if not is_bridge(self.model) or isinstance(blocks[0].attn, step_by_step) else ()

    def once(self, key: Any, compute: Callable[[], Result]) -> Result:
        """What a computation gave when it was first asked for."""
        if key not in self.known:
            self.known[key] = compute()
        found: Result = self.known[key]
        return found

    def count(self, *prompts: Int[Tensor, "..."]) -> None:
        """Count the tokens of prompts that run."""
        for tokens in prompts:
            self.tokens += tokens.numel()
            self.longest = max(self.longest, tokens.shape[-1])

    def run(self, tokens: Int[Tensor, "pos"], hooks: Sequence[NamedHook]) -> None:
        """Run one whole prompt on the hooked model, for what hooks see."""
        self.count(tokens)
        batch = tokens[None].to(self.model.cfg.device)
        options: dict[str, Any] = {"use_cache": False} if is_bridge(self.model) else {}
        with torch.no_grad(), self.model.hooks(fwd_hooks=list(hooks)):
            self.model(batch, attention_mask=torch.ones_like(batch), return_type=None, **options)

    def read(self, tokens: Int[Tensor, "pos"], *places: Sequence[str]) -> list[list[Tensor]]:
        """Run one whole prompt, and return what every layer's hook saw at some places: a list of layers for each place."""
        seen: list[list[Tensor]] = [[] for _ in places]
        hooks = [(name, _keep(into)) for into, place in zip(seen, places, strict=True) for name in place]
        self.run(tokens, hooks)
        return seen

    def plain_logits(self, tokens: Int[Tensor, "pos"], last: int | None = None) -> Float[Tensor, "last d_vocab"]:
        """Run one whole prompt on the plain model."""
        self.count(tokens)
        with torch.no_grad():
            return self.plain.logits(tokens[None].to(self.model.cfg.device), last)[0]

    def read_out(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """Log-probabilities as the package reads them out of the residual stream."""
        with torch.no_grad():
            return log_probs(LogitLens.of(self.model)(residual))


def _keep(into: list[Tensor]) -> Callable[..., None]:
    return lambda tensor, hook: into.append(tensor[0].detach())


def log_probs(logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch d_vocab"]:
    """Log-softmax in at least float32."""
    return wide(logits).log_softmax(dim=-1)


def prompt_of(query: Query, context: Sequence[Demonstration] | None) -> Int[Tensor, "pos"]:
    """The whole prompt of a query."""
    return query.tokens if context is None else torch.cat([context_tokens(context), query.tokens[1:]])


def largest_error(
    ours: Float[Tensor, "*shape"], theirs: Float[Tensor, "*shape"], scale: Float[Tensor, "..."] | None = None
) -> float:
    """The largest difference, relative to the largest entry of the reference, or of a scale."""
    difference = wide(ours.detach()) - wide(theirs.detach()).to(ours.device)
    size = wide((theirs if scale is None else scale).detach()).abs().max()
    return float(difference.abs().max() / size.to(difference).clamp_min(torch.finfo(difference.dtype).tiny))


def worst(errors: Sequence[float]) -> float:
    """The largest error; NaN if one is NaN."""
    return float(torch.tensor(errors, dtype=torch.float64, device="cpu").max()) if errors else float("nan")
