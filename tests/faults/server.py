"""Starts every program under test in a process of its own, forked from one that has imported LeRobot already.

``python -m tests.faults.server MODULE:FUNCTION FOLDER`` calls the function, which imports what there is to import and
makes the world, then reads one JSON command a line and answers with one. A child is the real program: its
own process group, its own output files, killed for real. Only its imports are shared, ten seconds each time.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback

MODES = {"record": 1, "signal": 2, "power": 3, "fail": 4}


def arm(fault: dict) -> None:
    """Hand a plan to the preloaded library."""
    library = ctypes.CDLL(None)
    library.faults_arm(
        os.fsencode(fault["root"]),
        MODES[fault["mode"]],
        ctypes.c_long(fault.get("at", 0)),
        int(fault.get("value", signal.SIGKILL)),
        int(fault.get("half", False)),
        int(fault.get("lasting", False)),
        os.fsencode(fault.get("log", "")),
    )


def child(job: dict) -> int:
    """Run the function under test with its output in files; its exit code."""
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    # As in a program that was started by itself.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= job.get("env", {})
    module, _, function = job["target"].partition(":")
    target = getattr(importlib.import_module(module), function)
    if "fault" in job:
        arm(job["fault"])
    try:
        found = target(job["arguments"])
    except SystemExit as stopped:
        found = stopped.code
    return found if isinstance(found, int) else 0


def start(job: dict) -> dict:
    pid = os.fork()
    if pid:
        return {"pid": pid}
    try:
        code = child(job)
    except BaseException:  # as the interpreter does at the top of a program
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def wait(pid: int, seconds: float) -> dict:
    """The exit code of a child, negative for a signal; None where it still runs."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return {"code": os.waitstatus_to_exitcode(status)}
        if time.monotonic() > until:
            return {"code": None}
        time.sleep(0.01)


def main(warm: str, folder: str) -> None:
    commands, answers = sys.stdin, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    module, _, function = warm.partition(":")
    getattr(importlib.import_module(module), function)([folder])
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in commands:
        command = json.loads(line)
        answer = start(command) if command["do"] == "start" else wait(command["pid"], command["seconds"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
