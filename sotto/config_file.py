"""YAML to a validated model, with errors that name file and line.

YAML is read with the safe loader, under the YAML 1.2 rule for booleans (a class called `no` stays a word), and a key
that stands twice is refused.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from sotto.errors import SottoError, did_you_mean

M = TypeVar("M", bound=BaseModel)
MAX_BYTES = 1 << 20
MAX_DEPTH = 4


@dataclass(frozen=True)
class Source:
    """Where values came from: a display name and the line of each key path."""

    name: str
    lines: dict[tuple[str, ...], int] = field(default_factory=dict)
    overridden: frozenset[tuple[str, ...]] = frozenset()
    """Keys that came from `--set` and not from the file."""

    def at(self, path: tuple[str, ...]) -> str:
        """`file:line` of the key, or of the nearest enclosing section."""
        for key in self.overridden:
            if path[:2] == key or (path == key[:1] and path not in self.lines):
                return f"--set {'.'.join(key)}"
        for depth in range(len(path), 0, -1):
            if path[:depth] in self.lines:
                return f"{self.name}:{self.lines[path[:depth]]} ({'.'.join(path)})"
        return f"{self.name} ({'.'.join(path)})" if path else self.name


_UNREADABLE = (yaml.YAMLError, RecursionError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What PyYAML raises: its own errors, and what Python raises inside it for `!!int ''`, deep nesting or long numbers."""


def _problem(error: Exception) -> str:
    if isinstance(error, yaml.YAMLError):
        return "syntax error"
    return "it is nested too deeply" if isinstance(error, RecursionError) else "a value is not of the type it claims"


class _Loader(yaml.SafeLoader):
    pass


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regex) for tag, regex in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read back as text, and so never writes an anchor."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def dump(values: Any, flow: bool = False) -> str:
    """YAML that `load` reads back as the same values; with `flow` on one line."""
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=flow, width=10_000)
    # A bare word ends with an end-of-document mark. No strip(): a no-break space may be the word itself.
    return text.removesuffix("\n").removesuffix("\n...") if flow else text


def load(cls: type[M], path: Path, overrides: list[str] | tuple[str, ...] = ()) -> M:
    """Reads `path`, applies overrides and validates. See `sotto.Config.load`."""
    text = _read(path)
    source = Source(name=str(path))
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _index_lines(node, (), source)
        values = loader.construct_document(node) if node is not None else None
    except _UNREADABLE as error:
        mark = getattr(error, "problem_mark", None)
        raise SottoError(
            "SOT101",
            what=f"the file is not valid YAML: {getattr(error, 'problem', None) or _problem(error)}",
            where=f"{path}:{mark.line + 1}" if mark else str(path),
            why="nothing can be read from it",
            fix="correct the line; 'sotto init' writes a valid example",
        ) from None
    if not isinstance(values, dict):
        raise SottoError(
            "SOT101",
            what="the file holds no sections",
            where=str(path),
            why="a configuration has the sections model, data, privacy, method, run and output",
            fix="start from 'sotto init --model ... --data ...'",
        )
    # A section of which every line is commented out reads as null; it says nothing, so it is empty.
    values = {section: {} if content is None else content for section, content in values.items()}
    keys = frozenset(tuple(item.partition("=")[0].strip().split(".", 1)) for item in overrides)
    return validate(cls, override(values, overrides), replace(source, overridden=keys))


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)  # a device has no end
    except OSError as error:
        nearby = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else [])
        raise SottoError(
            "SOT100",
            what=f"cannot read the configuration: {error.strerror or error}.{nearby}",
            where=str(path.absolute()),
            why="everything about a run comes from this file",
            fix="check the path, or write one with 'sotto init'",
        ) from None
    if len(raw) > MAX_BYTES:
        raise SottoError("SOT101", what=f"the file is longer than {MAX_BYTES} bytes", where=str(path),
                         why="a configuration is at most 1 MiB", fix="is this the data file?")  # fmt: skip
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise SottoError("SOT101", what="the file is not UTF-8 text", where=str(path), why="YAML is UTF-8",
                         fix="save it as UTF-8") from None  # fmt: skip


def _index_lines(node: yaml.Node, path: tuple[str, ...], source: Source) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    if len(path) > MAX_DEPTH:  # an alias of itself has no end
        raise SottoError(
            "SOT101", what="the file is nested too deeply", where=f"{source.name}:{node.start_mark.line + 1}",
            why="a configuration has sections and keys, nothing deeper", fix="'sotto init' writes a valid example",
        )  # fmt: skip
    for key, value in node.value:
        here = (*path, str(key.value))
        if here in source.lines:
            raise SottoError(
                "SOT102",
                what=f"the key '{key.value}' stands twice",
                where=f"{source.name}:{key.start_mark.line + 1} (first on line {source.lines[here]})",
                why="only one of them could take effect",
                fix="remove one",
            )
        source.lines[here] = key.start_mark.line + 1
        _index_lines(value, here, source)


