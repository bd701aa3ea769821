"""The main jobs open no connection, unless the hub is asked for something, and unpickle nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models_zoo import require_hooked_transformer

ROOT = Path(__file__).parent.parent


def run_sealed(jobs: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # Without the variables that tell libraries to stay off the network: they should stay off it by themselves.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    return subprocess.run(
        [sys.executable, "-m", "tests.sealed", jobs, str(folder)],
        cwd=ROOT,
        env={**kept, "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def require_sealed(jobs: str, folder: Path) -> None:
    found = run_sealed(jobs, folder)
    tried = json.loads((folder / "tried.json").read_text())
    assert not tried, tried[0]
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_main_calls_ask_nobody_and_unpickle_nothing_which_would_be_seen(tmp_path):
    require_sealed("see,api", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["demo,report", "kernels", "reproduce", "sweep", "bench"])
def test_the_commands_ask_nobody_and_unpickle_nothing(tmp_path, jobs):
    if jobs == "bench":
        require_hooked_transformer()
    require_sealed(jobs, tmp_path)
