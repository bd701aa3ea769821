"""Running commands as somebody who may not write everywhere and has no home, also where the tests run as root."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DROP_FROM_BOUNDING_SET = 24
CAPABILITIES = (1, 2)
"""To write, and to read, what permissions forbid (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""


def _drop() -> None:
    """Make permissions hold for root, too, in the program that is started next."""
    control = ctypes.CDLL(None).prctl
    for capability in CAPABILITIES:
        if control(DROP_FROM_BOUNDING_SET, capability, 0, 0, 0):
            raise OSError("this root may not give up its rights")


def run_unprivileged(*arguments: str, folder: Path, home: str | None, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments in a folder, with this for a home.

    Args:
        arguments: Of the interpreter.
        folder: The working directory.
        home: What `HOME` says; None leaves it out.
        timeout: Seconds.
    """
    kept = ("PATH", "LANG", "LD_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if home is not None:
        environment["HOME"] = home
    try:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment,
            preexec_fn=_drop if os.name == "posix" and os.geteuid() == 0 else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.SubprocessError as error:
        if isinstance(error, subprocess.TimeoutExpired):
            raise
        pytest.skip(f"root cannot be kept from writing here: {error}")


def require_permissions_hold(folder: Path) -> None:
    """Skip the test where a process that may not write in a folder does so all the same."""
    tried = run_unprivileged("-c", "open('tried', 'w')", folder=folder, home=None)
    if not tried.returncode:
        pytest.skip("permissions do not hold on this file system")
