"""How much predictions depend on the order of the demonstrations, in-context and finetuned (Shen et al. 2024)."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import torch

from iclgd_lens.experiments.results import EPISODE, refuse_pooling
from iclgd_lens.metrics.agreement import order_spread


def order_sensitivity(queries: pd.DataFrame) -> pd.DataFrame:
    """Compare what the same demonstrations in several orders make of the same queries.

    Args:
        queries: Rows of several orders, as in `Comparison.queries`.

    Returns:
        One row per draw, model and method with at least two orders: the columns of `EPISODE`, `model`, `method`, `orders`, and the
        metrics `probability_sd` (`order_spread`, averaged over queries), `changed` (the share of queries whose prediction is not
        the same in all orders) and `accuracy_sd` (the standard deviation of the accuracy over orders; missing without gold
        labels).
    """
    rows: list[dict[str, Any]] = []
    by = [*EPISODE, "model", "method"]
    refuse_pooling(queries, by)
    for key, group in queries.groupby(by, sort=False):
        orders = group["order"].nunique()
        if orders < 2:
            continue
        about = dict(zip(by, key, strict=True))
        table = group.sort_values(["order", "query", "label"])
        shape = (orders, table["query"].nunique(), table["label"].nunique())
        if len(table) != math.prod(shape):
            raise ValueError(f"not every order of {about} has every query and label word: {len(table)} rows for {shape}")
        distributions = torch.tensor(table["probability"].to_numpy()).view(shape)
        gold = torch.tensor(table["is_gold"].to_numpy()).view(shape)[0]
        finite = distributions.isfinite().all(dim=-1).all(dim=0)
        distributions, gold = distributions[:, finite], gold[finite]
        predicted = distributions.argmax(dim=-1)
        right = gold.gather(-1, predicted.T).float()[gold.any(dim=-1)]
        rows.append(
            {
                **about,
                "orders": orders,
                "probability_sd": order_spread(distributions).mean().item(),
                "changed": (predicted != predicted[0]).any(dim=0).double().mean().item(),
                "accuracy_sd": right.mean(dim=0).std().item() if len(right) else float("nan"),
            }
        )
    return pd.DataFrame(rows)
