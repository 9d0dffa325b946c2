"""A command's configuration: from a recipe, a YAML file and the command line, in this order."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import typing
from collections.abc import Sequence
from typing import Any

import jsonargparse
import yaml

from .config import EITHER, TrainConfig, option

PRETRAIN = (
    "Pre-trains a model on recordings. A recipe gives published settings, a file given with --config replaces them, "
    "and the command line replaces both; --print-config shows the outcome. SIGTERM and SIGUSR1 save a checkpoint and "
    "end the run with status 0; --resume goes on. Start it under torchrun for several processes."
)


class _Repeated(argparse.Action):
    """An option that may come several times; what the command line says replaces the configuration file's list."""

    def __init__(self, *args: Any, item: type, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.item, self.values = item, []

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            self.values.append(self.item(values))
        except ValueError:
            parser.error(f"{option_string} takes a {self.item.__name__}, got {values!r}")
        setattr(namespace, self.dest, list(self.values))


def parse(
    arguments: Sequence[str],
    kind: type = TrainConfig,
    command: str = "pretrain",
    description: str = PRETRAIN,
) -> Any:
    """The configuration, of the dataclass `kind`, that a command line describes.

    Ends the program on --help, --print-config and mistakes.

    Raises:
        ValueError: an unknown recipe.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--recipe")
    first.add_argument("--task")
    first.add_argument("--config", action="append", default=[])
    known, _ = first.parse_known_args(list(arguments))
    given = {a.split("=")[0][2:].replace("-", "_") for a in arguments if a.startswith("--")}
    name, task = known.recipe, known.task
    for path in known.config:
        try:
            with open(path) as file:
                content = yaml.safe_load(file)
        except (OSError, yaml.YAMLError):
            continue  # jsonargparse will say what is wrong with it
        if isinstance(content, dict):
            given |= {key for key, value in content.items() if value is not None}
            name, task = name or content.get("recipe"), task or content.get("task")

    defaults = kind.of_recipe(name, task)
    for one, other in (*EITHER, *(pair[::-1] for pair in EITHER)):
        if one in given and other not in given:
            defaults.pop(other, None)

    # Options are not abbreviated: a new one must not make old command lines ambiguous.
    parser = jsonargparse.ArgumentParser(
        prog=f"audiomae {command}", description=description, print_config="--print-config", allow_abbrev=False
    )
    parser.add_argument(
        "--config", action="config", help="a YAML file of settings, as --print-config writes it"
    )
    _add_fields(parser, kind, defaults)
    values = parser.instantiate(parser.parse_args(list(arguments))).as_dict()
    values.pop("config", None)
    return kind.from_dict(values)


def _add_fields(parser: Any, kind: type, defaults: dict[str, Any]) -> None:
    help_of, types = _descriptions(kind), typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        fresh = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        settings = {"default": defaults.get(field.name, fresh), "help": help_of[field.name]}
        type_ = types[field.name]
        if typing.get_origin(type_) is list:
            settings |= {"action": _Repeated, "item": typing.get_args(type_)[0]}
        elif type_ is bool:
            settings["action"] = "store_true"
        elif field.name == "recipe":
            settings["type"] = typing.Literal[tuple(kind.recipes)] | None
        else:
            settings["type"] = type_
        parser.add_argument(option(field.name), **settings)


def _descriptions(kind: type) -> dict[str, str]:
    """What the docstrings of a configuration and of those it extends say of each field."""
    found = {}
    for part in reversed([c for c in kind.__mro__ if dataclasses.is_dataclass(c)]):
        text = inspect.getdoc(part).split("Attributes:\n")[1]
        found |= dict(re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w|\Z)", text, flags=re.MULTILINE | re.DOTALL))
    return {name: " ".join(description.split()).replace("%", "%%") for name, description in found.items()}
