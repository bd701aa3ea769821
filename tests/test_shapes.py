"""Shapes in annotations hold on the main path, and one that does not is found; `CHECK_SHAPES=1` checks them in all tests."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
from tests.shapes import check_shapes

check_shapes()

import torch
from jaxtyping import TypeCheckError

import iclgd_lens as lens

torch.set_num_threads(1)
model = lens.load_model("bundled", device="cpu")
episode = lens.load_task("bundled/remapped").episode(model, k=3, n_queries=4, seed=0)
lens.compare(model, episode, ["lcgd"], loss_on="label", controls=["random_weights"], kernels=True)
lens.attention_example(model, episode, {"gd": lens.gd(model, episode.demonstrations, lr=0.1)})
lens.positive_control()
print("checked")
try:
    lens.spearman_rho(torch.rand(2, 3), torch.rand(2, 4))
except TypeCheckError as error:
    print(str(error).splitlines()[0])
"""


@pytest.mark.slow
def test_shapes_hold_on_the_main_path_and_a_wrong_one_is_found():
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    checked, found = result.stdout.splitlines()
    assert checked == "checked"
    assert found.startswith("Type-check error whilst checking the parameters of iclgd_lens.metrics.ranking.spearman_rho")
