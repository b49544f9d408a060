"""What every results file says of itself: date, commit, machine and versions. No host names, no addresses."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "numba", "lerobot", "transformers", "metaworld", "mujoco")


def machine(packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """Name the machine: kind, processor, accelerator, versions of packages (None for one that is not there)."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    kind = "cloud VM" if " hypervisor" in flags else "machine"
    cores = usable_cores()
    about: dict[str, Any] = {
        "machine": f"{cores}-core {platform.machine().replace('_', '-')} {kind}",
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "scheduling": _scheduling(),
        "python": platform.python_version(),
    }
    for package in packages:
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            about[package] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        about["gpu"] = properties.name
        about["gpu_memory_gib"] = round(properties.total_memory / 2**30)
        about["cuda"] = torch.version.cuda
    return about


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str:
    """The commit, with ``+`` where files of the project's code differ from it; ``unknown`` outside its repository."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # another project's repository may lie around ours
        top = git("rev-parse", "--show-cdup")
        code = [f"{top}{name}" for name in ("craft_opt", "kernels", "benchmarks")]
        changed = git("status", "--porcelain", "--", *code)
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance() -> dict[str, Any]:
    """Date, commit and machine."""
    return {"date": datetime.date.today().isoformat(), "commit": commit(), "machine": machine()}


def _cpu_model() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown"
    found = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return found.group(1).strip() if found else "unknown"


def _scheduling() -> str:
    """How this process competes for the cores: a real-time class keeps a busy machine's other processes out of it."""
    if not hasattr(os, "sched_getscheduler"):
        return "unknown"
    names = {getattr(os, n): n for n in ("SCHED_OTHER", "SCHED_BATCH", "SCHED_IDLE", "SCHED_FIFO", "SCHED_RR")}
    return names.get(os.sched_getscheduler(0), "unknown")
