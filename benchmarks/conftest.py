"""Options of the benchmark run, the shared problem of a case, and the results file at the end."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Problem

ROWS = pytest.StashKey[list[dict[str, Any]]]()
LOAD = pytest.StashKey[tuple[float, float, float]]()


def pytest_addoption(parser):
    group = parser.getgroup("craft benchmarks")
    group.addoption("--cases", help=f"comma-separated: {', '.join(harness.cases())}; default: what takes a few minutes")
    group.addoption("--budget", type=float, default=1.5, help="seconds of timed rounds for a contender (default 1.5)")
    group.addoption("--results", type=Path, default=harness.RESULTS, help="folder of the results file")


def pytest_configure(config):
    config.stash[ROWS] = []
    config.stash[LOAD] = os.getloadavg()


def chosen_runs(config):
    """(device, case, precision) that the command line asks for."""
    names = config.getoption("--cases")
    return harness.runs([name.strip() for name in names.split(",")] if names else None)


def pytest_generate_tests(metafunc):
    if "contender" in metafunc.fixturenames:
        from benchmarks.contenders import contenders

        params = [
            (device, case, precision, contender)
            for device, case, precision in chosen_runs(metafunc.config)
            for contender in contenders(device, precision)
        ]
        metafunc.parametrize(("device", "case", "precision", "contender"), params, scope="session")
    elif "case" in metafunc.fixturenames:
        metafunc.parametrize(("device", "case", "precision"), chosen_runs(metafunc.config), scope="session")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """All that belongs to one case runs together, the copy first, so that its gradients are made once."""

    def key(item):
        params = getattr(item, "callspec", None)
        where = [params.params.get(k, "") for k in ("device", "case", "precision")] if params else ["", "", ""]
        order = list(harness.cases())
        return where[0], order.index(where[1]) if where[1] in order else len(order), where[2]

    items.sort(key=key)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    """A contender that needs more memory than the device has is no failure of the suite; the reason says so."""
    try:
        return (yield)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"does not fit this device: {str(error).splitlines()[0][:120]}")


@pytest.fixture(scope="session")
def problems():
    """One problem at a time: the big ones fill the memory."""
    kept: dict[tuple[str, str, str], Problem] = {}

    def get(device: str, case: str, precision: str) -> Problem:
        if (device, case, precision) not in kept:
            kept.clear()
            kept[device, case, precision] = Problem(harness.cases()[case], precision, torch.device(device))
        return kept[device, case, precision]

    return get


@pytest.fixture
def problem(problems, device, case, precision):
    return problems(device, case, precision)


@pytest.fixture(autouse=True)
def tidy():
    """Free what a contender held in reference cycles before the next one takes its memory."""
    yield
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def record(request):
    """Add a row to the results file: ``record(name=..., seconds=[...])``."""

    def add(**row: Any) -> None:
        seconds = row.pop("seconds")
        row["median_s"], row["p20_s"], row["p80_s"] = (harness.quantile(seconds, q) for q in (0.5, 0.2, 0.8))
        row["min_s"], row["rounds"] = min(seconds), len(seconds)
        request.config.stash[ROWS].append(row)

    return add


def pytest_sessionfinish(session):
    rows = session.config.stash[ROWS]
    if rows:
        session.config.stash[ROWS] = []
        session.config.results_file = harness.write_results(
            rows, session.config.stash[LOAD], session.config.getoption("--results")
        )


def pytest_terminal_summary(terminalreporter, config):
    path = getattr(config, "results_file", None)
    if path is not None:
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        for row in harness.read_results(path)["rows"]:
            if row["test"] == "side_by_side":
                where = f"{row['device']} {row['case']} {row['precision']}"
                ratio = row["median_s"] / row["ours_s"]
                terminalreporter.write_line(f"{where}: {row['title']} takes {ratio:.2f} times as long as ours")
        terminalreporter.write_line(f"results: {shown}; table and picture: python -m benchmarks.report {shown}")
