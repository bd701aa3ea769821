"""The package as a whole: what it exports, and what importing it costs."""

import subprocess
import sys

import pytest

import iclgd_lens


@pytest.mark.parametrize("name", iclgd_lens.__all__)
def test_every_exported_name_is_there_and_described(name):
    assert getattr(iclgd_lens, name).__doc__


@pytest.mark.parametrize("module", ["iclgd_lens", "iclgd_lens.cli"])
def test_importing_does_not_import_torch(module):
    """So that `iclgd --help` and completion are instant."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformer_lens' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
