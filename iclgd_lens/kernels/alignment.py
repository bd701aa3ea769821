"""Centred kernel alignment: whether two kernels order the same pairs alike.

`CKA(A, B) = ⟨A', B'⟩ / (‖A'‖ ‖B'‖)` with rows and columns centred (Cortes et al. 2012; Kornblith et al. 2019). Here
rows are queries and columns demonstrations, so kernels need not be square; for a square symmetric kernel this is
the usual one.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from iclgd_lens.kernels.smoother import require_kernel
from iclgd_lens.metrics.similarity import cosine
from iclgd_lens.models.precision import wide


def centred_alignment(a: Float[Tensor, "*#batch query point"], b: Float[Tensor, "*#batch query point"]) -> Float[Tensor, "*batch"]:
    """Centred alignment of two kernels between the same queries and points; other axes broadcast.

    Returns:
        A number between -1 and 1; NaN where a kernel is constant once centred.

    Raises:
        ValueError: If the kernels are not of the same queries and points, or not finite.
    """
    for name, kernel in (("a", a), ("b", b)):
        require_kernel(kernel, b.shape[-1], name)
    if a.shape[-2] != b.shape[-2]:
        raise ValueError(f"the kernels are of {a.shape[-2]} and of {b.shape[-2]} queries")
    return cosine(_centred(a).flatten(-2), _centred(b).flatten(-2))


def _centred(kernel: Float[Tensor, "*batch query point"]) -> Float[Tensor, "*batch query point"]:
    kernel = wide(kernel)
    rows, columns = kernel.mean(dim=-1, keepdim=True), kernel.mean(dim=-2, keepdim=True)
    centred = kernel - rows - columns + rows.mean(dim=-2, keepdim=True)
    # What rounding leaves of a constant is no direction.
    scale = kernel.abs().amax(dim=(-2, -1), keepdim=True)
    return centred.masked_fill(centred.abs().amax(dim=(-2, -1), keepdim=True) <= 1e-6 * scale, 0.0)
