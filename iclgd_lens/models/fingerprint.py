"""Telling models apart: a short digest of a model's shape and weights."""

from __future__ import annotations

import hashlib

import torch
from transformer_lens import HookedTransformer

_SAMPLES = 256


def fingerprint(model: HookedTransformer) -> str:
    """Digest a model's parameter names, shapes and up to 256 evenly spread values of each parameter, as 16 hex digits.

    Reading a sample keeps this cheap for large models: a training step changes nearly every value and is always seen, an edit of
    single entries may not be. The device does not matter, nor does the dtype as long as it holds the same values.
    """
    digest = hashlib.sha256()
    samples = []
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{list(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        stride = max(1, -(-flat.numel() // _SAMPLES))
        samples.append(flat[::stride].double())
    digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
