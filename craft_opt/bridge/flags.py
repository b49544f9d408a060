"""Names of the flags that LeRobot's parser would take, so that an unknown one is refused with the closest known."""

from __future__ import annotations

import types
import typing
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import draccus
from draccus.utils import DecodingError
from lerobot.configs.parser import PATH_KEY, PLUGIN_DISCOVERY_SUFFIX, PluginLoadError

from craft_opt.bridge.cli import UsageError, unknown_flag
from craft_opt.bridge.config import CraftTrainConfig
from craft_opt.bridge.policies import policy_type_at

PARSER_ERRORS: tuple[type[Exception], ...] = (DecodingError, ArgumentError, PluginLoadError, draccus.utils.ParsingError)


def check_names(flags: Mapping[str, str]) -> None:
    """Refuse a flag that the configuration has no field for.

    Raises:
        UsageError: There is one; the closest known name is in the message.
    """
    if any(PLUGIN_DISCOVERY_SUFFIX in name for name in flags):
        return  # a plugin brings types of its own, which only LeRobot's parser can load
    known = {"config_path", *_names(CraftTrainConfig, "", flags)}
    known |= {f"{name}.{PATH_KEY}" for name in CraftTrainConfig.__get_path_fields__()}
    for flag in flags:
        if flag not in known:
            raise unknown_flag(flag, known)


def _names(config_class: type, prefix: str, flags: Mapping[str, str]) -> Iterator[str]:
    hints = typing.get_type_hints(config_class)
    for field in fields(config_class):
        name = f"{prefix}{field.name}"
        kind = _inner(hints[field.name])
        if isinstance(kind, type) and issubclass(kind, draccus.ChoiceRegistry):
            yield f"{name}.{draccus.CHOICE_TYPE_KEY}"
            for choice in _choices(kind, name, flags):
                yield from _names(choice, f"{name}.", flags)
        elif isinstance(kind, type) and is_dataclass(kind):
            yield from _names(kind, f"{name}.", flags)
        elif field.init:
            yield name


def _inner(hint: Any) -> Any:
    """``X`` of ``X | None``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        return members[0] if len(members) == 1 else hint
    return hint


def _choices(registry: type[draccus.ChoiceRegistry], name: str, flags: Mapping[str, str]) -> list[type]:
    """The class that the flags choose, or every registered one where they leave that to a file or the hub."""
    chosen = flags.get(f"{name}.{draccus.CHOICE_TYPE_KEY}")
    if chosen is None and f"{name}.{PATH_KEY}" in flags:
        chosen = policy_type_at(flags[f"{name}.{PATH_KEY}"])
    known = registry.get_known_choices()
    if chosen is None:
        return list(known.values())
    if chosen not in known:
        raise UsageError(
            f"--{name}.{draccus.CHOICE_TYPE_KEY} must be one of {', '.join(sorted(known))}, got {chosen!r}"
        )
    return [known[chosen]]
