"""Flags from dataclasses: a field, its default, its help and its flag are one line."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from src.errors import UserError


def flag(default: Any, text: str, **argparse_options: Any) -> Any:
    """A dataclass field that is also a flag; `argparse_options` go to `add_argument`."""
    metadata = {"help": text, **argparse_options}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help).")


def parse_flags(
    types: Sequence[type], argv: Sequence[str] | None = None, presets: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[Any, ...]:
    """One instance of each dataclass. A flag beats `--config FILE.yaml`, the file beats `--preset NAME`.

    Raises:
        UserError: an unknown flag, key or preset, or a value that does not fit.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(types, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    if presets is None:
        return _parse(parser, argv)
    first = _Parser(dataclass_types=[], add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--config")
    chosen, _ = first.parse_known_args(argv)
    values = _read_yaml(chosen.config) if chosen.config else {}
    preset = chosen.preset or values.get("preset")
    if preset is not None and preset not in presets:
        raise UserError(f"There is no preset '{preset}': choose one of {', '.join(presets)}.")
    known = {f.name for kind in types for f in dataclasses.fields(kind)} - {"config"}
    if unknown := sorted(values.keys() - known):
        raise UserError(f"'{chosen.config}' sets {', '.join(unknown)}, which is no flag: see --help for the names.")
    return _parse(parser, _as_flags(presets.get(preset, {})) + _as_flags(values) + argv)


def _parse(parser: _Parser, argv: Sequence[str]) -> tuple[Any, ...]:
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        raise UserError(f"Unknown arguments: {' '.join(unknown)} (see --help).")
    return tuple(parsed)


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"Cannot read the settings in '{path}' ({reason}): give a YAML file.") from error
    if not isinstance(values, dict):
        raise UserError(f"'{path}' holds no settings: write one `name: value` a line, with the flags' names.")
    return values


def _as_flags(values: Mapping[str, Any]) -> list[str]:
    flags = []
    for name, value in values.items():
        if value is not None:
            flags += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return flags
