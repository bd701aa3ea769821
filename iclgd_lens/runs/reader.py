"""The hooks that read a run, and the buffers that they fill, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from iclgd_lens.data.prompts import ContextLayout
from iclgd_lens.models.precision import wide, wide_dtype
from iclgd_lens.models.readout import LogitLens
from iclgd_lens.models.sites import HookSites, NamedHook
from iclgd_lens.models.sites.base import Keys, LastQuery
from iclgd_lens.runs.activations import Kept
from iclgd_lens.runs.prefix import Prefix
from iclgd_lens.tensor_draws import normal, seeded

SUMS: tuple[Kept, ...] = (
    "label_log_probs",
    "head_out",
    "demonstration_out",
    "demonstration_attention",
    "label_attention",
    "own_pattern",
    "score_gradients",
)
"""What is kept in at least float32; the rest is kept in the model's dtype."""

GRADIENT_TOLERANCE, HALF_GRADIENT_TOLERANCE = 1e-3, 0.1
"""How far gradients may be from what attribution takes them to be, relative to the sizes that go into them: by rounding in float32
or better, and in half precision."""


class Reader:
    """The buffers that a capture fills.

    Args:
        sites: Where the model is read.
        prefix: What the queries come after.
        wanted: What is to be kept.
        bodies: The queries' tokens after the prefix.
        label_tokens: The tokens of each label word.
        layout: Which demonstration each token of the prefix belongs to, where it holds any.
    """

    def __init__(
        self,
        sites: HookSites,
        prefix: Prefix,
        wanted: Sequence[Kept],
        bodies: Sequence[Int[Tensor, "_pos"]],
        label_tokens: tuple[Int[Tensor, "_label_pos"], ...],
        layout: ContextLayout | None,
    ) -> None:
        cfg, n, longest = sites.model.cfg, len(bodies), max(map(len, bodies))
        self.sites, self.n_before, self.bodies = sites, prefix.length, bodies
        self.label_tokens = tuple(tokens.to(cfg.device) for tokens in label_tokens)
        self.output = LogitLens.of(sites.model)
        if label_tokens:
            self.lens = LogitLens.of(sites.model, torch.stack([tokens[0] for tokens in self.label_tokens]))
        # Behind no prefix, BOS is a token of the body, and none of the query.
        longest_query = longest - (prefix.length == 0)
        n_demonstrations = 0
        if layout is not None:
            belongs = torch.nn.functional.one_hot(layout.demonstration).to(cfg.device, wide_dtype(cfg.dtype))
            n_demonstrations = belongs.shape[1]
            self.spans = {"demonstration_attention": belongs, "label_attention": belongs * layout.is_label.to(belongs)[:, None]}
        heads, kv_heads, layers = cfg.n_heads, sites.n_kv_heads, sites.n_layers
        shapes: dict[Kept, tuple[int, ...]] = {
            "attn_out": (n, layers, cfg.d_model),
            "query_scores": (n, layers, heads, longest_query),
            "context_scores": (n, layers, heads, prefix.length - 1),
            "label_log_probs": (n, len(label_tokens)),
            "lens_logits": (n, layers, len(label_tokens)),
            "residual": (n, layers, cfg.d_model),
            "head_out": (n, layers, heads, cfg.d_head),
            "demonstration_out": (n, layers, heads, cfg.d_head),
            "demonstration_attention": (n, layers, heads, n_demonstrations),
            "label_attention": (n, layers, heads, n_demonstrations),
            "own_pattern": (n, layers, heads, longest),
            "own_inputs": (n, layers, longest, cfg.d_model),
            "own_values": (n, layers, longest, kv_heads, cfg.d_head),
            "score_gradients": (n, layers, longest, heads, cfg.d_head),
        }
        self.kept: dict[str, Tensor] = {
            name: torch.zeros(shapes[name], dtype=wide_dtype(cfg.dtype) if name in SUMS else cfg.dtype, device=cfg.device)
            for name in wanted
        }
        lengths = torch.tensor([len(body) - (prefix.length == 0) for body in bodies], device=cfg.device)
        self.query_mask = torch.arange(longest_query, device=cfg.device) >= longest_query - lengths[:, None]

    def read(self, rows: Int[Tensor, "batch"], prefix: Prefix) -> None:
        """Run some of the queries together and keep what is wanted of them.

        Args:
            rows: Which of them.
            prefix: What they come after: the prefix that the reader was made with, or the same without its cache.
        """
        bodies = [self.bodies[row] for row in rows.tolist()]
        batch = _Batch(self, prefix, rows, max(map(len, bodies)))
        final: list[Float[Tensor, "batch d_model"]] = []
        hooks: list[NamedHook] = []
        for layer in range(self.sites.n_layers):
            hooks += batch.hooks(layer)
        if "label_log_probs" in self.kept:
            hooks.append((self.sites.residual_out[-1], lambda residual, hook: final.append(residual[:, -1].detach())))
        gradients: AbstractContextManager[Any] = torch.enable_grad() if "score_gradients" in self.kept else nullcontext()
        with gradients, self.sites.attach(batch.leaves()):
            prefix.continue_with(bodies, hooks)
        batch.require_plain_attention()
        if final:
            self.kept["label_log_probs"][rows] = self._score_labels(prefix, bodies, final[0])

    def _score_labels(
        self, prefix: Prefix, bodies: list[Int[Tensor, "_pos"]], final: Float[Tensor, "batch d_model"]
    ) -> Float[Tensor, "batch label"]:
        """Mean log-likelihood of every label word's tokens; a word's later tokens are read after its earlier ones."""
        first = self._log_probs(final)

        def score(tokens: Int[Tensor, "label_pos"]) -> Float[Tensor, "batch"]:
            total = first[:, tokens[0]].clone()
            changed = self._with_other_frequencies(bodies, len(tokens))
            rows = [row for row in range(len(bodies)) if row not in changed]
            if rows and len(tokens) > 1:
                total[rows] += self._rest_log_prob(prefix, [bodies[row] for row in rows], tokens)
            for row in changed:
                total[row] = self._sum_of_whole(prefix, bodies[row], tokens)
            return total / len(tokens)

        return torch.stack([score(tokens) for tokens in self.label_tokens], dim=-1)

    def _with_other_frequencies(self, bodies: list[Int[Tensor, "_pos"]], n_label: int) -> list[int]:
        """The prompts whose rotary frequencies are others once a label word comes after them."""
        at = self.sites.frequencies_at
        lengths = [self.n_before + len(body) for body in bodies]
        return [row for row, length in enumerate(lengths) if at(length) != at(length + n_label)]

    def _sum_of_whole(self, prefix: Prefix, body: Int[Tensor, "pos"], tokens: Int[Tensor, "label_pos"]) -> Float[Tensor, ""]:
        """Summed log-likelihood of a label word's tokens, the prompt and the word being run whole, as one sequence."""
        seen: list[Float[Tensor, "label_pos d_model"]] = []
        keep = (self.sites.residual_out[-1], lambda residual, hook: seen.append(residual[0, -len(tokens) - 1 : -1]))
        prefix.whole().continue_with([torch.cat([body, tokens.to(body.device)])], [keep])
        return self._log_probs(seen[0]).gather(-1, tokens[:, None]).sum()

    def _rest_log_prob(
        self, prefix: Prefix, bodies: list[Int[Tensor, "_pos"]], tokens: Int[Tensor, "label_pos"]
    ) -> Float[Tensor, "batch"]:
        """Summed log-likelihood of a label word's tokens after the first."""
        seen: list[Float[Tensor, "batch label_pos d_model"]] = []
        n_rest = len(tokens) - 1
        keep_last = (self.sites.residual_out[-1], lambda residual, hook: seen.append(residual[:, -n_rest:]))
        prefix.continue_with([torch.cat([body, tokens[:-1].to(body.device)]) for body in bodies], [keep_last])
        log_probs = self._log_probs(seen[0])
        targets = tokens[1:].expand(len(bodies), -1)
        return log_probs.gather(-1, targets[..., None]).squeeze(-1).sum(-1)

    def _log_probs(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        return wide(self.output(residual)).log_softmax(dim=-1)


class _Batch:
    """The hooks that read one batch of queries into the buffers of a reader."""

    def __init__(self, reader: Reader, prefix: Prefix, rows: Int[Tensor, "batch"], width: int) -> None:
        self.reader, self.prefix, self.rows, self.width = reader, prefix, rows, width
        self.sites, self.kept = reader.sites, reader.kept
        # What gradients are taken of, layer by layer, and dropped with the layer.
        self.seen: list[dict[str, Tensor]] = [{} for _ in range(self.sites.n_layers)]
        # Per layer, whether gradients were as they should be; asked once, at the end, so that no layer waits for a GPU.
        self.as_expected: list[Bool[Tensor, "projection"]] = []
        # Per layer, whether heads put out their pattern times the values.
        self.mixed_as_expected: list[Bool[Tensor, "1"]] = []
        mask = reader.query_mask[rows]
        # A prompt's own tokens: behind no prefix, its BOS stands just before the first token of the query.
        self.own_mask = (torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1) if self.prefix.length == 0 else mask)[:, -width:]

    def leaves(self) -> list[NamedHook]:
        """The hooks that make leaves of keys and values, as the projections put them out: before any other hook."""
        if "score_gradients" not in self.kept:
            return []
        return [
            hook
            for layer, seen in enumerate(self.seen)
            for hook in (
                (self.sites.keys[layer], self._leaf("keys", seen)),
                (self.sites.values[layer], self._leaf("values", seen)),
            )
        ]

    def hooks(self, layer: int) -> list[NamedHook]:
        """The hooks for what is wanted of one layer."""
        sites, wants = self.sites, self.kept.keys()
        before = self.prefix.keys(layer)
        in_front = self.own_mask.new_ones(len(self.own_mask), self.prefix.length if before is None else 0)
        keys = Keys(before, torch.cat([in_front, self.own_mask], dim=1))
        hooks: list[NamedHook] = []

        def at(name: str, read: Callable[[int, Tensor], Tensor | None], *kept: Kept) -> None:
            if wants & set(kept):
                hooks.append((name, lambda tensor, hook: read(layer, tensor)))

        # Gradients are taken layer by layer, so that no more than one layer's graph is held.
        at(sites.residual_in[layer], lambda _, residual: residual.detach(), "score_gradients")
        at(sites.attention_out[layer], self._last("attn_out"), "attn_out")
        at(sites.residual_out[layer], self._last("residual"), "residual")
        at(sites.head_out[layer], self._last("head_out"), "head_out")
        at(sites.projection_in[layer], self._inputs, "own_inputs")
        at(sites.values[layer], self._values, "own_values")
        if "score_gradients" in wants:
            seen = self.seen[layer]
            hooks += sites.at_scores(layer, keys, self._score_gradients(seen, layer))
            hooks.append((sites.values[layer], lambda values, hook: seen.update(attended=values.detach())))
            hooks += sites.at_pattern(layer, keys, lambda last: seen.update(pattern=last.detach()))
            hooks.append((sites.head_out[layer], self._check_heads(seen, layer)))
        if wants & {"query_scores", "context_scores"}:
            hooks += sites.at_scores(layer, keys, lambda last: self._scores(layer, last.detach()))
        if wants & {"own_pattern", "demonstration_attention", "label_attention", "demonstration_out"}:
            hooks += self._attention_parts(layer, keys)
        at(sites.residual_out[layer], self._lens, "lens_logits")
        return hooks

    def _last(self, name: Kept) -> Callable[[int, Tensor], None]:
        def keep(layer: int, seen: Float[Tensor, "batch pos *rest"]) -> None:
            self.kept[name][self.rows, layer] = seen[:, -1].detach().to(self.kept[name])

        return keep

    def _scores(self, layer: int, last: Float[Tensor, "batch head key_pos"]) -> None:
        if "query_scores" in self.kept:
            width = min(self.width, self.reader.query_mask.shape[1])
            mask = self.reader.query_mask[self.rows][:, None, -width:]
            own = last[:, :, -width:]
            self.kept["query_scores"][self.rows, layer, :, -width:] = own.masked_fill(~mask | own.isinf(), 0.0)
        if "context_scores" in self.kept:
            self.kept["context_scores"][self.rows, layer] = last[:, :, 1 : self.prefix.length]

    def _attention_parts(self, layer: int, keys: Keys) -> list[NamedHook]:
        """The hooks that read a layer's pattern, and with it what heads make of demonstrations."""
        seen: dict[str, Tensor] = {}
        at_pattern = self.sites.at_pattern(layer, keys, lambda last: seen.update(pattern=wide(last.detach())))
        # A pattern may be at hand only once keys are, before values are: what is made of both waits for the heads' output.
        at_values = (self.sites.values[layer], lambda values, hook: seen.update(values=values.detach()))
        at_heads = (self.sites.head_out[layer], lambda heads, hook: self._pattern(layer, seen, heads.detach()))
        return [*at_pattern, at_values, at_heads]

    def _pattern(self, layer: int, seen: dict[str, Float[Tensor, "..."]], heads: Float[Tensor, "batch pos head d_head"]) -> None:
        last, n_before = seen["pattern"], self.prefix.length
        context = last[:, :, 1:n_before]
        for name in self.kept.keys() & {"demonstration_attention", "label_attention"}:
            self.kept[name][self.rows, layer] = context @ self.reader.spans[name]
        if "demonstration_out" in self.kept:
            before, own = self.prefix.values(layer), wide(seen["values"])
            if before is None:  # prompts run whole, and the values of what they begin with are among their own
                from_context = _attended(context, own[:, 1:n_before])
                from_all = _attended(last, own)
            else:
                shared = wide(before)[None]
                from_context = _attended(context, shared[:, 1:])
                from_all = _attended(last[:, :, :n_before], shared) + _attended(last[:, :, n_before:], own)
            self.kept["demonstration_out"][self.rows, layer] = from_context
            self.mixed_as_expected.append(_are_close(from_all, wide(heads[:, -1]), heads.dtype))
        if "own_pattern" in self.kept:
            self.kept["own_pattern"][self.rows, layer, :, -self.width :] = last.masked_fill(~self.own_mask[:, None], 0.0)
        seen.clear()

    def _inputs(self, layer: int, seen: Float[Tensor, "batch pos d_model"]) -> None:
        self._keep_own("own_inputs", layer, seen.detach())

    def _values(self, layer: int, values: Float[Tensor, "batch pos kv_head d_head"]) -> None:
        self._keep_own("own_values", layer, values.detach())

    def _keep_own(self, name: Kept, layer: int, own: Float[Tensor, "batch pos *rest"]) -> None:
        mask = self.own_mask.view(*self.own_mask.shape, *[1] * (own.ndim - 2))
        self.kept[name][self.rows, layer, -self.width :] = own.masked_fill(~mask, 0.0).to(self.kept[name])

    def _leaf(self, kind: Literal["keys", "values"], seen: dict[str, Tensor]) -> Callable[..., Tensor]:
        def cut(projected: Float[Tensor, "batch pos kv_head d_head"], hook: Any) -> Tensor:
            seen[kind] = projected.detach().requires_grad_()
            return seen[kind]

        return cut

    def _score_gradients(self, seen: dict[str, Tensor], layer: int) -> LastQuery:
        def take(last: Float[Tensor, "batch head key_pos"]) -> None:
            keys = seen["keys"]
            finite = last.masked_fill(last.isinf(), 0.0)
            # A key's gradient is a sum over the heads that share it, so each head of a group has a pass of its own.
            groups = rearrange(finite, "batch (kv_head group) pos -> group batch kv_head pos", kv_head=keys.shape[2])
            found = [torch.autograd.grad(group.sum(), keys, retain_graph=True)[0] for group in groups]
            seen["gradients"] = rearrange(torch.stack(found), "group batch pos kv_head d_head -> batch pos (kv_head group) d_head")
            self._keep_own("score_gradients", layer, seen["gradients"])

        return take

    def _check_heads(self, seen: dict[str, Tensor], layer: int) -> Callable[..., Tensor]:
        """Check on the graph itself that a head's output z is `Σⱼ A(q, j) vⱼ` with A the softmax of its scores, as attribution has
        it: in a random direction r, its gradients by values and keys must be `A(q, j) r` and `A(q, j) ⟨r, vⱼ − z⟩ ∂s(q, j)/∂kⱼ`.
        """

        def check(out: Float[Tensor, "batch pos head d_head"], hook: Any) -> Tensor:
            heads, kv_heads = out.shape[2], seen["keys"].shape[2]
            last, gradients, pattern = wide(out[:, -1].detach()), wide(seen["gradients"]), wide(seen["pattern"])
            values = repeat(
                wide(seen["attended"]), "batch pos kv_head d_head -> batch pos (kv_head group) d_head", group=heads // kv_heads
            )
            direction = normal(seeded(layer), *last.shape[1:]).to(last)
            along = einsum(values - last[:, None], direction, "batch pos head d_head, head d_head -> batch pos head")
            weights = rearrange(pattern, "batch head pos -> batch pos head 1")
            expected = (weights * direction, weights * along[..., None] * gradients)
            # Of what size rounding may be: keys' gradients are differences, and may cancel.
            spread = (values.norm(dim=-1) + last.norm(dim=-1)[:, None])[..., None] * direction.norm(dim=-1)[:, None]
            scales = (weights * direction, weights * spread * gradients)
            leaves = [seen["values"], seen["keys"]]
            found = tuple(map(torch.zeros_like, leaves))
            if out.requires_grad:
                component = (out[:, -1] * direction.to(out)).sum()
                found = torch.autograd.grad(component, leaves, allow_unused=True, materialize_grads=True)
            summing = "batch pos (kv_head group) d_head -> batch pos kv_head d_head"
            tolerance = GRADIENT_TOLERANCE if out.dtype == last.dtype else HALF_GRADIENT_TOLERANCE
            self.as_expected.append(
                torch.stack(
                    [
                        (wide(real) - reduce(wanted, summing, "sum", kv_head=kv_heads)).norm() <= tolerance * scale.norm()
                        for real, wanted, scale in zip(found, expected, scales, strict=True)
                    ]
                )
            )
            seen.clear()
            return out.detach()

        return check

    def require_plain_attention(self) -> None:
        """Check that attention in every layer was what is made of its parts takes it to be.

        Raises:
            ValueError: If not, naming the first layer.
        """
        for kept, found in (("score_gradients", self.as_expected), ("demonstration_out", self.mixed_as_expected)):
            if not found:
                continue
            edited = ~torch.stack(found).all(dim=1)
            if bool(edited.any()):
                layer = int(edited.nonzero()[0, 0])
                raise ValueError(
                    f"attention in layer {layer} does not hand the output projection the softmax of its scores times what the "
                    "value projection puts out: a hook edits something between them, or the model has a module there, such as a "
                    "norm or "
                    f"a gate after the heads. What demonstrations and tokens contribute cannot be told then; take the hook off, or "
                    f"capture without {kept}"
                )

    def _lens(self, layer: int, residual: Float[Tensor, "batch pos d_model"]) -> None:
        self.kept["lens_logits"][self.rows, layer] = self.reader.lens(residual[:, -1].detach())


def _attended(
    pattern: Float[Tensor, "batch head pos"], values: Float[Tensor, "#batch pos kv_head d_head"]
) -> Float[Tensor, "batch head d_head"]:
    """`Σⱼ A(q, j) vⱼ` for every head."""
    grouped = rearrange(pattern, "batch (kv_head group) pos -> batch kv_head group pos", kv_head=values.shape[2])
    by_head = rearrange(values, "batch pos kv_head d_head -> batch kv_head pos d_head")
    return (grouped @ by_head).flatten(1, 2)


def _are_close(
    a: Float[Tensor, "batch head d_head"], b: Float[Tensor, "batch head d_head"], stored: torch.dtype
) -> Bool[Tensor, "1"]:
    """Whether vectors are the same but for rounding, which is relative to the longest."""
    tolerance = GRADIENT_TOLERANCE if stored == a.dtype else HALF_GRADIENT_TOLERANCE
    longest = torch.maximum(a.norm(dim=-1), b.norm(dim=-1)).max()
    return ((a - b).norm(dim=-1).max() <= tolerance * longest)[None]
