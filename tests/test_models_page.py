"""The table of docs/models.md says what is so: `lens.check` makes it, on the models that the tests run over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from iclgd_lens import check, load_model
from iclgd_lens.models.hooked import is_hooked_transformer
from iclgd_lens.models.sites import sites_of
from iclgd_lens.runs.prefix import Prefix
from tests.hf_zoo import ARCHITECTURES, make_hf_model
from tests.models_zoo import require_hooked_transformer

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- architectures -->\n", "<!-- /architectures -->"
COLUMNS = ("architecture", "`HookedTransformer`", "`TransformerBridge`", "prefix", "trained", "beside a plain attention")


def test_the_table_has_a_row_for_every_model_that_tests_run_over(request: pytest.FixtureRequest):
    """`pytest --write-golden` writes it anew."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    made, after = rest.split(END)
    if request.config.getoption("--write-golden"):
        require_hooked_transformer()
        PAGE.write_text(before + BEGIN + table() + END + after, encoding="utf-8")
        return
    named = [line.split(" | ")[0].removeprefix("| ") for line in made.splitlines()[2:]]
    assert named == [type(make_hf_model(name)).__name__ for name in ARCHITECTURES]


@pytest.mark.parametrize(
    "name", [name if name in ("gpt2", "gemma2") else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
def test_a_row_says_what_the_model_is_and_what_check_finds(name: str):
    require_hooked_transformer()
    assert written(row(name)) in PAGE.read_text(encoding="utf-8").splitlines()


def table() -> str:
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(row, ARCHITECTURES)]
    return "".join(f"{written(cells)}\n" for cells in rows)


def written(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def row(name: str) -> tuple[str, ...]:
    hf_model = make_hf_model(name)
    config = hf_model.config
    model = load_model(hf_model=hf_model)
    sites = sites_of(model)
    prefix = Prefix.run(sites, torch.arange(6))
    reuse = "reused" if prefix.cache is not None else "run again"
    parameters = "W_K, W_V, b_K, b_V" if hf_has_biases(model) else "W_K, W_V, and biases that begin at 0"
    return (
        type(hf_model).__name__,
        converted(name),
        checked(model),
        reuse if sites.exchangeable_padding else f"{reuse}, by equal lengths",
        parameters,
        ", ".join(traits(model, config)) or "nothing",
    )


def converted(name: str) -> str:
    if reason := ARCHITECTURES[name].not_hooked:
        return f"no: {reason}"
    model = load_model(hf_model=make_hf_model(name), backend="hooked")
    assert is_hooked_transformer(model)
    return checked(model)


def checked(model: Any) -> str:
    """How many promises `lens.check` finds kept. Errors are left to the machine: rounding differs from one to the next."""
    found = check(model)
    assert found.ok, str(found)
    n_holding = sum(each.verdict == "holds" for each in found.rows)
    return f"{n_holding} hold" + (", no rotary positions" if n_holding < len(found.rows) else "")


def hf_has_biases(model: Any) -> bool:
    return model.blocks[0].attn.k.original_component.bias is not None


def traits(model: Any, config: Any) -> list[str]:
    """What an architecture has that has to be seen to."""
    attention, cfg = model.blocks[0].attn, model.cfg
    window = getattr(config, "sliding_window", None)
    found = {
        "rotary positions": cfg.positional_embedding_type == "rotary",
        "a fused projection": type(attention).__name__.startswith("Joint"),
        "grouped keys and values": cfg.n_key_value_heads not in (None, cfg.n_heads),
        "RMSNorm": cfg.normalization_type.startswith("RMS"),
        "norms of queries and keys": hasattr(attention, "k_norm"),
        "norms behind attention and MLP": hasattr(model.blocks[0], "ln1_post"),
        "soft caps": cfg.attn_scores_soft_cap > 0,
        "local attention": window is not None or "local" in getattr(config, "attention_layers", ()),
        "attention beside the MLP": bool(cfg.parallel_attn_mlp),
        "experts": bool(cfg.num_experts),
        "scores made again": type(attention).__name__ == "AttentionBridge",
    }
    return [trait for trait, has in found.items() if has]
