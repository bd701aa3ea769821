"""The kernel views of `compare(..., kernels=True)` as tables: every number beside its control and the untrained twin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import pandas as pd

from iclgd_lens.experiments.results import summarise
from iclgd_lens.kernels.implied import Reading
from iclgd_lens.views.names import METHOD_NAMES
from iclgd_lens.views.sheets import Column, Sheet

READING_NAMES = {"contribution": "contribution", "coefficient": "linear attention", "proxy": "Dai's proxy"}
LEVEL_NAMES = {"token": "token", "inner": "token but last", "demonstration": "demonstration"}
CONTROL_COLUMNS = {"random": "random", "other_demonstrations": "other", "shuffled_labels": "shuffled labels"}
KERNEL_NAMES = {
    "attention_head": "attention, best head",
    "label_attention_head": "attention to labels, best head",
    "hidden_linear": "hidden states, linear",
    "hidden_cosine": "hidden states, cosine",
    "hidden_rbf": "hidden states, RBF",
    "hidden_ridge": "hidden states, RBF ridge",
}
TARGET_NAMES = {"icl": "ICL", "gd": "FT by GD", "lcgd": "FT by LCGD", "gold": "gold labels"}
TRAJECTORY_NAMES = {
    ("icl", "hidden"): "functional GD, RBF of hidden states",
    ("icl", "tangent"): "functional GD, tangent kernel",
    ("gd", "epochs"): "epochs of GD",
    ("lcgd", "epochs"): "epochs of LCGD",
}
ALIGNMENT_NAMES = {
    "cka_tangent_attention": "tangent and attention",
    "cka_tangent_label": "tangent and label",
    "cka_attention_label": "attention and label",
}
VERDICT_NAMES = {"other_demonstrations": "another demonstration's weights", "shuffled_labels": "shuffled labels"}
OVER_EPISODES = "Means ± 95 % over episodes."


class Source(NamedTuple):
    """Where a column's numbers are: in the frame's columns of the same names."""

    method: str
    metric: str
    control: str = "none"
    model: str = "trained"


def has_kernel_views(frame: pd.DataFrame) -> bool:
    """Whether a frame has the rows of `compare(..., kernels=True)`."""
    return bool((frame["metric"] == "demonstration_mass").any())


def kernel_tables(frame: pd.DataFrame) -> list[Sheet]:
    """All tables that a frame has the numbers for."""
    tables = _Tables(frame)
    sheets = [
        tables.smoother(),
        tables.implied(),
        tables.readings(),
        tables.heads(),
        tables.regression(),
        tables.tangent(),
        tables.alignment(),
        tables.trajectories(),
    ]
    return [sheet for sheet in sheets if len(sheet.numbers)]


class _Tables:
    """A frame's summaries, by layer and over layers, and the tables made of them."""

    def __init__(self, frame: pd.DataFrame) -> None:
        by = ["method", "metric", "control", "model"]
        rows = summarise(frame, by=[*by, "layer"]).to_dict("records")
        self.by_layer = {(*(row[name] for name in by), row["layer"]): row for row in rows if pd.notna(row["layer"])}
        self.over_layers = {tuple(row[name] for name in by): row for row in summarise(frame, by=by).to_dict("records")}
        self.layers = sorted(frame["layer"].dropna().unique())
        self.methods = [method for method in METHOD_NAMES if method in set(frame["method"])]
        self.twin = "untrained" in set(frame["model"])

    def smoother(self) -> Sheet:
        shown = {"λ": "demonstration_mass", "smoothing share": "smoothing_share", "cos(smoothing, change)": "smoothing_cosine"}
        sources = {
            f"{name}{', twin' if model == 'untrained' else ''}": Source("icl", metric, model=model)
            for name, metric in shown.items()
            for model in self._models
        }
        note = (
            "λ: attention mass on demonstrations. The change of a layer's attention output is smoothing, λ(o_demo − o_zsl), "
            "plus drift, (1−λ)(o_query − o_zsl); shares sum to 1."
        )
        return self._layered("smoother", "Attention as a smoother: in-context against zero-shot", {"": sources}, "", note, ".3f")

    def implied(self) -> Sheet:
        rows = {METHOD_NAMES[method]: self._agreement_sources(method, "contribution_inner") for method in self.methods}
        note = (
            "Tokens of the demonstrations weighed by what each contributes to attention's output to first order, against "
            "in-context attention: Kendall's τ, and recall of the heaviest sixth, a sixth by chance. Each demonstration's last "
            "token is left out, as a gradient step pays it nothing. Random: the weights dealt out to tokens anew. Other: every "
            "demonstration with the weights of another, which keeps what comes of where in a demonstration tokens stand."
        )
        return self._layered("implied", "Implied attention of updates against in-context attention, by token", rows, "method", note)

    def readings(self) -> Sheet:
        readings = [("ICL", "icl", "proxy")]
        readings += [(METHOD_NAMES[method], method, reading) for method in self.methods for reading in get_args(Reading)]
        rows = {
            (name, READING_NAMES[reading], LEVEL_NAMES[level]): self._agreement_sources(method, f"{reading}_{level}")
            for level in LEVEL_NAMES
            for name, method, reading in readings
        }
        note = (
            "By demonstration, weights are summed over its tokens. Random: the weights dealt out to tokens anew, then summed, so "
            "that what comes of the length of demonstrations alone shows there, too. Other: every demonstration with the weights "
            "of another. The proxy is of the model as it is, so it is the same for every update."
        )
        return self._flat(
            "readings", "Readings of implied attention, averaged over layers", rows, ("method", "reading", "level"), "+.3f", note
        )

    def heads(self) -> Sheet:
        sources = {
            "best head": Source("icl", "attention_layer_agreement"),
            "random head": Source("icl", "attention_layer_agreement", "random"),
            "shuffled labels": Source("icl", "attention_layer_agreement", "shuffled_labels"),
            "at labels": Source("icl", "label_attention_layer_agreement"),
        }
        if self.twin:
            sources["twin"] = sources["best head"]._replace(model="untrained")
            sources["at labels, twin"] = sources["at labels"]._replace(model="untrained")
        note = (
            "Share of queries whose in-context prediction is that of label regression with a head's attention to demonstrations, "
            "or at labels, to their labels. A layer's best head is chosen on one half of the queries and scored on the other. "
            "Random: mean over its heads. Shuffled labels: mean over shuffles of the demonstrations' labels."
        )
        return self._layered("heads", "Label regression by heads, against in-context predictions", {"": sources}, "", note, ".3f")

    def regression(self) -> Sheet:
        rows = {}
        for target in ("icl", *self.methods, "gold"):
            majority = {"majority": Source(target, "majority_agreement")}
            if self.twin:
                majority["twin's majority"] = Source(target, "majority_agreement", model="untrained")
            for kernel in KERNEL_NAMES:
                sources = self._controlled(target, f"{kernel}_agreement", ("random", "shuffled_labels"))
                sources["r"] = Source(target, f"{kernel}_correlation")
                rows[TARGET_NAMES[target], KERNEL_NAMES[kernel]] = sources | majority
        note = (
            "Share of queries labelled alike. The best head of all is chosen and scored on different halves of the queries; "
            "random: mean over heads. Shuffled labels: mean over shuffles, the true order perhaps among them. r: correlation with "
            "label probabilities, over queries and labels. Majority: always the commonest label. Hidden states are those of "
            "zero-shot runs, averaged over layers."
        )
        return self._flat("regression", "Label kernel regression", rows, ("predictions of", "kernel"), ".3f", note)

    def tangent(self) -> Sheet:
        shown = {
            "lr": "tangent_log10_error",
            "lr/100": "tangent_log10_error_hundredth",
            "all layers, lr/100": "tangent_all_layers_log10_error_hundredth",
            "one by one, lr/100": "tangent_online_log10_error_hundredth",
            "cosine, lr/100": "tangent_cosine_hundredth",
        }
        rows = {}
        for model in self._models:
            sources = {name: Source("lcgd", metric, model=model) for name, metric in shown.items()}
            random = Source("lcgd", "tangent_cosine_hundredth", "random", model)
            rows["twin" if model == "untrained" else model] = sources | {"cosine, random": random}
        note = (
            "log10 of ‖actual − predicted‖ / ‖actual‖, of the change of label logits under a layer-causal step on the labels, on "
            "the sum of the demonstrations' losses, predicted by functional gradient descent with the layer's tangent kernel: −1 "
            "is an error of a tenth. All layers: where the layers below are updated, too. One by one: a step per demonstration, "
            "each after the other. Random: the kernel's demonstrations shuffled."
        )
        return self._layered("tangent", "Linearity: error of the tangent kernel's prediction", rows, "model", note, "+.2f")

    def alignment(self) -> Sheet:
        rows = {(name,): self._controlled("icl", metric, ("random",)) for metric, name in ALIGNMENT_NAMES.items()}
        note = "Centred alignment between queries and demonstrations. Random: the demonstrations of one kernel shuffled."
        return self._flat("alignment", "Kernel alignment (CKA), averaged over layers", rows, ("kernels",), "+.3f", note)

    def trajectories(self) -> Sheet:
        rows = {
            (name,): self._controlled(method, f"trajectory_{kind}_score", ("shuffled_labels",))
            for (method, kind), name in TRAJECTORY_NAMES.items()
        }
        note = (
            "Mean similarity, 1 − JSD/ln 2, of every layer's in-context logit lens with the iterate that it is matched with, "
            "in order. All trajectories have as many iterates."
        )
        return self._flat("trajectories", "Layers against iterates", rows, ("iterates",), ".3f", note)

    @property
    def _models(self) -> tuple[str, ...]:
        return ("trained", "untrained") if self.twin else ("trained",)

    def _agreement_sources(self, method: str, name: str) -> dict[str, Source]:
        others = ("random", "other_demonstrations")
        sources = self._controlled(method, f"{name}_kendall", others, prefix="τ ", bare="τ")
        # By chance recall is what the notes say.
        sources |= self._controlled(method, f"{name}_top_k_recall", others[1:], prefix="recall ", bare="recall")
        return sources

    def _controlled(
        self, method: str, metric: str, controls: Sequence[str], prefix: str = "", bare: str | None = None
    ) -> dict[str, Source]:
        sources = {bare or f"{prefix}trained": Source(method, metric)}
        sources |= {f"{prefix}{CONTROL_COLUMNS[control]}": Source(method, metric, control) for control in controls}
        return sources | ({f"{prefix}twin": Source(method, metric, model="untrained")} if self.twin else {})

    def _layered(
        self, name: str, title: str, rows: Mapping[str, Mapping[str, Source]], about: str, note: str, style: str = "+.3f"
    ) -> Sheet:
        """A table with a row per group and layer."""
        numbers = [
            ({about: group} if about else {}) | {"layer": int(layer)} | dict(self._cells(sources, layer))
            for group, sources in rows.items()
            for layer in self.layers
        ]
        first = (*([about] if about else []), "layer")
        return self._sheet(name, title, numbers, first, style, note)

    def _flat(
        self,
        name: str,
        title: str,
        rows: Mapping[Any, Mapping[str, Source]],
        about: tuple[str, ...],
        style: str,
        note: str,
    ) -> Sheet:
        """A table with a row per group, averaged over layers."""
        numbers = [dict(zip(about, group, strict=True)) | dict(self._cells(sources)) for group, sources in rows.items()]
        return self._sheet(name, title, numbers, about, style, note)

    def _cells(self, sources: Mapping[str, Source], layer: int | None = None) -> Iterator[tuple[str, Any]]:
        for header, source in sources.items():
            found = self.over_layers.get(source) if layer is None else self.by_layer.get((*source, layer))
            yield header, found["mean"] if found else float("nan")
            yield f"{header} half", found["high"] - found["mean"] if found else float("nan")

    def _sheet(self, name: str, title: str, rows: list[dict[str, Any]], first: Sequence[str], style: str, note: str) -> Sheet:
        table = pd.DataFrame(rows)
        headers = [column for column in table.columns if column not in first and not column.endswith(" half")]
        # Rows and columns for which there is no number at all, as of a method that diverged, are left out.
        headers = [header for header in headers if table[header].notna().any()]
        table = table[table[headers].notna().any(axis=1)] if headers else table.iloc[:0]
        columns = [Column(header, header) for header in first] + [
            Column(header, header, spread=f"{header} half", style=style) for header in headers
        ]
        return Sheet(f"kernels_{name}", title, table, tuple(columns), f"{note} {OVER_EPISODES}")


