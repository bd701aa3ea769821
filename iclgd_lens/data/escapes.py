"""Line breaks and tabs in texts that are typed: a shell and an unquoted value in YAML give a backslash and a letter."""

from __future__ import annotations

import re

_MEANS = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}


def unescaped(name: str, text: str) -> str:
    r"""Put in the characters that `\n`, `\t`, `\r` and `\\` stand for.

    Args:
        name: The option, for messages.
        text: What was typed.

    Raises:
        ValueError: If a backslash stands before anything else.
    """

    def meant(found: re.Match[str]) -> str:
        if found[0] not in _MEANS:
            raise ValueError(f"{name} has {found[0]} in {text!r}; known are {', '.join(_MEANS)}, the last of which is a backslash")
        return _MEANS[found[0]]

    return re.sub(r"\\(?s:.)?", meant, text)
