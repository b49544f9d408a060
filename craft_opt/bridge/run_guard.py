"""What keeps a run's folder its own, and how a run ends that is told to.

Imports nothing heavy: commands use it before LeRobot is loaded.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143
_held: set[int] = set()


class TerminatedError(KeyboardInterrupt):
    """SIGTERM came: everything that Ctrl-C ends in order ends the same way."""


@contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Hold a lock that the kernel lets go of when the process dies, however it dies: none is ever stale.

    Args:
        file: The lock's file; its folder exists. Removed afterwards.
        what: What only one process may do, for the error.

    Raises:
        BlockingIOError: Another process holds it.
    """
    descriptor = _take(file, what)
    if descriptor is not None:
        _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor is not None:
            _held.discard(descriptor)
            file.unlink(missing_ok=True)  # before the lock is let go, so that it cannot be another's file
            os.close(descriptor)


def _take(file: Path, what: str) -> int | None:
    if fcntl is None:
        return None
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise BlockingIOError(
                f"{what} is in use by another process (number {holder}, by {file}): wait for its end or stop it, or "
                f"choose another folder"
            ) from error
        except OSError as error:
            os.close(descriptor)
            logger.warning("%s cannot be locked (%s): start no second process on %s", file, error, what)
            return None
        # The holder before may have removed the file between the two calls; this lock would then keep nobody out.
        try:
            current = os.path.samestat(os.fstat(descriptor), os.stat(file))
        except FileNotFoundError:
            current = False
        if current:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return descriptor
        os.close(descriptor)


def _leave_to_parent() -> None:
    """A forked worker shares the open file: it would keep the lock of a run that was killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raise :class:`TerminatedError` where SIGTERM (a scheduler's, ``kill``'s) would end the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """130 after Ctrl-C, 143 after SIGTERM, as shells count signals."""
    return EXIT_TERMINATED if isinstance(interrupt, TerminatedError) else EXIT_INTERRUPTED


def describe(interrupt: KeyboardInterrupt) -> str:
    """One word or two for the last line of the log."""
    return "terminated (SIGTERM)" if isinstance(interrupt, TerminatedError) else "interrupted"


@contextmanager
def written_to(folder: Path) -> Iterator[None]:
    """Name the folder in errors of the disk that name no file: those of a write, and of safetensors.

    Raises:
        OSError: Of the same number, with the folder's name.
        ChildProcessError: A data worker died.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ChildProcessError(f"a data worker died while {folder} was written ({error})") from error
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, f"{os.strerror(number)} ({error})", str(folder)) from error
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from error


def remedy(error: Exception) -> str:
    """What to do about an error of the disk, empty for others."""
    if isinstance(error, ChildProcessError):
        return "see whether the memory ran out, or take fewer data workers"
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "make room on that disk"
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "make that place writable, or choose another folder"
    if number == errno.EIO:
        return "check that disk"
    return ""


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, None without one."""
    folder = output_dir / "checkpoints"
    if not folder.is_dir():
        return None
    whole = [path for path in folder.iterdir() if path.name.isdigit() and path.is_dir()]
    return max(whole, key=lambda path: int(path.name), default=None)


def how_to_go_on(output_dir: Path) -> str:
    """What to do about a run that ended before its last step."""
    last = newest_checkpoint(output_dir)
    if last is not None:
        config = last / "pretrained_model" / "train_config.json"
        return f"go on after step {int(last.name)} with: python train.py --resume=true --config_path={config}"
    if (output_dir / "metrics.jsonl").is_file() or (output_dir / LOCK_FILE).is_file():
        return f"no checkpoint was written yet: delete {output_dir} and give the same command again"
    if not output_dir.is_dir():
        return "nothing was written yet: give the same command again"
    if not any(output_dir.iterdir()):
        return f"nothing was written yet: delete {output_dir} and give the same command again"
    return "no checkpoint lies there"


def _terminate(number: int, frame: FrameType | None) -> None:
    raise TerminatedError
