"""The tables of notebook 04 are those of plain TransformerLens on whole prompts, one by one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from iclgd_lens import lcgd, load_task
from iclgd_lens.data.prompts import context_tokens

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "04_with_your_own_hooks.ipynb"


@pytest.fixture(scope="module")
def notebook() -> dict[str, Any]:
    """What the notebook's code leaves, from its first cell to the last of its tables."""
    cells = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert "changed_heads" in cells[-1]
    found: dict[str, Any] = {}
    for cell in cells[:-1]:
        exec(cell, found)
    return found


@pytest.fixture(scope="module")
def plain(bundled) -> dict[str, list[float]]:
    """The same tables by `run_with_hooks`."""
    episode = load_task("bundled/remapped").episode(bundled, k=12, n_queries=32, seed=0)
    update = lcgd(bundled, episode.demonstrations, lr=0.3)
    columns = [int(word) for (word,) in episode.queries[0].label_tokens]
    names = [f"blocks.{layer}.hook_attn_out" for layer in range(bundled.cfg.n_layers)]
    queries = [query.tokens for query in episode.queries]
    before = context_tokens(episode.demonstrations)
    in_context = [torch.cat([before, tokens[1:]]) for tokens in queries]

    def outputs(prompts: Sequence[torch.Tensor], hooks: Sequence[tuple]) -> list[dict[str, torch.Tensor]]:
        """Each attention layer's output at the last token, prompt by prompt."""
        found = []
        for prompt in prompts:
            seen: dict[str, torch.Tensor] = {}

            def keep(name: str, seen: dict[str, torch.Tensor] = seen) -> tuple:
                return name, lambda out, hook: seen.__setitem__(name, out[0, -1].clone())

            with torch.no_grad():
                bundled.run_with_hooks(prompt[None], fwd_hooks=[*hooks, *map(keep, names)])
            found.append(seen)
        return found

    def accuracies(source: list[dict[str, torch.Tensor]], hooks: Sequence[tuple]) -> list[float]:
        """Zero-shot accuracy with one layer's output at the last token from a source, layer by layer."""
        found = []
        for name in names:
            right = 0
            for query, stored in zip(episode.queries, source, strict=True):

                def put_in(out: torch.Tensor, hook: Any, value: torch.Tensor = stored[name]) -> torch.Tensor:
                    return torch.cat([out[:, :-1], value.expand(1, 1, -1)], dim=1)

                with torch.no_grad():
                    logits = bundled.run_with_hooks(query.tokens[None], fwd_hooks=[*hooks, (name, put_in)])
                right += int(logits[0, -1, columns].argmax()) == query.label
            found.append(right / len(queries))
        return found

    under_update = update.fwd_hooks(bundled)
    return {
        "ablated": accuracies(outputs(queries, []), under_update),
        "ICL": accuracies(outputs(in_context, []), []),
        "LCGD": accuracies(outputs(queries, under_update), []),
    }


def test_plain_transformerlens_gives_the_known_tables(plain):
    assert {name: [round(value, 2) for value in values] for name, values in plain.items()} == {
        "ablated": [1.00, 0.41, 0.41, 0.56],
        "ICL": [0.59, 0.78, 0.91, 0.41],
        "LCGD": [0.41, 0.06, 0.56, 0.41],
    }


def test_ablation_under_the_update_is_that_of_whole_prompts(notebook, plain):
    assert notebook["ablated"] == plain["ablated"]


@pytest.mark.parametrize("source", ["ICL", "LCGD"])
def test_patching_is_that_of_whole_prompts(notebook, plain, source):
    assert notebook["patched"][source] == plain[source]
