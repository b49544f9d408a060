"""What became of a fault: the classes, and a user who does what an error says and nothing else."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.lab import TRAIN, Ended, Lab

CLEAR = "clear error"
CONTINUED = "correct continuation"
MENDED = "refused, then mended by the named command"
SILENT = "SILENT WRONG"
UNCLEAR = "unclear"
OUTCOMES = (CLEAR, CONTINUED, MENDED, SILENT, UNCLEAR)
EXIT_REFUSED = 2

RESUME = re.compile(r"python train\.py --resume=true --config_path=(\S+?)[;,.]?(?=\s|$)")
DELETE = re.compile(r"delete (/\S+?)[;,:]?(?=\s|$)")
BUILD = re.compile(r"craft-anchors build .*--output=(\S+?)[;,]?(?=\s|$)")
ANOTHER = re.compile(r"another (?:checkpoint|whole checkpoint)")
COPY = re.compile(r"restore|from a copy|or a copy|put the dataset back|take a complete checkpoint")
AWAY = re.compile(r"move it away")
AGAIN = re.compile(r"same (?:craft-anchors build )?command|build it again|give the same command")


@dataclass(frozen=True)
class Outcome:
    """A fault and what became of it.

    Attributes:
        kind: Kind of fault, for the table.
        name: The very fault.
        outcome: One of ``OUTCOMES``.
        detail: The last line of the error, or what is wrong.
    """

    kind: str
    name: str
    outcome: str
    detail: str = ""


@dataclass(frozen=True)
class Job:
    """A program, what it makes, and where it makes it.

    Attributes:
        target: Function under test.
        arguments: Its arguments.
        made: The folder that it makes; deleted where an error says so, and never otherwise.
        result: What it made, comparable; called once the program ended with 0.
        expected: The same of an uninterrupted run.
        pristine: Copies of what a fault may damage: folder → its copy.
        root: Folder of the case; nothing outside it is touched.
        rebuild: The program that builds the job's anchor cache: what errors give with placeholders.
    """

    target: str
    arguments: tuple[str, ...]
    made: Path
    result: Callable[[], dict[str, str]]
    expected: dict[str, str]
    root: Path
    pristine: dict[Path, Path]
    rebuild: tuple[str, tuple[str, ...]] | None = None


def is_clear(ended: Ended, root: Path) -> bool:
    """Whether a refusal names a place and says what to do, without a traceback."""
    names = str(root.parent) in ended.message or "--" in ended.message
    tells = any(p.search(ended.message) for p in (RESUME, DELETE, ANOTHER, COPY, AWAY, AGAIN)) or re.search(
        r"choose another|pass |wait for its end|set --|resume with|build it with|start a fresh run|point it at|"
        r"give the folder|make room",
        ended.message,
    )
    return ended.code == EXIT_REFUSED and not ended.crashed and names and bool(tells)


def differences(job: Job) -> list[str]:
    """Names of what differs from the uninterrupted run."""
    found = job.result()
    return sorted(name for name in found.keys() | job.expected.keys() if found.get(name) != job.expected.get(name))


def follow(lab: Lab, job: Job, ended: Ended | None) -> tuple[str, str]:
    """Give the command again, and do what errors say, until the work is done: (outcome, detail).

    Args:
        lab: Starts the programs.
        job: The work.
        ended: The refusal to start from; None gives the command first.
    """
    target, arguments = job.target, list(job.arguments)
    ignored: set[str] = set()
    for refusals in range(6):
        if ended is None:
            ended = lab.run(target, arguments)
        if ended.code == 0:
            wrong = [name for name in differences(job) if name not in ignored]
            if wrong:
                return SILENT, f"exit code 0, and other than the uninterrupted run: {', '.join(wrong[:4])}"
            return (MENDED if refusals else CONTINUED), ""
        if ended.code is None or not is_clear(ended, job.root):
            tail = " / ".join(ended.err.splitlines()[-2:])[-500:]
            return UNCLEAR, f"exit code {ended.code}: {tail}"
        message, ended = ended.message, None
        if found := RESUME.search(message):
            target, arguments = TRAIN, ["--resume=true", f"--config_path={found[1]}"]
        elif "nothing is left to do" in message:
            wrong = differences(job)
            return (SILENT, f"said to be done, and other: {wrong[:4]}") if wrong else (CONTINUED, "")
        elif BUILD.search(message) and job.rebuild is not None:
            shutil.rmtree(BUILD.search(message)[1], ignore_errors=True)
            built = lab.run(*job.rebuild)
            if built.code != 0:
                return UNCLEAR, f"the named build: exit code {built.code}: {built.message[-300:]}"
        elif ANOTHER.search(message) and (other := _other_checkpoint(job, message)):
            target, arguments = TRAIN, ["--resume=true", f"--config_path={other}"]
        elif COPY.search(message) and (place := _restored(job, message)):
            shutil.rmtree(place)
            shutil.copytree(job.pristine[place], place, symlinks=True)
        elif AWAY.search(message):
            ignored.add("metrics.jsonl")
            (job.made / "metrics.jsonl").unlink()
        elif (found := DELETE.search(message)) and Path(found[1]).is_relative_to(job.root):
            gone = Path(found[1])
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        elif (found := re.search(r"(/\S+): delete it|(/\S+) is damaged; delete it", message)) is not None:
            gone = Path(found[1] or found[2])
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        elif AGAIN.search(message):
            pass
        else:
            return UNCLEAR, f"no remedy that can be followed: {message[-400:]}"
    return UNCLEAR, f"refused again and again: {message[-400:]}"


def _other_checkpoint(job: Job, message: str) -> Path | None:
    """Another checkpoint of the run than the one that the message names, the newest."""
    folder = job.made / "checkpoints"
    named = re.search(r"checkpoints/(\d+|last)", message)
    refused = (folder / named[1]).resolve().name if named else ""
    others = sorted(path for path in folder.glob("[0-9]*") if path.name.isdigit() and path.name != refused)
    return others[-1] / "pretrained_model" / "train_config.json" if others else None


def _restored(job: Job, message: str) -> Path | None:
    """The folder with a copy that the message names a file of."""
    inside = [place for place in job.pristine if str(place) in message]
    return max(inside, key=lambda place: len(str(place)), default=None)
