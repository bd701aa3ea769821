"""Log-probabilities: as the package reads them out of the hooked model, and as the plain model computes them."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from iclgd_lens.checking.whole import Subject, largest_error, log_probs, worst

READ = 16
"""At how many tokens at the end of a long prompt outputs are compared."""


def short_outputs(subject: Subject) -> float:
    """Log-probabilities at every token of short prompts: read out by the package, and of the plain model."""
    return worst([_output_error(subject, subject.prompts.draw(length, seed=length)) for length in subject.prompts.short])


def long_outputs(subject: Subject) -> float:
    """Log-probabilities at the last tokens of a prompt that is longer than every length at which something changes."""
    return _output_error(subject, subject.prompts.draw(subject.prompts.long, seed=1))


def _output_error(subject: Subject, tokens: Int[Tensor, "pos"]) -> float:
    last = min(READ, len(tokens))
    ((residual,),) = subject.read(tokens, subject.sites.residual_out[-1:])
    theirs = log_probs(subject.plain_logits(tokens, last))
    return largest_error(subject.read_out(residual[-last:]), theirs)
