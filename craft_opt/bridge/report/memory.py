"""The largest memory of a stretch of work: of the process on a CPU, of the device on a GPU."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures the peak from its entry to its exit, GiB in ``gib``.

    On a GPU what torch allocated; on a CPU the resident memory of the process, which Linux lets begin anew. Where that
    is not possible, it is the peak since the process began.

    Args:
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self.gib = 0.0

    def __enter__(self) -> Self:
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):  # not Linux, or a sandbox without it
                _CLEAR.write_text("5")  # the high-water mark falls to what is resident now
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.gib = torch.cuda.max_memory_allocated() / 2**30 if self._device == "cuda" else _resident_peak()


def _resident_peak() -> float:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    unit = 2**30 if sys.platform == "darwin" else 2**20  # Linux counts in KiB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
