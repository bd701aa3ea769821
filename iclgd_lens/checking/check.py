"""`lens.check(model)`: what the package promises, proved on a model of one's own.

Every row of the result compares two computations of the same numbers: the package's, and one that shares nothing with it but the
weights. The other side is the plain Hugging Face model where there is one, whole prompts one at a time, or autograd.

>>> from iclgd_lens.models.loading import load_model
>>> found = check(load_model("bundled", device="cpu"))
>>> found.ok, len(found.frame)
(True, 11)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Literal

import pandas as pd

from iclgd_lens.checking.attention import attention_parts, heads_through_output
from iclgd_lens.checking.captures import batched_captures, cached_captures
from iclgd_lens.checking.outputs import long_outputs, short_outputs
from iclgd_lens.checking.prompts import SHORT
from iclgd_lens.checking.rotary import NotApplicableError, rotary_angles
from iclgd_lens.checking.tolerances import ROTARY, Quantity, tolerance
from iclgd_lens.checking.traces import Traces
from iclgd_lens.checking.updates import gd_gradients, injected_update, lcgd_gradients
from iclgd_lens.checking.whole import Subject
from iclgd_lens.checks import require_count
from iclgd_lens.models.hooked import HookedModel

Verdict = Literal["holds", "fails", "not applicable"]

LONGEST = 4_500
"""How many tokens a prompt of the check may have by default: beyond a window of 4,096."""


@dataclass(frozen=True)
class Row:
    """One promise, and whether a model keeps it.

    Attributes:
        what: The promise.
        error: The largest error that was found; NaN where there is none.
        tolerance: How large the error may be by rounding (`checking/tolerances.py`).
        verdict: `"holds"`, `"fails"` or `"not applicable"`.
        advice: What to do where the promise is not kept; why the row is not applicable; empty where the promise holds.
    """

    what: str
    error: float
    tolerance: float
    verdict: Verdict
    advice: str


@dataclass(frozen=True)
class Check:
    """What `check` found; printing it shows the table.

    Attributes:
        model: What the model is called, its class and its dtype.
        rows: The promises, in order.
        tokens: How many tokens ran, of all prompts together.
        longest: How many tokens the longest prompt had.
    """

    model: str
    rows: tuple[Row, ...]
    tokens: int
    longest: int

    @property
    def ok(self) -> bool:
        """Whether no promise fails."""
        return all(row.verdict != "fails" for row in self.rows)

    @property
    def frame(self) -> pd.DataFrame:
        """One row per promise: what, error, tolerance, verdict and advice."""
        return pd.DataFrame([vars(row) for row in self.rows])

    @property
    def title(self) -> str:
        """The model, and how much ran."""
        return f"{self.model}: {self.tokens:,} tokens ran, in prompts of up to {self.longest:,}"

    @property
    def summary(self) -> str:
        """The verdict in one sentence."""
        failed = [row.what for row in self.rows if row.verdict == "fails"]
        if failed:
            return f"{len(failed)} of {len(self.rows)} promises fail on this model: {'; '.join(failed)}."
        n_holding = sum(row.verdict == "holds" for row in self.rows)
        return f"{n_holding} promises hold on this model, {len(self.rows) - n_holding} are not applicable."

    @property
    def shown(self) -> list[tuple[str, str, str, str]]:
        """The table's cells as text: what, error, tolerance and verdict."""
        return [(row.what, _number(row.error), _number(row.tolerance), row.verdict) for row in self.rows]

    @property
    def notes(self) -> list[str]:
        """What to do about promises that fail, and why some are not applicable."""
        return [f"{row.what}: {row.advice}" for row in self.rows if row.advice]

    def __str__(self) -> str:
        cells = [("what", "error", "tolerance", "verdict"), *self.shown]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([self.title, *lines, *self.notes, self.summary])

    def _repr_html_(self) -> str:
        def row(cells: tuple[str, ...], tag: str) -> str:
            return "".join(["<tr>", *(f'<{tag} style="text-align: left">{escape(cell)}</{tag}>' for cell in cells), "</tr>"])

        table = "".join([row(("what", "error", "tolerance", "verdict"), "th"), *(row(cells, "td") for cells in self.shown)])
        notes = "".join(f"<p>{escape(note)}</p>" for note in [*self.notes, self.summary])
        return f"<p>{escape(self.title)}</p><table>{table}</table>{notes}"


@dataclass(frozen=True)
class _Promise:
    """How a row is made: the promise, how its largest error is found, how large that may be, and what to do if it is larger."""

    what: str
    error: Callable[[Subject], float]
    quantity: Quantity | None
    advice: str

    def tolerance(self, subject: Subject) -> float:
        if self.quantity is None:
            return ROTARY * int(subject.model.cfg.n_ctx)
        return tolerance(self.quantity, subject.model.cfg.dtype)

    def row(self, subject: Subject, known: str) -> Row:
        """Find out; whatever goes wrong on the way is the row's failure."""
        allowed = self.tolerance(subject)
        try:
            error = self.error(subject)
        except NotApplicableError as reason:
            return Row(self.what, math.nan, allowed, "not applicable", f"{reason}.")
        except Exception as reason:  # of the model, of TransformerLens or of this package: the row is about all of them
            return Row(self.what, math.nan, allowed, "fails", f"{type(reason).__name__}: {reason} {self.advice}{known}")
        if not error <= allowed:
            return Row(self.what, error, allowed, "fails", f"{self.advice}{known}")
        return Row(self.what, error, allowed, "holds", "")


