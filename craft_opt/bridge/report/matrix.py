"""All cells of a benchmark: side by side on cores or one after another, with one display and an estimate."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from craft_opt.bridge import shorten_codec_warning
from craft_opt.bridge.anchor_manifest import write_atomically
from craft_opt.bridge.quickstart.simulation import end_with_parent
from craft_opt.bridge.report.cell import PROGRESS_FILE, RESULT_FILE, Cell, prepare_seed, run_cell
from craft_opt.bridge.report.methods import method_named
from craft_opt.bridge.report.provenance import usable_cores
from craft_opt.bridge.report.workers import Workers

MATRIX_FILE = "matrix.json"
CELLS_OF_A_WORKER = 8  # a worker that lives long keeps what its environments leave behind
_POLL_SECONDS = 1.0
_LOG_SECONDS = 60.0  # between two states of the bar in a file, which keeps them all
# A fresh seed's demonstrations, teacher and measurement take as long as about two cells.
_WEIGHT_OF_PREPARATION = 2.0
Result = dict[str, Any]


class CellsFailedError(RuntimeError):
    """Some cells raised; the others are done."""


def cells_of(
    suite: str,
    methods: Sequence[str],
    budgets: Sequence[int],
    seeds: Sequence[int],
    *,
    settings: Callable[[str, int], Mapping[str, Any]] = lambda method, budget: {},
    sizes: Mapping[str, Any] | None = None,
    curve: int = 1,
) -> list[Cell]:
    """The matrix: every method with every budget and seed; a method without anchors once, with budget 0.

    Args:
        suite: Name of the suite.
        methods: Names of the methods.
        budgets: Anchors of each old skill.
        seeds: Seeds.
        settings: Method and budget → the method's settings.
        sizes: Sizes of the run that depart from the benchmark's.
        curve: Measurements within a stage.
    """
    return [
        Cell(suite, name, budget, seed, dict(settings(name, budget)), dict(sizes or {}), curve)
        for seed in seeds
        for name in methods
        for budget in (budgets if method_named(name).uses_anchors else [0])
    ]


def run_matrix(output: Path, cells: Sequence[Cell], jobs: int, *, show: bool = True) -> list[Result]:
    """Run all cells; finished ones are taken as they are.

    Args:
        output: Folder of the benchmark.
        cells: The cells.
        jobs: Processes side by side; 0 runs them in this one.
        show: Whether to show the progress.

    Returns:
        Their results, in the order of ``cells``.

    Raises:
        CellsFailedError: Some raised; the rest is done and kept, and the message has where their logs are.
    """
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        if not _is_finished(output, cell):
            groups.setdefault((cell.suite, cell.seed), []).append(cell)
    display = _Display(output, cells, groups, show=show)
    failed: list[str] = []
    with _executor(jobs) as pool, display:
        waiting: dict[Future[Any], tuple[str, Path, list[Cell]]] = {}
        for (suite, seed), members in groups.items():
            folder = preparation_folder(output, suite, seed)
            future = pool.submit(_prepare, output, folder, members)
            waiting[future] = (f"{suite} seed {seed}: data, teacher, anchors", folder, members)
        while waiting:
            done, _ = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            pool.hand_out()
            for future in done:
                label, folder, members = waiting.pop(future)
                if (error := future.exception()) is not None:
                    failed.append(f"{label}: {error} (log: {folder / 'log.txt'})")
                    continue
                display.say(f"{label}: {future.result()}")
                for cell in members:
                    waiting[pool.submit(_run, output, cell)] = (cell.label, cell.folder(output), [])
            display.update()
    if failed:
        raise CellsFailedError(
            f"{len(failed)} parts of the benchmark failed, the rest is done; mend the cause and repeat the command:"
            + "".join(f"\n  {line}" for line in failed)
        )
    return [run_cell(output, cell) for cell in cells]


def preparation_folder(output: Path, suite: str, seed: int) -> Path:
    """Where the log and the progress of what a seed's cells share lie."""
    return output / "prepare" / f"{suite}-s{seed}"


def outcome(result: Result) -> str:
    """A finished cell in a line: every skill's success after the last stage."""
    scores = result["stages"][-1]["scores"]
    return ", ".join(f"{score['skill']} {score['successes']}/{score['rollouts']}" for score in scores)


def remember(output: Path, cells: Sequence[Cell], command: str) -> None:
    """Add cells to the list that ``show`` reads; a cell of the same method, budget and seed takes the place of another.

    Args:
        output: Folder of the benchmark.
        cells: The cells.
        command: What was typed.

    Raises:
        ValueError: The folder holds cells of the same suite with other sizes: one table must not compare the two.
    """
    file = output / MATRIX_FILE
    listed = {tuple(entry["key"]): entry for entry in read_matrix(output)["cells"]} if file.exists() else {}
    commands = read_matrix(output)["commands"] if file.exists() else []
    for entry in listed.values():
        there = Cell(**entry["cell"])
        other = next((c for c in cells if c.suite == there.suite and _shape(c) != _shape(there)), None)
        if other is not None:
            raise ValueError(
                f"{output} holds cells of suite {there.suite} with {_shape(there)}, and this run has {_shape(other)}; "
                f"take another --output, or the same sizes"
            )
    for cell in cells:
        listed[cell.key] = {"key": list(cell.key), "cell": asdict(cell)}
    if command not in commands:
        commands.append(command)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps({"commands": commands, "cells": list(listed.values())}, indent=1))


