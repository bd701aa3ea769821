"""YAML files that are read into a pydantic model; what is wrong with one is said with its line, all of it at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)

Problem = tuple[int, str, str]
"""Line, place in words, reason."""


def read_checked(path: Path, kind: type[Model], expected: str) -> Model:
    """Read a YAML file into a model.

    Args:
        path: The file.
        kind: The model.
        expected: What a file holds at its top, for one that holds no mapping.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML, has a key twice, or the model refuses it; the message gives the line and the reason of each.
    """
    text = path.read_text(encoding="utf-8")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: this is not YAML: {getattr(error, 'problem', None) or error}") from error
    if root is None or not isinstance(content, dict):
        raise ValueError(f"{path}: {expected}; got {type(content).__name__}")
    problems = list(_written_twice(root))
    try:
        read = kind.model_validate(content)
    except ValidationError as error:
        problems += _problems(error, root)
    if problems:
        # One message for each place, of which a union of types makes several.
        places = dict.fromkeys((line, where) for line, where, _ in problems)
        said = {place: " or ".join(dict.fromkeys(why for *at, why in problems if tuple(at) == place)) for place in places}
        raise ValueError("\n".join(f"{path}, line {line}: {where}: {why}" for (line, where), why in sorted(said.items())))
    return read


def _problems(error: ValidationError, root: yaml.Node) -> Iterator[Problem]:
    for each in error.errors():
        line, where = _place(root, each["loc"])
        reason = str(each["ctx"]["error"]) if each["type"] == "value_error" else each["msg"]
        given = "" if each["type"] in ("missing", "extra_forbidden", "value_error") else f", got {each['input']!r}"
        if each["type"] == "extra_forbidden":
            reason = "there is no such key"
        if each["type"] == "missing":
            reason = "this is needed"
        yield line, where, f"{reason[:1].lower()}{reason[1:]}{given}"


def _place(root: yaml.Node, location: tuple[int | str, ...]) -> tuple[int, str]:
    """The line of a place in a file, and the place in words. What stands in no file, such as a missing key, is where it would."""
    node, line, said = root, root.start_mark.line + 1, []
    for step in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == step]
            if found:
                line, node = found[0][0].start_mark.line + 1, found[0][1]
                said.append(str(step))
            elif not said or step == location[-1]:
                said.append(str(step))
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
    return line, ".".join(said) or "the file"


def _written_twice(node: yaml.Node) -> Iterator[Problem]:
    """Keys that a mapping has twice, of which YAML would silently take the last."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                yield key.start_mark.line + 1, key.value, "this key is there twice"
            seen.add(key.value)
            yield from _written_twice(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _written_twice(item)
