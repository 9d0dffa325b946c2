"""A command's configuration: from a recipe, YAML files and the command line, in this order."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

import jsonargparse
import yaml

from ..config import suggest
from .config import EITHER, TrainConfig, option

PRETRAIN = (
    "Pre-trains a model on recordings. A recipe gives published settings, a file given with --config replaces them, "
    "and the command line replaces both; --print-config shows the outcome. SIGTERM and SIGUSR1 save a checkpoint and "
    "end the run with status 0; --resume goes on. Start it under torchrun for several processes."
)

_UNIONS = (typing.Union, types.UnionType)

#: What is given takes these out of what recipe and files said before.
_REPLACES = {one: (other,) for pair in EITHER for one, other in (pair, pair[::-1])}
_REPLACES |= {
    "gain": ("upstream_roll_mag",),
    "roll": ("upstream_roll_mag",),
    "upstream_roll_mag": ("gain", "roll"),
    "balanced": ("repeat_classes",),
    "repeat_classes": ("balanced", "replacement", "epoch_clips"),
    "ema": ("average_from",),
    "average_from": ("ema",),
}


#: YAML in which 1e-3 is a number.
_load = jsonargparse.get_loader("yaml")


class _Repeated(argparse.Action):
    """An option that may come several times: a list of items, or fields that are merged into a dict."""

    def __init__(self, *args: Any, item: type = str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.item, self.values = item, {} if item is dict else []

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            value = _load(values) if self.item is dict else self.item(values)
            if field := (option_string or "").partition(".")[2]:  # --model-overrides.depth 3
                value = {field: value}
        except (ValueError, yaml.YAMLError):
            value = None
        if not isinstance(value, self.item):
            parser.error(f"{option_string} is {values!r}, but {_expected(self.item)} was expected")
        self.values = {**self.values, **value} if self.item is dict else [*self.values, value]
        setattr(namespace, self.dest, self.values)


class _Parser(jsonargparse.ArgumentParser):
    """Says what is wrong in one sentence: of the command line, or of the file that is `place`."""

    kind: type = TrainConfig
    place: str | None = None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sentence = self._sentence(message)
        print(f"{self.prog}: {f'{self.place}: ' if self.place else ''}{sentence}", file=sys.stderr)
        self.exit(2)

    def _sentence(self, message: str) -> str:
        """The library's messages describe Python types, over several lines."""
        found = re.search(r'Parser key "([\w.]+)":.*?(?:Got|Given) value: (.*)', message, flags=re.DOTALL)
        if found:
            name, value = found.groups()
            shown = name if self.place else option(name)
            type_ = _type_of(self.kind, name)
            near = (
                suggest(value, typing.get_args(type_)) if typing.get_origin(type_) is typing.Literal else ""
            )
            return f"{shown} is {value.strip()!r}, but {_expected(type_)} was expected{near}"
        if found := re.match(r"unrecognized arguments: (\S+)", message):
            name = found[1].split("=")[0]
            near = suggest(name, [*map(option, _names(self.kind)), "--config", "--print-config"])
            if not name.startswith("-"):
                return f"{name!r} belongs to no option"
            return f"there is no option {name}{near or f'; {self.prog} --help lists all'}"
        if found := re.match(r"(?:Group '(\w+)' does not accept o|O)ption '([\w.]+)'", message):
            name = ".".join(filter(None, found.groups()))
            return f"there is no setting {name!r}{suggest(name, _names(self.kind))}"
        return " ".join(message.split())


def parse(
    arguments: Sequence[str],
    kind: type = TrainConfig,
    command: str = "pretrain",
    description: str = PRETRAIN,
) -> Any:
    """The configuration, of the dataclass `kind`, that a command line describes.

    Of each setting the last level that says it counts, where the recipe is the first, files follow in their order, and
    the command line is the last. `model_overrides` and `augment` are merged field by field.

    Ends the program on --help and --print-config, and with status 2 on mistakes.
    """
    parser = _parser(kind, command, description=description)
    parser.add_argument(
        "--config", action=_Repeated, help="a YAML file of settings, as --print-config writes it"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print all settings as such a file, and do nothing else"
    )
    line = parser.parse_args(list(arguments), defaults=False).as_dict()
    files = [_read(path, _parser(kind, command, of_file=True)) for path in line.pop("config", [])]
    shows = line.pop("print_config", False)
    levels = [*files, line]
    name, task = (
        next((level[key] for level in levels[::-1] if level.get(key)), None) for key in ("recipe", "task")
    )
    try:
        settings: dict[str, Any] = {}
        for level in (kind.of_recipe(name, task), *levels):
            _merge(settings, level)
        config = kind.from_dict(settings)
        if not shows:
            config.check()
    except ValueError as error:
        parser.error(str(error))
    if shows:
        print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
        parser.exit(0)
    return config