_LONG = "… on prompts beyond every window"
_ANOTHER_BACKEND = "Load the model as the other class (backend='bridge' or 'hooked'), and use no number of this one."
_REPORT = "Report it with this table; until then use no number that depends on it."

_PROMISES = (
    _Promise("outputs equal the plain model's", short_outputs, "outputs", _ANOTHER_BACKEND),
    _Promise(_LONG, long_outputs, "outputs", _ANOTHER_BACKEND),
    _Promise("captures after a cached prefix = whole", cached_captures, "captures", f"Captures of this model are wrong. {_REPORT}"),
    _Promise(
        "captures in padded batches = whole",
        batched_captures,
        "captures",
        f"capture(..., batch_size=1) pads nothing; use it if the row above holds. {_REPORT}",
    ),
    _Promise(
        "scores and pattern are those used",
        attention_parts,
        "attention",
        f"Do not use SimAM, patterns, decompose or attributions of this model. {_REPORT}",
    ),
    _Promise(
        "heads through W_O = attention output",
        heads_through_output,
        "attention",
        f"Do not use decompose or attributions of this model. {_REPORT}",
    ),
    _Promise("GD's ΔW equals autograd", gd_gradients, "gradients", f"Do not use gd on this model. {_REPORT}"),
    _Promise("LCGD's ΔW equals autograd", lcgd_gradients, "gradients", f"Do not use lcgd on this model. {_REPORT}"),
    _Promise("an injected update = edited weights", injected_update, "effect", f"Do not run this model under an update. {_REPORT}"),
    _Promise(
        "rotary angles are exact, in radians",
        rotary_angles,
        None,
        "The frequencies were cast or changed after the model was made, as model.to(dtype) does; load the model with dtype=.",
    ),
)

_LEFT_BEHIND = "nothing is left behind"


def check(model: HookedModel, *, longest: int = LONGEST) -> Check:
    """Prove on a model what this package promises of all models.

    The prompts are random tokens, drawn by fixed seeds. Compared are:

    1. log-probabilities as this package reads them out, with the plain model's, on prompts of 2 to 12 tokens; the plain model is
       the Hugging Face model without TransformerLens, or for a `HookedTransformer` its own forward pass on whole prompts;
    2. the same at the end of a prompt beyond every window and every length at which the configuration changes something, or of
       192 tokens where nothing changes;
    3. `attn_out`, `head_out`, scores and `label_log_probs` of captures that reuse a cached prefix, with whole prompts one by one;
    4. the same of captures in padded batches of unequal length;
    5. the softmax of scores with the pattern, the pattern times the values with heads' outputs, all of them with what attention
       really used, masked positions included;
    6. `Σ_h head_out[h] · W_O[h] + b_O` with the attention output, before any norm after it;
    7. GD's ΔW of one step, for both kinds of loss, with `torch.autograd` on the plain model's own weights;
    8. LCGD's likewise;
    9. the effect of an attached update, with that of edited weights in a view of the plain model;
    10. rotary frequencies with those that the architecture's rule gives in float32, as the angle at the end of the context window;
    11. hooks, weights, gradients, buffers, training mode, outputs and torch's random state before and after.

    Args:
        model: The model, of either class. Nothing of it is changed. Hooks of your own on a `TransformerBridge` are no part of the
            plain model, so take them off first.
        longest: How many tokens a prompt may have. Where a window is longer, the second row is not applicable, and says so.

    Returns:
        A table of the promises. A promise that fails, also by an exception, is a row of the table; nothing is raised.

    Raises:
        TypeError: If the model is neither a `HookedTransformer` nor a `TransformerBridge`.
        ValueError: If `longest` is no whole number of at least 1, or the model is one that this package refuses.
    """
    require_count("longest", longest)
    subject = Subject.of(model, longest)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of processed weights: steps on them are compared as they are
        before = Traces.of(subject)
        known = _known_hooks(subject)
        rows = [_long(subject, promise.row(subject, known)) for promise in _PROMISES]
        rows.append(_left_behind(subject, before))
    cfg = model.cfg
    name = f"{cfg.model_name} ({type(model).__name__}, {str(cfg.dtype).removeprefix('torch.')})"
    return Check(name, tuple(rows), subject.tokens, subject.longest)


def _long(subject: Subject, row: Row) -> Row:
    """What was not tried does not hold."""
    beyond = subject.prompts.beyond
    if row.what != _LONG or row.verdict != "holds" or not beyond:
        return row
    needed = max(beyond) + SHORT
    advice = f"Something changes at {max(beyond):,} tokens; check(model, longest={needed}) runs a prompt beyond."
    return Row(row.what, row.error, row.tolerance, "not applicable", advice)


def _known_hooks(subject: Subject) -> str:
    """A hint where hooks of the user's are on the model."""
    points = {id(point): point for point in subject.model.hook_dict.values()}.values()  # some have two names
    n_hooks = sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in points)
    return f" The model has hooks on it, {n_hooks} in all: take them off (model.reset_hooks()) and check again." if n_hooks else ""


def _left_behind(subject: Subject, before: Traces) -> Row:
    try:
        left = before.left(Traces.of(subject, before))
    except Exception as reason:
        return Row(_LEFT_BEHIND, math.nan, 0.0, "fails", f"{type(reason).__name__}: {reason} Load the model anew.")
    if left:
        return Row(_LEFT_BEHIND, float(len(left)), 0.0, "fails", f"Other than before are {', '.join(left)}. Load the model anew.")
    return Row(_LEFT_BEHIND, 0.0, 0.0, "holds", "")


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "0" if value == 0 else f"{value:.1e}"
