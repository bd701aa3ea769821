"""Line breaks and tabs that are typed as a backslash and a letter."""

import pytest

from iclgd_lens.data.escapes import unescaped


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"\n", "\n"),
        (r"a\n\n\tb\r", "a\n\n\tb\r"),
        (r"\\n", r"\n"),
        ("\n", "\n"),
        ("", ""),
        ("{eos} ;", "{eos} ;"),
        ("日本", "日本"),
    ],
)
def test_a_backslash_and_a_letter_are_the_character_that_they_stand_for(typed, meant):
    assert unescaped("--separator", typed) == meant


@pytest.mark.parametrize(("typed", "found"), [(r"a\d", r"\\d"), ("a\\", r"\\ in"), ("\\\n", r"\\")])
def test_a_backslash_before_anything_else_is_refused(typed, found):
    with pytest.raises(ValueError, match=f"--separator has {found}"):
        unescaped("--separator", typed)