def kernel_verdict(frame: pd.DataFrame) -> str:
    """Say in words what the kernel views show, from the frame's numbers alone."""
    means = {
        tuple(row[name] for name in Source._fields): row["mean"]
        for row in summarise(frame, by=[*Source._fields]).to_dict("records")
    }

    def number(source: Source) -> str:
        if pd.isna(mean := means.get(source)):
            return "undefined"
        if "log10" in source.metric:
            return f"{10**mean:.2g}"
        return f"{round(mean, 2) + 0.0:.2f}".replace("-", "−")  # + 0.0 makes −0 a 0

    def beside(method: str, metric: str, controls: Sequence[str]) -> str:
        others = [f"{VERDICT_NAMES.get(control, control)} {number(Source(method, metric, control))}" for control in controls]
        if Source(method, metric, model="untrained") in means:
            others.append(f"twin {number(Source(method, metric, model='untrained'))}")
        return f"{number(Source(method, metric))} ({', '.join(others)})" if others else number(Source(method, metric))

    parts = [f"Smoothing makes {beside('icl', 'smoothing_share', ())} of what demonstrations change in attention"]
    parts += [
        f"{METHOD_NAMES[method]}'s implied attention agrees with ICL's at "
        f"τ = {beside(method, 'contribution_inner_kendall', ['random', 'other_demonstrations'])}"
        for method in METHOD_NAMES
        if Source(method, "contribution_inner_kendall") in means
    ]
    parts.append(
        "label regression with the best head's attention gives ICL's label for "
        f"{beside('icl', 'attention_head_agreement', ['random', 'shuffled_labels'])} of queries, where always the commonest label "
        f"would give it for {beside('icl', 'majority_agreement', ())}"
    )
    if Source("lcgd", "tangent_log10_error") in means:
        parts.append(
            "the tangent kernel's prediction of a step on the labels is off by "
            f"{beside('lcgd', 'tangent_log10_error', ())} of the change at this rate, geometric mean"
        )
    return "; ".join(parts) + "."
