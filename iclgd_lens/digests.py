"""Telling values apart by a few hex digits."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def digest_of(value: Any, digits: int = 16) -> str:
    """The first hex digits of the SHA-256 of a value as JSON writes it; mappings are equal in any order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:digits]
