"""Draw the figures of these pages with the package itself: `python docs/figures/draw.py` (needs the extra `figures` and a browser).

What is drawn is computed here, on the bundled model; nothing is read from anywhere.
"""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.io import write_images
from plotly.subplots import make_subplots
from torch import Tensor

from iclgd_lens import Comparison, compare, gd, layer_figure, lcgd, load_model, load_task, untrained_twin
from iclgd_lens.metrics.similarity import cosine

FOLDER = Path(__file__).parent


def similarity() -> go.Figure:
    """SimAOU and SimAM_Δ by layer over five draws of the bundled task, beside five untrained twins: the README's picture."""
    model, task = load_model("bundled"), load_task("bundled/remapped")
    found = [
        compare(model, task.episode(model, k=12, n_queries=32, seed=seed), lr=0.3, untrained=untrained_twin(model, seed=seed))
        for seed in range(5)
    ]
    return layer_figure(Comparison.concatenated(found).frame)


def causality() -> go.Figure:
    """How much a layer's first step changes when the block above or below it is disturbed, for GD and LCGD."""
    changes = layer_dependence()
    low, high = -3.0, 0.0
    figure = make_subplots(cols=2, subplot_titles=["GD", "LCGD"], horizontal_spacing=0.1)
    for column, found in enumerate(changes.values(), start=1):
        nothing = found == 0
        shown = found.clamp_min(10**low).log10().masked_fill(nothing, float("nan"))
        text = [["0" if value == 0 else f"{value:.1g}" for value in row] for row in found.tolist()]
        layers = [f"{layer}" for layer in range(len(found))]
        heat = go.Heatmap(
            z=shown.tolist(), x=layers, y=layers, zmin=low, zmax=high, text=text, texttemplate="%{text}", coloraxis="coloraxis"
        )
        figure.add_trace(heat, row=1, col=column)
        figure.update_xaxes(title="block that is disturbed", type="category", row=1, col=column)
        figure.update_yaxes(type="category", row=1, col=column)
    figure.update_yaxes(title="layer whose update changes", row=1, col=1)
    colour = {"colorscale": "Viridis", "cmin": low, "cmax": high}
    ticks = {"tickvals": [-3, -2, -1, 0], "ticktext": ["0.001", "0.01", "0.1", "1"]}
    bar = {"title": {"text": "relative change", "side": "right"}, **ticks}
    figure.update_layout(coloraxis={**colour, "colorbar": bar}, width=820, height=400, template="plotly_white")
    return figure


def layer_dependence(scale: float = 0.1) -> dict[str, Float[Tensor, "layer block"]]:
    """The change of ΔW_V of every layer's first step, relative to its length, when noise is added to one block's output.

    The noise stands for any change of the block's weights: `scale` times the length of what it is added to.
    """
    model = load_model("bundled")
    demonstrations = load_task("bundled/remapped").episode(model, k=1, n_queries=1, seed=0).demonstrations
    noise = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    noise = noise / noise.norm()

    def disturb(mlp_out: Float[Tensor, "batch pos d_model"], hook: object) -> Float[Tensor, "batch pos d_model"]:
        return mlp_out + scale * mlp_out.norm(dim=-1, keepdim=True) * noise

    layers = range(model.cfg.n_layers)
    found = {}
    for name, method in {"gd": gd, "lcgd": lcgd}.items():
        plain = method(model, demonstrations, lr=0.3)
        change = torch.zeros(len(layers), len(layers))
        for block in layers:
            with model.hooks(fwd_hooks=[(f"blocks.{block}.hook_mlp_out", disturb)]):
                disturbed = method(model, demonstrations, lr=0.3)
            for layer in layers:
                before, after = plain.delta("W_V", layer), disturbed.delta("W_V", layer)
                change[layer, block] = (after - before).norm() / before.norm()
        found[name] = change
    return found


def free_similarity() -> go.Figure:
    """SimAOU and SimAOU_norm of two changes that share nothing, by the length of the changed states: simulated, and as formula."""
    lengths = torch.linspace(1.05, 5, 40)
    figure = go.Figure()
    figure.add_scatter(x=lengths.tolist(), y=((1 - 1 / lengths) / 2).tolist(), name="(1 − ‖z‖/‖h‖)/2", line={"color": "#000000"})
    for name, colour, values in zip(("SimAOU_norm", "SimAOU"), ("#D55E00", "#0072B2"), unrelated_changes(lengths), strict=True):
        figure.add_scatter(
            x=lengths.tolist(), y=values.tolist(), name=f"{name}, simulated", mode="markers", marker={"color": colour}
        )
    figure.update_xaxes(title="‖h‖ / ‖z‖")
    figure.update_yaxes(title="similarity of two unrelated changes", range=[-0.05, 0.5])
    figure.update_layout(width=720, height=380, template="plotly_white", legend={"x": 0.02, "y": 0.98})
    return figure


def unrelated_changes(lengths: Float[Tensor, "length"], d_model: int = 768, n: int = 400) -> Float[Tensor, "two length"]:
    """The mean similarity, with and without scaling, of z + noise and z + other noise, both of a length relative to z's."""
    generator = torch.Generator().manual_seed(0)

    def change() -> Float[Tensor, "length n d_model"]:
        noise = torch.randn(n, d_model, generator=generator)
        noise[:, 0] = 0.0  # orthogonal to z, which is the first axis
        size = (lengths**2 - 1).sqrt()
        return size[:, None, None] * noise / noise.norm(dim=-1, keepdim=True)

    z = torch.zeros(d_model)
    z[0] = 1.0
    one, other = change(), change()
    unit = [(z + each) / lengths[:, None, None] - z for each in (one, other)]
    return torch.stack([cosine(*unit).mean(dim=-1), cosine(one, other).mean(dim=-1)])


FIGURES = {"similarity": similarity, "causality": causality, "free_similarity": free_similarity}
"""What is drawn, by the name of its file; `learning_rate.svg` is written by `iclgd reproduce --lr-curve`."""


if __name__ == "__main__":
    torch.set_num_threads(1)
    drawn = [figure() for figure in FIGURES.values()]
    files = [FOLDER / f"{name}.svg" for name in FIGURES]
    write_images(fig=drawn, file=files, width=[each.layout.width for each in drawn], height=[each.layout.height for each in drawn])
