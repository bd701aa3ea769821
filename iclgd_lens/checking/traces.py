"""What a model is like from outside, before and after: hooks, weights, buffers, gradients, modes, outputs, and random state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from iclgd_lens.checking.plain import HOOK_TABLES
from iclgd_lens.checking.whole import Subject

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Traces:
    """Everything that a run may leave behind, under the name that a message gives it.

    Attributes:
        random: The state of torch's generator on the CPU.
        hooks: The hooks of every module.
        modes: Which modules are in training mode.
        parameters: Of every parameter its object, its version, its bits summed up, its gradient and whether it asks for one.
        buffers: Of every buffer its shape, and its bits summed up.
        outputs: The logits of a short prompt.
    """

    random: Tensor
    hooks: list[tuple[str, list[int]]]
    modes: list[tuple[str, bool]]
    parameters: dict[str, tuple[Any, ...]]
    buffers: dict[str, tuple[torch.Size, int]]
    outputs: Tensor

    @classmethod
    def of(cls, subject: Subject, before: Traces | None = None) -> Traces:
        """Look at a model, after a short prompt ran: frequencies that depend on the last prompt's length are the short ones then.

        Args:
            subject: The model.
            before: What the model was like before. Tables that have grown since are looked at as far as they went.
        """
        random, known = torch.get_rng_state(), {} if before is None else before.buffers
        model: Any = subject.model
        tokens = subject.prompts.draw(4, seed=7)
        ((outputs,),) = subject.read(tokens, subject.sites.residual_out[-1:])
        return cls(
            random=random,
            hooks=[(name, _hooks(module)) for name, module in model.named_modules()],
            modes=[(name, module.training) for name, module in model.named_modules()],
            parameters={name: _parameter(each) for name, each in model.named_parameters()},
            buffers={name: _buffer(each, known.get(name)) for name, each in model.named_buffers()},
            outputs=outputs,
        )

    def left(self, after: Traces) -> list[str]:
        """What differs afterwards, in words."""
        differs = {
            "hooks": self.hooks != after.hooks,
            "training mode": self.modes != after.modes,
            "weights or gradients": self.parameters != after.parameters,
            "buffers": self.buffers != after.buffers,
            "outputs": not torch.equal(self.outputs, after.outputs),
            "torch's random state": not torch.equal(self.random, after.random),
        }
        return [what for what, has in differs.items() if has]


def _hooks(module: nn.Module) -> list[int]:
    return [id(hook) for table in HOOK_TABLES for hook in module.__dict__.get(table, {}).values()]


def _parameter(parameter: nn.Parameter) -> tuple[Any, ...]:
    version = None if parameter.is_inference() else parameter._version
    gradient = None if parameter.grad is None else (id(parameter.grad), _bits(parameter.grad))
    return id(parameter), version, _bits(parameter), gradient, parameter.requires_grad


def _buffer(buffer: Tensor, before: tuple[torch.Size, int] | None) -> tuple[torch.Size, int]:
    """TransformerLens makes tables of rotations longer when a prompt needs it."""
    if before is not None and buffer.ndim and len(before[0]) and len(buffer) > before[0][0]:
        buffer = buffer[: before[0][0]]
    return buffer.shape, _bits(buffer)


def _bits(tensor: Tensor) -> int:
    """The sum of a tensor's bit patterns."""
    flat = tensor.detach()
    if not flat.dtype.is_floating_point:
        return int(flat.sum()) if flat.numel() else 0
    return int(flat.contiguous().view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64))
