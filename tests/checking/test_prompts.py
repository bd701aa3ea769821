"""Prompts have the length that is asked for, and no special tokens."""

import pytest

from iclgd_lens import load_model
from iclgd_lens.checking.prompts import Prompts
from iclgd_lens.data.prompts import context_tokens
from tests.hf_zoo import make_hf_model


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts.of(load_model(hf_model=make_hf_model("mistral")), longest=4_500)


@pytest.mark.parametrize("length", [4, 5, 9, 24, 61])
def test_contexts_have_the_length_that_is_asked_for(prompts, length):
    assert len(context_tokens(prompts.demonstrations(length, seed=3))) == length


def test_special_tokens_are_not_drawn(prompts):
    assert not {0, 1, 2} & set(prompts.draw(2_000, seed=0)[1:].tolist())


def test_short_prompts_end_where_something_changes_and_long_ones_after(prompts):
    (window,) = prompts.changes
    assert max(prompts.short) <= window < prompts.long


def test_lengths_that_no_prompt_may_have_are_told(prompts):
    few = Prompts.of(load_model(hf_model=make_hf_model("mistral")), longest=6)
    assert (few.changes, few.beyond) == ((), prompts.changes)
