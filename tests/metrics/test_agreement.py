"""Accuracy and Rec2FTP on hand-made predictions."""

import pytest
import torch

from iclgd_lens import Activations, accuracy, correct, rec2ftp


def run(predictions: list[int], labels: list[int]) -> Activations:
    log_probs = torch.nn.functional.one_hot(torch.tensor(predictions), 3).float()
    mask = torch.ones(len(labels), 1, dtype=torch.bool)
    return Activations({"label_log_probs": log_probs}, mask, torch.tensor(labels))


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