def override(values: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Applies `section.key=value` strings to nested dictionaries and returns a new one."""
    result = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for item in overrides:
        key, separator, raw = item.partition("=")
        section, _, name = key.strip().partition(".")
        if not separator or not name:
            raise SottoError(
                "SOT103",
                what=f"'--set {item}' is not of the form section.key=value",
                where="--set",
                why="an override names one key of one section",
                fix="for example --set run.learning_rate=1e-3",
            )
        try:
            value = yaml.load(raw, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
        except _UNREADABLE:
            value = raw
        target = result.setdefault(section, {})
        if not isinstance(target, dict):
            raise SottoError("SOT103", what=f"'{section}' is not a section", where=f"--set {item}",
                             why="its value in the file is not a mapping", fix="correct the file first")  # fmt: skip
        if section == "run" and name in ("steps", "epochs") and value is not None:
            target.pop("epochs" if name == "steps" else "steps", None)
        target[name] = value
    return result


def validate(cls: type[M], values: dict[str, Any], source: Source) -> M:
    """Builds the model, turning the first problem into a four-part error."""
    try:
        return cls.model_validate(_expand(values, source))
    except ValidationError as error:
        # Unknown keys first: they usually cause the "missing key" that stands beside them.
        problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise _explain(cls, problems[0], source, len({_path(problem) for problem in problems})) from None


def _expand(values: dict[str, Any], source: Source) -> dict[str, Any]:
    """Replaces ${VARIABLE} in strings, so that a recipe can name data without naming one machine's folders."""

    def complete(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {k: complete(v, (*path, str(k))) for k, v in value.items()}
        if isinstance(value, str) and "${" in value:
            expanded = os.path.expandvars(value)
            if "${" in expanded:
                raise SottoError(
                    "SOT104",
                    what=f"'{value}' names an environment variable that is not set",
                    where=source.at(path),
                    why="the path cannot be completed",
                    fix=f"export {expanded[expanded.index('${') + 2 : expanded.index('}')]}=... and run again",
                )
            return expanded
        return value

    return complete(values, ())


def _path(problem: Any) -> tuple[str, ...]:
    """The keys that lead to a problem, without pydantic's names for the branches of a union."""
    keys = [str(p) for p in problem["loc"] if not str(p).startswith(("function-", "constrained", "literal["))]
    # A union that is told apart by `kind` has the kind after its own key.
    return tuple(keys[:1] + keys[2:] if keys[:1] == ["setting"] and len(keys) > 1 else keys)


def _explain(cls: type[BaseModel], problem: Any, source: Source, count: int) -> SottoError:
    path = _path(problem)
    where, more = source.at(path), f" ({count - 1} more after this one)" if count > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = _fields(cls, path[:-1])
        elsewhere = [s for s in _fields(cls, ()) if path[-1] in _fields(cls, (s,))] if len(path) == 2 else []
        hint = did_you_mean(path[-1], known) or (f" It belongs in the section '{elsewhere[0]}'." if elsewhere else "")
        return SottoError(
            "SOT105", what=f"unknown key '{path[-1]}'.{hint}", where=where,
            why="a misspelt key that is ignored silently changes what you get" + more,
            fix="known keys here: " + ", ".join(known),
        )  # fmt: skip
    if problem["type"] == "missing":
        why = {
            "unit": "epsilon means nothing without saying who is protected",
            "epsilon": "the budget is a decision that only you can take",
            "num_units": "the sampling probability must come from a public number, not from the private data",
        }.get(path[-1], "it has no default")
        fix = {
            "unit": "write unit: <column that names the person>, or unit: record",
            "epsilon": "write epsilon: 4.0, for example",
            "num_units": "write num_units: <how many units the data has>; 'sotto init' counts them",
        }.get(path[-1], f"add '{path[-1]}:'")
        return SottoError("SOT106", what=f"{'.'.join(path)} is missing", where=where, why=why + more, fix=fix)
    message = str(problem["msg"]).removeprefix("Value error, ")
    value = problem.get("input")
    shown = f" (got {value!r})" if isinstance(value, str | int | float | bool) else ""
    return SottoError(
        "SOT107", what=f"{'.'.join(path) or 'configuration'}: {message}{shown}", where=where,
        why="the value is outside what this key allows" + more, fix="correct the value; 'sotto init' lists them all",
    )  # fmt: skip


def _fields(cls: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    if not path:
        return list(cls.model_fields)
    annotation = cls.model_fields[path[0]].annotation if path[0] in cls.model_fields else None
    sections = [s for s in (annotation, *get_args(annotation)) if isinstance(s, type) and issubclass(s, BaseModel)]
    return list(dict.fromkeys(field for section in sections for field in _fields(section, path[1:])))
