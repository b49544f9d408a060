"""What every kind of fault needs: the library, the server, a small world, and how an outcome is judged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
WARM = "tests.faults.programs:build_world"
TRAIN, ANCHORS = "tests.faults.programs:train", "tests.faults.programs:anchors"
# A program that hangs is a failure, and these take seconds.
LIMIT_SECONDS = 180


def compile_library(folder: Path) -> Path:
    """The preloaded library, compiled with the machine's C compiler.

    Raises:
        FileNotFoundError: There is none.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("the fault campaign preloads a small C library, and this machine has no C compiler")
    library = folder / "interpose.so"
    source = Path(__file__).with_name("interpose.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    Attributes:
        code: Exit code, negative for a signal, None where it hung and was killed.
        out: What it printed.
        err: What it printed as errors.
    """

    code: int | None
    out: str
    err: str

    @property
    def crashed(self) -> bool:
        return "Traceback (most recent call last)" in self.err

    @property
    def message(self) -> str:
        """The line that a user reads last."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return lines[-1] if lines else ""


@dataclass
class Program:
    """A program that was started."""

    lab: Lab
    pid: int
    folder: Path

    def kill(self, number: signal.Signals, *, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.pid, number)

    def out(self) -> str:
        file = self.folder / "stdout"
        return file.read_text(errors="replace") if file.is_file() else ""

    def poll(self, seconds: float = 0.0) -> int | None:
        return self.lab.ask({"do": "wait", "pid": self.pid, "seconds": seconds})["code"]

    def wait(self) -> Ended:
        code = self.poll(LIMIT_SECONDS)
        if code is None:
            self.kill(signal.SIGKILL, group=True)
            self.poll(LIMIT_SECONDS)
        return Ended(code, self.out(), (self.folder / "stderr").read_text(errors="replace"))


class Lab:
    """Starts programs through the server, which makes the world first.

    Args:
        folder: Of the library and of the programs' output; the world goes beside it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.started = 0
        environment = os.environ | {
            "LD_PRELOAD": str(compile_library(folder)),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server", WARM, str(folder.parent / "world")],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert json.loads(self.server.stdout.readline())["ready"]

    def ask(self, command: dict) -> dict:
        self.server.stdin.write(json.dumps(command) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, target: str, arguments: Sequence[str], fault: dict | None = None, **env: str) -> Program:
        self.started += 1
        folder = self.folder / "programs" / f"{self.started:04d}"
        folder.mkdir(parents=True)
        job = {"do": "start", "target": target, "arguments": [str(a) for a in arguments], "env": env}
        job |= {name: str(folder / name) for name in ("stdout", "stderr")}
        if fault is not None:
            job["fault"] = {key: str(value) if isinstance(value, Path) else value for key, value in fault.items()}
        return Program(self, self.ask(job)["pid"], folder)

    def run(self, target: str, arguments: Sequence[str], fault: dict | None = None, **env: str) -> Ended:
        return self.start(target, arguments, fault, **env).wait()

    def close(self) -> None:
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait(60)
