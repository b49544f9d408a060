"""Seals: checksums of every file of a folder, written when it was whole and compared before anything in it is used.

LeRobot's files carry none: a flipped bit in weights, moments or a dataset loads without a word and trains on. A folder
without a seal (of another program, or of before there were any) is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from craft_opt.bridge.anchor_manifest import sha256_of_file, sync_folder, write_atomically
from craft_opt.bridge.untrusted import read_json

SEAL_FILE = "checksums.json"
_FORMAT = "craft-checksums-1"
# Of a dataset without a seal only so much is read to tell whether it is the one of before: a second or two.
_READ_BYTES = 2**30


def seal(folder: Path, **notes: Any) -> None:
    """Write the checksums of all files below a folder, and make all of it durable.

    Args:
        folder: A whole folder, before it is renamed to its name.
        **notes: What else belongs to it, as JSON has it.
    """
    files = _files(folder)
    for file in files:
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
    content = {"format": _FORMAT, "files": _checksums(folder, files), **notes}
    write_atomically(folder / SEAL_FILE, json.dumps({**content, "seal": _digest(content)}, indent=1) + "\n")
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync_folder(path)


def check_seal(folder: Path, remedy: str, part: str = "", suffix: str = "") -> dict[str, Any]:
    """Compare a folder with its seal.

    Args:
        folder: The folder.
        remedy: What to do about a damaged one.
        part: Name of a folder below it, where only that is used.
        suffix: Of the files that matter, where others are checked later.

    Returns:
        The notes of the seal; empty without one.

    Raises:
        ValueError: A file is missing, was changed, or the seal itself was.
    """
    file = folder / SEAL_FILE
    if not file.is_file():
        return {}
    own = f"{remedy}; if you changed it on purpose, delete {file}"
    try:
        content = read_json(file, own)
        stated = content.pop("seal")
        names = [name for name in content["files"] if name.startswith(part) and name.endswith(suffix)]
        intact = content["format"] == _FORMAT and stated == _digest(content)
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
            raise ValueError("it names a file outside of the folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}); {own}") from error
    if not intact:
        raise ValueError(f"{file} is damaged: its own checksum differs; {own}")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder / missing[0]} is missing, which {file} names; {own}")
    found = _checksums(folder, [folder / name for name in names])
    if changed := [name for name in names if found[name] != content["files"][name]]:
        raise ValueError(
            f"{folder / changed[0]} is damaged: its checksum differs from the one it was written with; {own}"
        )
    return {name: value for name, value in content.items() if name not in ("format", "files")}


def prefix_note(file: Path) -> dict[str, Any]:
    """What tells later whether a file that only grows still begins as it does now."""
    if not file.is_file():
        return {}
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256_of_file(file)}


def check_prefix(note: Mapping[str, Any], file: Path) -> None:
    """Check that a file begins as it did when the note was taken; one that is not there is none of its business.

    Raises:
        ValueError: It does not.
    """
    if not note or not file.is_file():
        return
    # As much as the file has at most: the note may come from anywhere, and so much memory is asked for.
    with file.open("rb") as stream:
        begins = stream.read(min(int(note["bytes"]), file.stat().st_size))
    if hashlib.sha256(begins).hexdigest() != note["sha256"]:
        raise ValueError(
            f"{file} is damaged, or of another run: its first {note['bytes']} bytes are not those that the checkpoint "
            f"was written with; restore it, or move it away to go on without its history"
        )


def dataset_digest(root: Path) -> str:
    """What tells a dataset from another state of itself: names and sizes of its files, and up to a GiB of content.

    The content of the metadata and tables counts, smallest first; of videos only the sizes.
    """
    files = _files(root)
    sizes = {file: file.stat().st_size for file in files}
    read, left = [], _READ_BYTES
    for file in sorted((f for f in files if f.suffix in (".json", ".jsonl", ".parquet")), key=sizes.__getitem__):
        left -= sizes[file]
        if left < 0:
            break
        read.append(file)
    content = _checksums(root, read)
    names = {file: str(file.relative_to(root)) for file in files}
    return _digest([(names[file], sizes[file], content.get(names[file])) for file in files])


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL_FILE)


def _checksums(folder: Path, files: list[Path]) -> dict[str, str]:
    names = [str(file.relative_to(folder)) for file in files]
    with ThreadPoolExecutor(4, "checksums") as pool:  # hashing lets go of the interpreter's lock
        return dict(zip(names, pool.map(sha256_of_file, files), strict=True))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
