"""Accuracy, recall and the likeness of outputs, on hand-made scores of label words."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax
from torch import Tensor

from iclgd_lens import Activations, accuracy, correct, rec2ftp
from iclgd_lens.metrics.agreement import (
    false_to_true,
    js_divergence,
    label_distribution,
    label_loss,
    lens_gold_probability,
    order_spread,
    same_prediction,
)


def run(predictions: list[int], labels: list[int]) -> Activations:
    log_probs = torch.nn.functional.one_hot(torch.tensor(predictions), 3).float()
    mask = torch.ones(len(labels), 1, dtype=torch.bool)
    return Activations({"label_log_probs": log_probs}, mask, torch.tensor(labels), torch.tensor(labels), "")


def test_accuracy_counts_known_labels_only():
    assert float(accuracy(run([0, 1, 2, 0], [0, 1, 1, -1]))) == pytest.approx(2 / 3)
    assert accuracy(run([0, 1], [-1, -1])).isnan()


def test_accuracy_leaves_out_queries_without_finite_scores():
    broken = run([0, 1, 0], [0, 0, 0])
    broken.label_log_probs[1] = float("nan")
    assert float(accuracy(broken)) == 1.0
    assert correct(broken).isnan().tolist() == [False, True, False]
    assert rec2ftp(broken, broken, run([1, 1, 1], [0, 0, 0])).isnan().tolist() == [False, True, False]


def test_rec2ftp_looks_only_at_what_finetuning_corrected():
    labels = [0, 0, 0, 0, 1]
    zsl, ft, icl = run([1, 1, 1, 0, 1], labels), run([0, 0, 1, 0, 1], labels), run([0, 2, 0, 1, 0], labels)
    found = rec2ftp(icl, ft, zsl)
    assert found.isnan().tolist() == [False, False, True, True, True]
    assert found[:2].tolist() == [1.0, 0.0]
    assert rec2ftp(icl, zsl, zsl).isnan().all()


def test_rec2ftp_refuses_runs_of_other_queries():
    with pytest.raises(ValueError, match="same queries"):
        rec2ftp(run([0], [0]), run([0], [1]), run([0], [0]))


def scored(log_probs: Tensor, labels: list[int] | None = None) -> Activations:
    n = len(log_probs)
    mask = torch.ones(n, 1, dtype=torch.bool)
    gold = torch.tensor(labels or [0] * n)
    return Activations({"label_log_probs": log_probs}, mask, gold, gold, "")


def random_scores(seed: int, n: int = 50, n_labels: int = 4) -> Tensor:
    return 3 * torch.randn(n, n_labels, generator=torch.Generator().manual_seed(seed)) - 5


def of_distribution(probabilities: Tensor) -> Activations:
    """Finite scores whose softmax holds exact zeros where the probabilities do."""
    return scored(probabilities.log().clamp(min=-1e4) - 2)


def test_false_to_true_are_the_queries_that_zsl_gets_wrong_and_both_others_right():
    labels = [0, 0, 0, 0, 1, -1]
    zsl, ft, icl = run([1, 1, 1, 0, 2, 1], labels), run([0, 0, 2, 0, 1, 0], labels), run([0, 2, 0, 0, 1, 0], labels)
    found = false_to_true(icl, ft, zsl)
    assert found.dtype == torch.bool
    assert found.tolist() == [True, False, False, False, True, False]
    icl.label_log_probs[0, 2] = float("nan")
    zsl.label_log_probs[4, 0] = float("-inf")
    assert not false_to_true(icl, ft, zsl).any()


def test_label_distribution_is_over_the_label_words_and_keeps_their_ratios():
    scores = random_scores(0)
    distribution = label_distribution(scored(scores))
    torch.testing.assert_close(distribution.sum(dim=-1), torch.ones(50))
    ratios = distribution[:, 1:].log() - distribution[:, :1].log()
    torch.testing.assert_close(ratios, scores[:, 1:] - scores[:, :1], atol=1e-5, rtol=0)
    torch.testing.assert_close(label_distribution(scored(scores - 100)), distribution, atol=1e-5, rtol=0)


def test_label_loss_is_the_cross_entropy_of_the_gold_label_in_nats():
    scores, labels = random_scores(0), [number % 4 for number in range(50)]
    expected = -log_softmax(scores.double().numpy(), axis=1)[range(50), labels]
    np.testing.assert_allclose(label_loss(scored(scores, labels)), expected, atol=1e-5)
    assert label_loss(scored(torch.zeros(1, 3))).item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_label_loss_is_missing_where_the_label_is_unknown_or_a_score_is_not_finite(bad: float):
    scores = random_scores(0, n=3)
    scores[1, 2] = bad
    assert label_loss(scored(scores, [-1, 0, 1])).isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_same_prediction_needs_finite_scores_and_no_gold_label(bad: float):
    a, b = run([0, 1, 2, 0], [-1] * 4), run([0, 2, 2, 0], [-1] * 4)
    a.label_log_probs[3, 1] = bad
    assert same_prediction(a, b)[:3].tolist() == same_prediction(b, a)[:3].tolist() == [1.0, 0.0, 1.0]
    assert same_prediction(a, b)[3].isnan()
    assert same_prediction(b, a)[3].isnan()


@pytest.mark.parametrize("n_labels", [2, 5])
@pytest.mark.parametrize("kind", ["dense", "sparse", "one_hot"])
def test_js_divergence_is_scipy_s_in_nats(kind: str, n_labels: int):
    generator = torch.Generator().manual_seed(n_labels)

    def distributions() -> Tensor:
        dense = torch.rand(100, n_labels, generator=generator)
        if kind == "dense":
            return dense / dense.sum(-1, keepdim=True)
        highest = torch.nn.functional.one_hot(dense.argmax(-1), n_labels)
        if kind == "one_hot":
            return highest.float()
        kept = dense * ((torch.rand(100, n_labels, generator=generator) < 0.5) | (highest == 1))
        return kept / kept.sum(-1, keepdim=True)

    p, q = distributions(), distributions()
    found = js_divergence(of_distribution(p), of_distribution(q))
    # scipy's square root of a rounding error below zero is missing.
    expected = np.nan_to_num(jensenshannon(p.double().numpy(), q.double().numpy(), axis=1)) ** 2
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert kind == "dense" or (p == 0).any()


def test_js_divergence_is_symmetric_and_between_zero_and_ln_2():
    a, b = scored(random_scores(0)), scored(random_scores(1))
    found = js_divergence(a, b)
    torch.testing.assert_close(found, js_divergence(b, a), atol=1e-7, rtol=0)
    assert ((found > 0) & (found < math.log(2))).all()
    assert not js_divergence(a, scored(a.label_log_probs - 3)).gt(1e-6).any()
    disjoint = js_divergence(of_distribution(torch.tensor([[0.3, 0.7, 0.0]])), of_distribution(torch.tensor([[0.0, 0.0, 1.0]])))
    assert disjoint.item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_js_divergence_is_missing_where_a_score_is_not_finite_in_either_run(bad: float):
    scores = random_scores(0, n=3)
    scores[1, 2] = bad
    for pair in ((scored(scores), scored(random_scores(1, n=3))), (scored(random_scores(1, n=3)), scored(scores))):
        assert js_divergence(*pair).isnan().tolist() == [False, True, False]


def test_agreement_of_runs_of_other_queries_is_refused():
    a, other, fewer = run([0, 1], [0, 0]), run([0, 1], [0, 1]), run([0], [0])
    for wrong in (other, fewer):
        for refused in (same_prediction, js_divergence):
            with pytest.raises(ValueError, match="same queries"):
                refused(a, wrong)
        for runs in ((wrong, a, a), (a, wrong, a), (a, a, wrong)):
            with pytest.raises(ValueError, match="same queries"):
                false_to_true(*runs)


def test_order_spread_is_the_sample_sd_over_orders_averaged_over_labels():
    distributions = random_scores(0, n=3 * 7).view(3, 7, 4).softmax(-1)
    expected = np.std(distributions.numpy(), axis=0, ddof=1).mean(axis=-1)
    np.testing.assert_allclose(order_spread(distributions), expected, atol=1e-6)
    assert not order_spread(distributions[:1].expand(2, -1, -1)).gt(1e-7).any()
    with pytest.raises(ValueError, match="at least two of them, got 1"):
        order_spread(distributions[:1])


def test_the_lens_gives_the_gold_label_its_share_of_the_label_words_after_every_layer():
    logits = torch.tensor([[[0.0, 0.0], [2.0, 0.0]], [[1.0, 3.0], [-5.0, 5.0]], [[9.0, 0.0], [0.0, 0.0]]])
    logits[1, 0, 0] = math.inf
    labels = torch.tensor([0, 1, -1])
    runs = Activations({"lens_logits": logits}, torch.ones(3, 1, dtype=torch.bool), labels, labels, "")
    found = lens_gold_probability(runs)
    assert found[0].tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-2))])
    assert found[1, 1] == pytest.approx(1 / (1 + math.exp(-10)))
    assert found.isnan().tolist() == [[False, False], [True, False], [True, True]]
