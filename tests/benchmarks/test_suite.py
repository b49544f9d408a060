"""`pytest benchmarks/ --benchmark-only` runs, writes its results, and one command makes table and picture of them."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import harness, report
from tests.support.rooms import ROOT


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A real run: the smallest case, a few rounds, without the compiled and the slow contenders."""
    folder = tmp_path_factory.mktemp("results")
    command = [
        *(
            sys.executable,
            "-m",
            "pytest",
            "benchmarks/",
            "--benchmark-only",
            "-q",
            "--cases",
            "tiny",
            "--budget",
            "0.02",
        ),
        *("-k", "not compiled and not pcgrad and not config and not dualproj and not bf16", "--results", str(folder)),
    ]
    # pytest-benchmark measures nothing where it takes itself for one of several workers.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (file,) = folder.glob("*.json")
    return file


def test_results_name_the_machine_and_the_versions(results):
    document = harness.read_results(results)
    for key in ("date", "commit", "command", "machine", "cpu", "cores", "threads", "torch", "torchjd", "load_before"):
        assert document[key] not in (None, "", "unknown"), key
    assert "/" not in document["command"].split()[0], "a path of this machine does not belong into a results file"


def test_results_have_every_measure(results):
    rows = harness.read_results(results)["rows"]
    assert {row["test"] for row in rows} == {"update", "landed", "side_by_side", "iteration"}
    for row in rows:
        assert 0 < row["min_s"] <= row["p20_s"] <= row["median_s"] <= row["p80_s"] and row["rounds"] >= 3, row
    updates = {row["contender"]: row for row in rows if row["test"] == "update"}
    assert {"copy", "craft", "eager", "torchjd", "adamw_fused"} <= set(updates)
    # The gradient itself: 4 bytes a parameter, and the odd scalar.
    assert updates["adamw_fused"]["extra_peak_bytes"] / updates["adamw_fused"]["numel"] == pytest.approx(4, rel=0.01)


def test_one_command_makes_table_and_picture(results):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.report", str(results)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    table = results.with_suffix(".md").read_text()
    assert done.stdout.strip() == table.strip()
    assert "CraftOptimizer" in table and "share of copy" in table and "eager / ours" in table


def test_ratios_come_from_rounds_that_alternate():
    where = {"device": "cpu", "case": "tiny", "precision": "fp32"}
    rows = [
        {"test": "side_by_side", **where, "contender": "eager", "median_s": 6.0, "ours_s": 2.0},
        {"test": "side_by_side", **where, "contender": "adamw_fused", "median_s": 1.0, "ours_s": 2.5},
        {"test": "update", **where, "contender": "torchjd", "kind": "peer", "median_s": 4.0},
        {"test": "update", **where, "contender": "pcgrad", "kind": "peer", "median_s": 9.0},
    ]
    (found,) = report.ratios(rows)
    assert found["eager"] == 3.0 and found["adamw"] == 2.5 and found["best"] == "torchjd" and found["plain"] is None


def test_report_refuses_another_format(tmp_path):
    file = tmp_path / "old.json"
    file.write_text(json.dumps({"format": 0, "rows": []}))
    with pytest.raises(ValueError, match=r"old.json has format 0, this report reads 1"):
        harness.read_results(file)


def test_committed_results_can_be_read():
    for file in harness.RESULTS.glob("20*.json"):
        assert report.markdown(harness.read_results(file)).startswith("# Optimizer step")