def _shape(cell: Cell) -> dict[str, Any]:
    """What cells must have in common to be compared."""
    return {**cell.sizes, "curve": cell.curve}


def read_matrix(output: Path) -> dict[str, Any]:
    """What :func:`remember` wrote.

    Raises:
        FileNotFoundError: Nothing was run into this folder.
    """
    file = output / MATRIX_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist, so no benchmark was run into {output}; start one with craft-report run --suite S "
            f"--output {output}"
        )
    return dict(json.loads(file.read_text()))


def finished(output: Path) -> list[Result]:
    """Results of the listed cells that are finished."""
    cells = [Cell(**entry["cell"]) for entry in read_matrix(output)["cells"]]
    return [run_cell(output, cell) for cell in cells if _is_finished(output, cell)]


def _is_finished(output: Path, cell: Cell) -> bool:
    return (cell.folder(output) / RESULT_FILE).exists()


class _InProcess(Executor):
    """Runs what is submitted at once, in this process."""

    def hand_out(self) -> None:
        """Nothing waits."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run it and return a future that is done."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _executor(jobs: int) -> Workers | _InProcess:
    if jobs == 0:
        return _InProcess()
    # Read by the workers when they import torch: more threads than cores slow small models down many times over.
    os.environ["OMP_NUM_THREADS"] = str(max(1, usable_cores() // jobs))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return Workers(jobs, CELLS_OF_A_WORKER, _begin)


def _begin() -> None:
    end_with_parent()
    shorten_codec_warning()


def _prepare(output: Path, folder: Path, cells: Sequence[Cell]) -> str:
    with _logged(folder):
        prepare_seed(output, cells, _writer(folder))
    return "done"


def _run(output: Path, cell: Cell) -> str:
    folder = cell.folder(output)
    with _logged(folder):
        return outcome(run_cell(output, cell, _writer(folder)))


@contextlib.contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """What a cell says goes into a file: the console has one display for all."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            yield
        except Exception:
            traceback.print_exc(file=log)
            raise


def _writer(folder: Path) -> Callable[[float], None]:
    """Tells another process the share that is done, through a file that is replaced as a whole."""
    file, temporary = folder / PROGRESS_FILE, folder / f"{PROGRESS_FILE}.tmp"

    def write(share: float) -> None:
        temporary.write_text(f"{share:.4f}")
        temporary.replace(file)

    return write


class _Display:
    """One bar for all: finished cells, shares of running ones, and how long the rest takes at the pace so far."""

    def __init__(
        self, output: Path, cells: Sequence[Cell], groups: Mapping[tuple[str, int], Sequence[Cell]], *, show: bool
    ) -> None:
        self._results = [cell.folder(output) / RESULT_FILE for cell in cells]
        self._parts = {file.parent: 1.0 for file in self._results}
        for suite, seed in groups:
            self._parts[preparation_folder(output, suite, seed)] = _WEIGHT_OF_PREPARATION
        self._show = show
        self._seconds = 0.0 if sys.stderr.isatty() else _LOG_SECONDS
        self._finished, self._drawn = -1, 0.0

    def __enter__(self) -> _Display:
        self._bar = tqdm(
            total=sum(self._parts.values()),
            initial=self._share(),
            disable=not self._show,
            smoothing=0,  # the pace since the start of this command
            bar_format="{desc} {percentage:3.0f}% |{bar}| [{elapsed} so far, {remaining} left]",
        )
        self.update()
        return self

    def __exit__(self, *exception: object) -> None:
        self.update()
        self._bar.close()

    def _share(self) -> float:
        return sum(weight * _read_share(folder) for folder, weight in self._parts.items())

    def update(self) -> None:
        """Read every part's progress and draw."""
        now, finished = time.monotonic(), sum(file.exists() for file in self._results)
        if finished == self._finished and now - self._drawn < self._seconds:
            return
        self._finished, self._drawn = finished, now
        self._bar.set_description_str(f"Benchmark: {finished} of {len(self._results)} cells", refresh=False)
        self._bar.n = min(self._share(), self._bar.total)
        self._bar.refresh()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._show:
            tqdm.write(line)


def _read_share(folder: Path) -> float:
    if (folder / RESULT_FILE).exists():
        return 1.0
    try:
        return float((folder / PROGRESS_FILE).read_text())
    except (OSError, ValueError):
        return 0.0
