"""A hub that is away."""

import pytest

from iclgd_lens.models import loading


@pytest.fixture
def asked(monkeypatch):
    """The names and options that Hugging Face models were asked for with; there is no hub."""
    found = []

    def fetch(name, **options):
        found.append((name, options))
        raise OSError("there is no hub here")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", fetch)
    return found