def _parser(kind: type, command: str, of_file: bool = False, description: str = "") -> _Parser:
    """Of a command line, or of what a file holds."""
    # Options are not abbreviated: a new one must not make old command lines ambiguous.
    parser = _Parser(prog=f"audiomae {command}", description=description, allow_abbrev=False)
    parser.kind = kind
    help_of, hints = _descriptions(kind), typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        fresh = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        settings = {"default": fresh, "help": help_of[field.name]}
        type_ = hints[field.name]
        if not of_file and typing.get_origin(type_) in (list, dict):
            item = dict if typing.get_origin(type_) is dict else typing.get_args(type_)[0]
            settings |= {"action": _Repeated, "item": item}
        elif not of_file and type_ is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = type_
        parser.add_argument(option(field.name), **settings)
    return parser


def _read(path: str, parser: _Parser) -> dict[str, Any]:
    """The settings in a file."""
    try:
        with open(path, encoding="utf-8") as file:
            content = _load(file.read())
    except OSError as error:
        parser.error(f"--config {path} cannot be read: {error.strerror}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"--config {path} is no YAML file: {error}")
    parser.place = path
    if not isinstance(content, dict):
        parser.error("it should hold settings, a line each, such as steps: 1000")
    level = parser.parse_object(content, defaults=False).as_dict()
    if not isinstance(level.get("augment", {}), dict):
        parser.error(f"augment is {level['augment']!r}, but {_expected(dict)} was expected")
    return level


def _merge(settings: dict[str, Any], level: dict[str, Any]) -> None:
    """Another level's settings over those of the levels before."""
    for one, other in EITHER:
        if level.get(one) is not None and level.get(other) is not None:
            raise ValueError(f"{option(one)} and {option(other)} say the same in two ways: give one of them")
    for name, value in level.items():
        for other in _REPLACES.get(name, ()) if value is not None and value is not False else ():
            settings.pop(other, None)
    for name, value in level.items():
        value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        if isinstance(value, dict):
            settings[name] = dict(settings.get(name) or {})
            _merge(settings[name], value)
        else:
            settings[name] = value


def _names(kind: type) -> list[str]:
    """Of all settings, those of `augment` too."""
    names = []
    for field in dataclasses.fields(kind):
        names.append(field.name)
        if dataclasses.is_dataclass(part := _type_of(kind, field.name)):
            names += [f"{field.name}.{inner.name}" for inner in dataclasses.fields(part)]
    return names


def _type_of(kind: type, name: str) -> Any:
    """Of a setting, `augment.gain` for one; without the None that stands for "not given"."""
    for part in name.split("."):
        kind = typing.get_type_hints(kind)[part]
        if typing.get_origin(kind) in _UNIONS:
            parts = [part for part in typing.get_args(kind) if part is not types.NoneType]
            kind = typing.Union[tuple(parts)]  # noqa: UP007 (of one, that one)
    return kind


def _expected(type_: Any) -> str:
    """In words."""
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if origin in _UNIONS:
        return " or ".join(map(_expected, arguments))
    if origin is typing.Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a list such as {list(range(1, len(arguments) + 1))}"
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return plain.get(type_) or ("a list" if origin is list else "a mapping such as {name: value}")


def _descriptions(kind: type) -> dict[str, str]:
    """What the docstrings of a configuration and of those it extends say of each field."""
    found = {}
    for part in reversed([c for c in kind.__mro__ if dataclasses.is_dataclass(c)]):
        text = inspect.getdoc(part).split("Attributes:\n")[1]
        found |= dict(re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w|\Z)", text, flags=re.MULTILINE | re.DOTALL))
    return {name: " ".join(description.split()).replace("%", "%%") for name, description in found.items()}
