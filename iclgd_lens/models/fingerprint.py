"""Telling models apart: a short digest of a model's shape and weights."""

from __future__ import annotations

import hashlib

import torch

from iclgd_lens.models.hooked import HookedModel

_SAMPLES = 1024
_STRIDE = 2_654_435_761
"""A large prime: multiples of it, modulo a parameter's size, visit rows, columns and heads alike."""


def fingerprint(model: HookedModel) -> str:
    """Digest a model's parameter names, shapes and up to 1024 values of each parameter, spread all over it, as 16 hex digits.

    Reading a sample keeps this cheap for large models: a training step changes nearly every value and is always seen, an edit of
    a few entries may not be. The device does not matter, nor does the dtype as long as it holds the same values.
    """
    digest = hashlib.sha256()
    samples = []
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{list(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        if flat.numel() > _SAMPLES:
            flat = flat[(torch.arange(_SAMPLES) * _STRIDE % flat.numel()).to(flat.device)]
        samples.append(flat)
    digest.update(torch.cat([sample.cpu().double() for sample in samples]).numpy().tobytes())
    return digest.hexdigest()[:16]
