"""What is not allowed is refused with the argument's name and what was given; what is allowed passes."""

import math

import numpy as np
import pytest
import torch

from iclgd_lens.checks import require_count, require_finite, require_one_of, require_positive, require_some_of


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
