"""Telling models apart: a short digest of a model's shape and weights."""

from __future__ import annotations

import hashlib

import torch
from transformer_lens import HookedTransformer

_SAMPLES = 256


def fingerprint(model: HookedTransformer) -> str:
    """Digest a model's parameter names, shapes and up to 256 evenly spread values of each parameter, as 16 hex digits.

    Reading a sample keeps this cheap for large models: any training step changes every sampled value, but an edit of single
    entries may go unseen. The device does not matter; the dtype does, since it changes the values.
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
