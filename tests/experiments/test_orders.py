"""Order sensitivity against plain loops, on frames of queries made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from iclgd_lens.experiments.orders import order_sensitivity

WORDS = ("ox", "bee", "ant")
KEYS = ["task", "k", "seed", "model", "method"]


def draw(seed: int, orders: int = 3, queries: int = 7, labels: int = 3) -> np.ndarray:
    """Probabilities `[order query label]`."""
    scores = np.exp(np.random.default_rng(seed).normal(size=(orders, queries, labels)))
    return scores / scores.sum(axis=-1, keepdims=True)


def frame(probabilities: np.ndarray, gold: list[int], numbers: list[int] | None = None, **about: Any) -> pd.DataFrame:
    base = {"task": "t", "k": 2, "seed": 0, "model": "trained", "method": "icl"} | about
    numbers = numbers or list(range(len(probabilities)))
    return pd.DataFrame(
        [
            base
            | {"order": numbers[order], "query": query, "label": WORDS[label], "is_gold": gold[query] == label, "probability": p}
            for (order, query, label), p in np.ndenumerate(probabilities)
        ]
    )


def expected(probabilities: np.ndarray, gold: list[int]) -> dict[str, float]:
    n_orders, n_queries, n_labels = probabilities.shape
    sds = [
        np.std([probabilities[order, query, label] for order in range(n_orders)], ddof=1)
        for query in range(n_queries)
        for label in range(n_labels)
    ]
    predicted = [[int(np.argmax(probabilities[order, query])) for query in range(n_queries)] for order in range(n_orders)]
    changed = [len({predicted[order][query] for order in range(n_orders)}) > 1 for query in range(n_queries)]
    known = [query for query in range(n_queries) if gold[query] >= 0]
    accuracies = [np.mean([predicted[order][query] == gold[query] for query in known]) for order in range(n_orders)]
    return {"probability_sd": np.mean(sds), "changed": np.mean(changed), "accuracy_sd": np.std(accuracies, ddof=1)}


def only(found: pd.DataFrame, **where: Any) -> dict[str, float]:
    for column, wanted in where.items():
        found = found[found[column] == wanted]
    (row,) = found.to_dict("records")
    return {name: row[name] for name in ("probability_sd", "changed", "accuracy_sd")}


@pytest.mark.parametrize("orders", [2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_plain_loops(seed: int, orders: int):
    probabilities, gold = draw(seed, orders), [(query + seed) % 3 for query in range(7)]
    found = order_sensitivity(frame(probabilities, gold))
    assert only(found) == pytest.approx(expected(probabilities, gold), abs=1e-6)
    assert found["orders"].tolist() == [orders]


def test_queries_of_unknown_gold_label_count_for_all_but_the_accuracy():
    probabilities, gold = draw(1), [0, -1, 2, -1, 1, 0, -1]
    assert only(order_sensitivity(frame(probabilities, gold))) == pytest.approx(expected(probabilities, gold), abs=1e-6)


def test_without_gold_labels_there_is_no_accuracy():
    probabilities = draw(2)
    found = only(order_sensitivity(frame(probabilities, [-1] * 7)))
    assert np.isnan(found.pop("accuracy_sd"))
    wanted = expected(probabilities, [0] * 7)
    assert found == pytest.approx({name: wanted[name] for name in found}, abs=1e-6)


def test_what_does_not_depend_on_the_order_is_zero():
    found = only(order_sensitivity(frame(np.repeat(draw(0, 1), 3, axis=0), [0] * 7)))
    assert found == pytest.approx({"probability_sd": 0, "changed": 0, "accuracy_sd": 0}, abs=1e-9)


def test_the_place_of_rows_and_the_numbers_of_orders_do_not_matter():
    probabilities, gold = draw(3), [0, 1, 2, 0, 1, 2, 0]
    made = frame(probabilities, gold, numbers=[7, 0, 2])
    for seed in range(5):
        mixed = order_sensitivity(made.sample(frac=1, random_state=seed))
        assert only(mixed) == pytest.approx(expected(probabilities, gold), abs=1e-6)


def test_one_order_has_no_row():
    assert order_sensitivity(frame(draw(0, 1), [0] * 7)).empty
    mixed = pd.concat([frame(draw(0, 1), [0] * 7, method="zsl"), frame(draw(0), [0] * 7)])
    assert order_sensitivity(mixed)["method"].tolist() == ["icl"]


def test_draws_models_and_methods_have_a_row_each_with_their_own_queries_and_labels():
    shapes = {
        ("t", 0, "trained", "icl"): (3, 7, 3),
        ("t", 1, "trained", "icl"): (2, 4, 2),
        ("t", 0, "untrained", "icl"): (3, 7, 3),
        ("t", 0, "trained", "gd"): (3, 7, 3),
        ("u", 0, "trained", "icl"): (2, 5, 2),
    }
    parts, wanted = [], {}
    for number, ((task, seed, model, method), shape) in enumerate(shapes.items()):
        probabilities, gold = draw(number, *shape), [query % shape[2] for query in range(shape[1])]
        parts.append(frame(probabilities, gold, task=task, seed=seed, model=model, method=method))
        wanted[task, seed, model, method] = expected(probabilities, gold)
    found = order_sensitivity(pd.concat(parts))
    assert not found.duplicated(KEYS).any()
    assert len(found) == len(shapes)
    for (task, seed, model, method), numbers in wanted.items():
        assert only(found, task=task, seed=seed, model=model, method=method) == pytest.approx(numbers, abs=1e-6)
