"""What a job cannot avoid: the matrix products of its passes alone, and torch's own passes without anything around them.

A *floor* multiplies matrices of the model's own, laid out as suits the product best, with random activations: no norms, softmax,
losses, hooks or graph. Nothing that computes the same numbers by these products can be faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from iclgd_lens.models.hooked import HookedTransformer
from iclgd_lens.models.readout import column_blocks
from iclgd_lens.models.sites import sites_of

Step = Callable[[], object]


@dataclass(frozen=True, eq=False)
class Matrices:
    """The weights of one block as plain matrices."""

    qkv: Float[Tensor, "d_model all_heads"]
    out: Float[Tensor, "heads d_model"]
    mlp_in: Float[Tensor, "d_model d_mlps"]
    mlp_out: Float[Tensor, "d_mlp d_model"]


@dataclass(frozen=True, eq=False)
class Products:
    """The matrix products of passes through a model.

    Attributes:
        model: The model.
        blocks: The weights of its blocks.
    """

    model: HookedTransformer
    blocks: tuple[Matrices, ...]

    @classmethod
    def of(cls, model: HookedTransformer) -> Products:
        """Lay out a model's weights."""
        return cls(model, tuple(_matrices(block) for block in model.blocks))

    def forward(self, batch: int, n_tokens: int, n_before: int = 0) -> Step:
        """A forward pass of so many prompts and tokens behind a cached prefix, without unembedding."""
        cfg, n = self.model.cfg, batch * n_tokens
        x, hidden = self._random(n, cfg.d_model), self._random(n, self.blocks[0].mlp_out.shape[0])
        queries = self._random(batch * cfg.n_heads, n_tokens, cfg.d_head)
        keys = self._random(batch * cfg.n_heads, n_before + n_tokens, cfg.d_head)
        joined = self._random(n, cfg.n_heads * cfg.d_head)

        def step() -> None:
            for block in self.blocks:
                _ = x @ block.qkv
                _ = (queries @ keys.mT) @ keys
                _ = joined @ block.out
                _ = x @ block.mlp_in
                _ = hidden @ block.mlp_out

        return torch.no_grad()(step)

    def backward(self, n_tokens: int, *, through: bool) -> Step:
        """The way from every block's output to its keys and values, for one prompt; and on `through` the block's input."""
        cfg = self.model.cfg
        x, hidden = self._random(n_tokens, cfg.d_model), self._random(n_tokens, self.blocks[0].mlp_in.shape[1])
        heads, pattern = self._random(cfg.n_heads, n_tokens, cfg.d_head), self._random(cfg.n_heads, n_tokens, n_tokens)
        joined = self._random(n_tokens, self.blocks[0].qkv.shape[1])

        def step() -> None:
            for block in self.blocks:
                _ = x @ block.mlp_out.T
                _ = hidden @ block.mlp_in.T
                _ = x @ block.out.T
                _ = (heads @ heads.mT, pattern.mT @ heads, pattern.mT @ heads)
                if through:
                    _ = pattern @ heads
                    _ = joined @ block.qkv.T

        return torch.no_grad()(step)

    def readout(self, n_tokens: int, *, backward: bool) -> Step:
        """Unembeddings of so many tokens, and on `backward` their transposes, some columns at a time."""
        weight = self.model.unembed.W_U.detach()
        x, logits = self._random(n_tokens, weight.shape[0]), self._random(n_tokens, weight.shape[1])

        def step() -> None:
            for columns, of_columns in column_blocks(weight):
                _ = x @ of_columns
                if backward:
                    _ = logits[:, columns] @ of_columns.T

        return torch.no_grad()(step)

    def _random(self, *shape: int) -> Tensor:
        cfg = self.model.cfg
        return torch.randn(*shape, dtype=cfg.dtype, device=cfg.device)


def in_turn(steps: Sequence[Step]) -> Step:
    """All of these, one after the other."""

    def run() -> None:
        for step in steps:
            step()

    return run


def forward_passes(model: HookedTransformer, prompts: Sequence[Int[Tensor, "_pos"]]) -> None:
    """A plain forward pass of every prompt by itself, without unembedding."""
    with torch.no_grad():
        for tokens in prompts:
            model(tokens[None].to(model.cfg.device), return_type=None)


def output_passes(model: HookedTransformer, prompts: Sequence[Int[Tensor, "_pos"]]) -> None:
    """Torch's own forward and backward pass of every prompt, from the loss at the output to all keys and values."""
    norm: Any = model.ln_final if model.cfg.normalization_type is not None else torch.nn.Identity()
    for tokens in prompts:
        targets = tokens[1:].to(model.cfg.device)
        projected: list[Tensor] = []
        residual: Any = None
        with torch.enable_grad(), model.hooks(fwd_hooks=_leaves(model, projected, first_only=True)):
            residual = model(tokens[None].to(model.cfg.device), stop_at_layer=model.cfg.n_layers)
            # Not by model.unembed, which copies W_U at every call.
            logits = norm(residual[:, :-1])[0] @ model.unembed.W_U + model.unembed.b_U
            torch.autograd.grad(F.cross_entropy(logits, targets), projected)


def layerwise_passes(model: HookedTransformer, prompts: Sequence[Int[Tensor, "_pos"]]) -> None:
    """Torch's own forward and backward pass of every prompt and block, from the block's output to its keys and values."""
    for tokens in prompts:
        projected: list[Tensor] = []
        with torch.enable_grad(), model.hooks(fwd_hooks=_leaves(model, projected, first_only=False)):
            embedded: Any = model.input_to_embed(tokens[None].to(model.cfg.device))
            residual = embedded[0]
            for block in model.blocks:
                residual = block(residual.detach())
                torch.autograd.grad(residual, projected, grad_outputs=torch.ones_like(residual))
                projected.clear()


def _leaves(model: HookedTransformer, projected: list[Tensor], *, first_only: bool) -> list[Any]:
    """Hooks that hold on to keys and values; those of the first layer, or of all, are leaves where backward stops."""

    def hold(tensor: Tensor, hook: Any) -> Tensor:
        projected.append(tensor)
        return tensor

    def cut(tensor: Tensor, hook: Any) -> Tensor:
        return hold(tensor.detach().requires_grad_(), hook)

    sites = sites_of(model)
    return [
        (name, hold if first_only and layer else cut)
        for layer in range(sites.n_layers)
        for name in (sites.keys[layer], sites.values[layer])
    ]


def _matrices(block: Any) -> Matrices:
    attention, mlp = block.attn, block.mlp
    weights = dict(attention.named_parameters())
    # Where attention is grouped, keys and values are stored by their own heads.
    stored = [weights[name if name in weights else f"_{name}"] for name in ("W_Q", "W_K", "W_V")]
    flat = [rearrange(weight.detach(), "head d_model d_head -> d_model (head d_head)") for weight in stored]
    mlp_in = [mlp.W_in] + ([mlp.W_gate] if hasattr(mlp, "W_gate") else [])
    return Matrices(
        qkv=torch.cat(flat, dim=1),
        out=rearrange(attention.W_O.detach(), "head d_head d_model -> (head d_head) d_model"),
        mlp_in=torch.cat([weight.detach() for weight in mlp_in], dim=1) if len(mlp_in) > 1 else mlp.W_in.detach(),
        mlp_out=mlp.W_out.detach(),
    )
