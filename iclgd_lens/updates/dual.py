"""Updates in dual form: what gradient steps did, kept as the training tokens that they were made from.

A gradient step on a linear map is a sum over the tokens it was trained on, `ΔW = Σᵢ xᵢ ⊗ eᵢ` with `xᵢ` the map's input and
`eᵢ = −lr · ∂loss/∂output` at token i (Irie et al. 2022, section 2; Aizerman et al. 1964). A `ParameterUpdate` keeps the pairs, so
it can be injected without touching a weight, materialised as ΔW, or attributed to single demonstration tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from iclgd_lens.checks import is_whole, require_count, require_not_negative, require_one_of
from iclgd_lens.files import written_whole
from iclgd_lens.models.fingerprint import fingerprint
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.models.precision import wide
from iclgd_lens.models.sites import NamedHook, sites_of
from iclgd_lens.models.surroundings import without_autocast
from iclgd_lens.runs.activations import Activations
from iclgd_lens.updates.attribution import Attribution, attribute
from iclgd_lens.updates.inject import Parameter, injection_hooks
from iclgd_lens.updates.sound import AXES, require_sound

Method = Literal["gd", "lcgd"]
LossOn = Literal["demonstration", "label"]
Readout = Literal["vocab", "labels"]
Schedule = Literal["online", "batch"]

ALL_PARAMETERS: tuple[Parameter, ...] = get_args(Parameter)

FILE_FORMAT = "iclgd_lens.ParameterUpdate/2"


def require_parameters(parameters: Sequence[Parameter] | Parameter) -> tuple[Parameter, ...]:
    """Check the names of trained parameters; a single one may stand without a list.

    Raises:
        ValueError: If there are none, or one is unknown.
    """
    names: tuple[Parameter, ...] = (parameters,) if isinstance(parameters, str) else tuple(parameters)
    if not names or not all(isinstance(name, str) and name in ALL_PARAMETERS for name in names):
        raise ValueError(f"parameters must be some of {', '.join(ALL_PARAMETERS)}; got {list(names)}")
    return names


@dataclass(frozen=True)
class UpdateSettings:
    """How an update was made; the arguments of `gd` and `lcgd`.

    Attributes:
        method: `"gd"` or `"lcgd"`.
        lr: Step size.
        loss_on: `"demonstration"` or `"label"`.
        readout: `"vocab"` or `"labels"`.
        schedule: `"online"` or `"batch"`.
        epochs: Passes over the demonstrations.
        parameters: The parameters that were trained.

    Raises:
        ValueError: If an option is unknown, out of range or does not fit another.
    """

    method: Method
    lr: float
    loss_on: LossOn
    readout: Readout
    schedule: Schedule
    epochs: int
    parameters: Sequence[Parameter]

    def __post_init__(self) -> None:
        for name, allowed in (("method", Method), ("loss_on", LossOn), ("readout", Readout), ("schedule", Schedule)):
            require_one_of(name, getattr(self, name), get_args(allowed))
        if self.readout == "labels" and self.loss_on != "label":
            raise ValueError("readout='labels' reads label tokens alone, so it needs loss_on='label'")
        require_not_negative("lr", self.lr)
        require_count("epochs", self.epochs)
        names = require_parameters(self.parameters)
        # In the types that can be saved, whatever a caller's numbers were.
        for field, value in (("lr", float(self.lr)), ("epochs", int(self.epochs)), ("parameters", names)):
            object.__setattr__(self, field, value)


@dataclass(frozen=True, eq=False)
class ParameterUpdate:
    """The change that gradient steps on demonstrations make to every layer's key and value projections.

    A token here is one position of one demonstration in one epoch, in the order in which they were trained on.

    Attributes:
        inputs: `[layer token d_model]`: xᵢ, what `W_K` and `W_V` multiplied when the step's gradient was taken.
        key_errors: `[layer token kv_head d_head]`: eᵢ at the key projection's output; zero where neither `W_K` nor `b_K` is
            trained.
        value_errors: `[layer token kv_head d_head]`: the same for values.
        demonstration: `[token]`: the index of the demonstration that the token belongs to.
        position: `[token]`: its position in that demonstration, BOS being 0.
        gradient_norms: `[layer step]`: ℓ2 norm of the gradient over a layer's trained parameters, for every demonstration in the
            order of training; with one epoch a step is a demonstration (Deutch et al. 2024, Figure 4).
        losses: `[step]`: the loss of that demonstration in nats, before its step; for LCGD the sum over layers.
        settings: How the update was made.
        fingerprint: The digest of the model that it was made on and belongs to.
        examples: The digest of the demonstrations that it was made on; empty where it was made on none.
    """

    inputs: Float[Tensor, "layer token d_model"]
    key_errors: Float[Tensor, "layer token kv_head d_head"]
    value_errors: Float[Tensor, "layer token kv_head d_head"]
    demonstration: Int[Tensor, "token"]
    position: Int[Tensor, "token"]
    gradient_norms: Float[Tensor, "layer step"]
    losses: Float[Tensor, "step"]
    settings: UpdateSettings
    fingerprint: str
    examples: str

    def delta(self, name: Parameter, layer: int) -> Float[Tensor, "..."]:
        """Materialise the change of one parameter of one layer, in at least float32 and TransformerLens's layout.

        Args:
            name: `"W_K"` or `"W_V"`, giving `[head d_model d_head]`, or `"b_K"` or `"b_V"`, giving `[head d_head]`. With
                grouped-query attention the heads are the key-value heads. Zero for a parameter that was not trained.
            layer: Which layer; negative counts from the last.

        Raises:
            ValueError: If there is no such parameter or layer.
        """
        flat = self._flat_delta(name, layer)
        head = {"head": self.key_errors.shape[2]}
        if name.startswith("b"):
            return rearrange(flat, "(head d_head) -> head d_head", **head)
        return rearrange(flat, "d_model (head d_head) -> head d_model d_head", **head)

    @without_autocast()
    def _flat_delta(self, name: Parameter, layer: int) -> Float[Tensor, "*d_model head_d_head"]:
        if name not in ALL_PARAMETERS:
            raise ValueError(f"name must be one of {', '.join(ALL_PARAMETERS)}; got {name!r}")
        n_layers = len(self.inputs)
        if not is_whole(layer) or not -n_layers <= layer < n_layers:
            raise ValueError(f"layer={layer}, but the update has {n_layers} layers")
        errors = (self.key_errors if name.endswith("K") else self.value_errors)[layer]
        flat = wide(rearrange(errors, "token head d_head -> token (head d_head)"))
        if name not in self.settings.parameters:
            flat = torch.zeros_like(flat)
        return flat.sum(dim=0) if name.startswith("b") else wide(self.inputs[layer]).T @ flat

    def first_epochs(self, epochs: int) -> ParameterUpdate:
        """The update as it was after some of its epochs.

        Raises:
            ValueError: If it was not made in so many, or not on demonstrations (`random_weights`).
        """
        made = self.settings.epochs
        if bool((self.demonstration < 0).any()):
            raise ValueError("this update has no epochs to tell apart: it was not made on demonstrations")
        if not is_whole(epochs) or not 1 <= epochs <= made:
            raise ValueError(f"epochs={epochs}, but the update was made in {made}")
        tokens, steps = (slice(length * epochs // made) for length in (len(self.position), len(self.losses)))
        return replace(
            self,
            inputs=self.inputs[:, tokens],
            key_errors=self.key_errors[:, tokens],
            value_errors=self.value_errors[:, tokens],
            demonstration=self.demonstration[tokens],
            position=self.position[tokens],
            gradient_norms=self.gradient_norms[:, steps],
            losses=self.losses[steps],
            settings=replace(self.settings, epochs=epochs),
        )

    @property
    def norms(self) -> dict[str, Float[Tensor, "layer"]]:
        """The Frobenius norm of every trained parameter's change, per layer."""
        return {
            name: torch.stack([self.delta(name, layer).norm() for layer in range(len(self.inputs))])
            for name in self.settings.parameters
        }

    def attribution(self, activations: Activations, along: Float[Tensor, "query layer d_model"] | None = None) -> Attribution:
        """Say how much every token of the demonstrations contributes to what the update changes at the last query token.

        Contributions are to first order in the update, through values and through keys, per layer and head, with the layer's inputs
        held as they are (`updates/attribution.py`; Irie et al. 2022, section 3). Returned are four times `query × layer × head ×
        token` numbers; `capture_batches` gives activations in batches that bound it.

        Args:
            activations: The queries zero-shot, captured with `keep=[*ATTENTION]`.
            along: The direction in the residual stream along which contributions are measured, such as the change that
                demonstrations make in-context, `icl.attn_out - zsl.attn_out`; by default the first-order change itself, so that
                contributions sum to its length.

        Raises:
            ValueError: If the activations are of another model or of a run under an update, `along` does not fit them or is not
                finite, or the update was not made on demonstrations (`random_weights`).
            AttributeError: If the activations lack what is needed.
        """
        return attribute(self, activations, along)

    def fwd_hooks(self, model: HookedModel) -> list[NamedHook]:
        """Make the hooks under which `model` runs as if it had been updated, for `model.run_with_hooks(fwd_hooks=...)`.

        Hooks run in list order, after those that are on the model already. At keys and values, hooks of your own that come later in
        the list see the updated ones. A `HookedTransformer` has no hook point at the projections' input, so there these hooks read
        `ln1.hook_normalized`, or `hook_resid_pre` in models without a norm before attention; on a bridge they read
        `attn.k.hook_in`. Hooks of your own that edit that very place belong before these. `attached` has no such limit on a
        `HookedTransformer`. The hooks hold ΔW, as much memory as the trained parameters themselves.

        Raises:
            ValueError: If the update was made on another model, or a torch hook edits the projections' input after the last hook
                point before them.
        """
        return sites_of(model).by_name(self._hooks(model))

    def _hooks(self, model: HookedModel) -> list[NamedHook]:
        """The hooks that `attached` puts on."""
        if (found := fingerprint(model)) != self.fingerprint:
            raise ValueError(
                f"this update belongs to another model: it was made on one with fingerprint {self.fingerprint}, and this one "
                f"has {found} (other weights, another shape, another configuration or another dtype)"
            )
        device, dtype = model.cfg.device, model.cfg.dtype
        stacked: dict[str, Tensor] = {
            name: torch.stack([self._flat_delta(name, layer).to(device, dtype) for layer in range(len(self.inputs))])
            for name in self.settings.parameters
        }
        return injection_hooks(sites_of(model), stacked)

    @contextmanager
    def attached(self, model: HookedModel) -> Iterator[HookedModel]:
        """Run `model` as if it had been updated, within a `with` block; afterwards, also after an exception, it is as before.

        Hooks of your own act as on a model with updated weights, those that are on it already and those that you add inside. On a
        bridge there is one exception: an edit of `attn.k.hook_in` or `attn.v.hook_in` that is added inside comes after the update
        has read that place. Put such hooks on before. `model.reset_hooks()` inside leaves the update on.

        Raises:
            ValueError: If the update was made on another model.
            RuntimeError: If another thread is capturing this model, or has an update attached to it; or, at the end of the block,
                if the update's hooks were taken off within it (`model.reset_hooks(including_permanent=True)`).
        """
        with sites_of(model).attach(self._hooks(model)):
            yield model

    def save(self, path: str | Path) -> None:
        """Write the update to a safetensors file, whole or not at all.

        Raises:
            OSError: If the file cannot be written.
            ValueError: If the update is not sound, as `load` would say.
        """
        tensors = {name: getattr(self, name).contiguous() for name in AXES}
        require_sound(tensors, self.settings.epochs)
        metadata = {
            "format": FILE_FORMAT,
            "settings": json.dumps(asdict(self.settings)),
            **{name: getattr(self, name) for name in _DIGESTS},
        }
        with written_whole(Path(path)) as partial:
            save_file(tensors, partial, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> ParameterUpdate:
        """Read an update that `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a saved update, or not a sound one: something is missing or unknown, tensors have other
                dtypes or do not fit each other, an entry is not finite, or a demonstration's tokens are not all there.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}")
        try:
            with safe_open(Path(path), framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FILE_FORMAT:
                    raise ValueError(f"{path} is not a saved update: its format is {metadata.get('format')!r}")
                tensors = {name: file.get_tensor(name) for name in AXES}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a saved update: {error}") from error
        try:
            settings = _read_settings(metadata.get("settings", "nothing"))
            require_sound(tensors, settings.epochs)
            fingerprint, examples = (_read_digest(name, metadata.get(name)) for name in _DIGESTS)
        except ValueError as error:
            raise ValueError(f"{path} is not a sound update: {error}") from error
        return cls(**tensors, settings=settings, fingerprint=fingerprint, examples=examples)


_DIGESTS = ("fingerprint", "examples")


def _read_settings(text: str) -> UpdateSettings:
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    known = [field.name for field in fields(UpdateSettings)]
    if not isinstance(found, dict) or sorted(found) != sorted(known):
        raise ValueError(f"its settings must be {', '.join(known)}; got {found!r}")
    if not isinstance(found["parameters"], list):
        raise ValueError(f"parameters must be a list, got {found['parameters']!r}")
    return UpdateSettings(**found)


def _read_digest(name: str, digest: str | None) -> str:
    # A random update was made on no demonstrations.
    none_allowed = name == "examples" and digest == ""
    if digest is None or not (none_allowed or re.fullmatch("[0-9a-f]{16}", digest)):
        raise ValueError(f"{name} must be 16 hex digits, got {digest!r}")
    return digest
