"""Reading files that somebody else may have written: nothing of them is believed, followed or made room for unchecked.

JSON is bounded in size and depth and means one thing only (no key twice, no NaN), fields have the types that their
dataclass says, names stay inside their folder, and a safetensors header is no longer than its file.
"""

from __future__ import annotations

import json
import math
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

# Python makes up to twenty times as much of JSON: a few hundred MiB of this.
MAX_JSON_BYTES = 2**24
# safetensors itself takes headers of 100 MB; ours have a dozen tensors.
MAX_HEADER_BYTES = 2**20
_MAX_NAME_BYTES = 255
_SHOWN, _BRIEF = 60, 1500

T = TypeVar("T")


def read_json(file: Path, remedy: str) -> Any:
    """Read a JSON file that has one meaning.

    Args:
        file: The file.
        remedy: What to do about a bad one.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It is no JSON, larger than 16 MiB, nested too deeply, names a key twice or holds NaN or infinity.
    """
    with file.open("rb") as stream:
        content = stream.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"{file} is larger than {MAX_JSON_BYTES // 2**20} MiB, which no such file is; {remedy}")
    try:
        found = json.loads(
            content.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite
        )
        json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except RecursionError as error:
        raise ValueError(f"{file} is damaged (nested too deeply); {remedy}") from error
    except ValueError as error:  # also what json and the decoder raise
        raise ValueError(f"{file} is damaged ({brief(error)}); {remedy}") from error
    return found


def typed(value: Any, hint: Any, name: str) -> Any:
    """What JSON holds as what a type hint says: dataclasses are made, everything else is compared.

    A bool is no number, 1.0 no whole number, and a dataclass has exactly its fields; one with a default may be absent.

    Args:
        value: What was read.
        hint: ``str``, ``int``, ``float``, a dataclass, ``list[X]``, ``dict[str, X]`` or ``X | None``.
        name: What it is, for the error.

    Raises:
        ValueError: It is something else.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else typed(value, next(arg for arg in inner if arg is not type(None)), name)
    if origin is list and type(value) is list:
        return [typed(item, inner[0], f"{name}[{k}]") for k, item in enumerate(value)]
    if origin is dict and type(value) is dict:
        return {key: typed(item, inner[1], f"{name}[{shown(key)}]") for key, item in value.items()}
    if is_dataclass(hint) and isinstance(hint, type) and type(value) is dict:
        hints = typing.get_type_hints(hint)
        needed = {field.name for field in fields(hint) if field.default is MISSING}
        if odd := sorted(needed - value.keys() | value.keys() - hints.keys()):
            raise ValueError(f"{name} has {'no' if odd[0] in needed else 'an unknown'} field {shown(odd[0])}")
        return hint(**{key: typed(value[key], hints[key], key) for key in hints if key in value})
    if origin is None and type(value) is hint:
        return value
    wanted = {int: "no whole number", float: "no real number", str: "no text"}.get(hint, "not of its form")
    raise ValueError(f"{name} is {shown(value)}, which is {wanted}")


def is_plain_name(name: str) -> bool:
    """Whether a name is that of a file in a folder: no path, nothing above it, and short enough to be one."""
    if name in ("", ".", "..") or set(name) & set("/\\\0"):
        return False
    return Path(name).name == name and len(name.encode(errors="replace")) <= _MAX_NAME_BYTES


def check_inside(folder: Path, file: Path, remedy: str) -> None:
    """Refuse a file that is a link to somewhere else.

    Raises:
        ValueError: It lies outside its folder.
    """
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{file} is a link to {file.resolve()}, outside of its folder; {remedy}")


def check_header(file: Path, remedy: str) -> None:
    """Check the length of a safetensors file's header before anything is read by it.

    Raises:
        ValueError: The file is no safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(
            f"{file} is damaged and is no safetensors file (a header of {length} bytes in {size}); {remedy}"
        )


def shown(value: Any) -> str:
    """A value for an error or a terminal: short, and without what would steer the terminal."""
    text = ascii(value) if isinstance(value, bytes) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def brief(value: object) -> str:
    """What a library or a file says, cut: some repeat all of what they refuse."""
    text = printable(str(value))
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]}…"


def printable(text: str) -> str:
    """Text with everything escaped that would steer a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:_SHOWN]} is no finite number")
