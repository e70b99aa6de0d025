"""Where in a YAML file a problem stands, and what it is in a user's words."""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import yaml

_AUTO = "literal['auto']"  # pydantic's name for that branch of a union
_FOLLOWS = "default_factory_not_called"  # a default that depends on another setting, which has its own problem
_BRANCHES = ("function-", "literal[", "constrained-", "[key]")  # steps of a location that are no keys of the file


class UniqueKeyLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


def located(root: yaml.Node | None, problems: Sequence[Any]) -> list[tuple[int, str]]:
    """The line of each problem, and what it is.

    Args:
        root: of the file.
        problems: pydantic's.
    """
    # of a setting that may be `auto` or a number, the number is what was meant: one problem, one line
    auto = {problem["loc"][:-1] for problem in problems if problem["loc"][-1:] == (_AUTO,)}
    return [
        (
            _line(root, problem["loc"]),
            _describe(problem) + (" (or auto)" if problem["loc"][:-1] in auto else ""),
        )
        for problem in problems
        if problem["loc"][-1:] != (_AUTO,) and problem["type"] != _FOLLOWS
    ]


def _line(root: yaml.Node | None, location: tuple[int | str, ...]) -> int:
    """The line of the deepest node on the way to `location`."""
    line = 1
    for node in _walk(root, location):
        line = node.start_mark.line + 1
    return line


def _walk(node: yaml.Node | None, location: tuple[int | str, ...]) -> Iterator[yaml.Node]:
    for step in location:
        if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            yield node
        elif isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == step), None)
            if found:
                yield found[0]
                node = found[1]


def _describe(problem: Any) -> str:
    where = ".".join(str(step) for step in problem["loc"] if not str(step).startswith(_BRANCHES))
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "there is no such key"
    elif problem["type"] not in ("value_error", "missing"):
        message = f"{message}, not {problem['input']!r}"
    return f"{where}: {message}" if where else message
