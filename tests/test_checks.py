"""What is not allowed is refused with the argument's name and what was given; what is allowed passes."""

import math

import numpy as np
import pytest
import torch

from iclgd_lens.checks import (
    require_count,
    require_finite,
    require_not_negative,
    require_one_of,
    require_positive,
    require_seed,
    require_some_of,
)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: require_one_of("kind", "c", ("a", "b")), r"^kind must be one of 'a', 'b'; got 'c'$"),
        (lambda: require_some_of("kinds", ["a", "c"], ("a", "b")), r"^kinds must be some of a, b; got 'c'$"),
        (lambda: require_count("n", 0), "^n must be at least 1, got 0$"),
        (lambda: require_count("n", 1.0), r"^n must be at least 1, got 1\.0$"),
        (lambda: require_positive("lr", 0), "^lr must be a number, finite and above 0; got 0$"),
        (lambda: require_positive("lr", math.nan), "got nan$"),
        (lambda: require_positive("lr", "0.1"), r"got '0\.1'$"),
        (lambda: require_finite("x", torch.tensor([1.0, math.inf, math.nan])), "^x has 2 of 3 entries that are not finite$"),
    ],
)
def test_what_is_not_allowed_is_said_with_its_name(check, message):
    with pytest.raises(ValueError, match=message):
        check()


def test_numbers_of_numpy_are_numbers():
    require_count("n", np.int64(3))
    require_positive("lr", np.float32(0.1))


@pytest.mark.parametrize("seed", [1.5, "a", None, True, torch.tensor(1), 2**64, -(2**63) - 1], ids=repr)
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match=r"^seed must be a whole number"):
        require_seed(seed)


def test_a_seed_is_returned_as_an_integer_of_python_s():
    assert [require_seed(seed) for seed in (-1, 0, np.int64(3), 2**64 - 1)] == [-1, 0, 3, 2**64 - 1]
    assert type(require_seed(np.int64(3))) is int


def test_truth_values_are_no_numbers():
    for check in (require_count, require_positive, require_not_negative):
        with pytest.raises(ValueError, match="got True"):
            check("n", True)
