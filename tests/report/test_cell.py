"""A cell through a sequence of three skills in MetaWorld at the smallest size, stopped and gone on with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from craft_opt.bridge.anchor_cache import AnchorCache
from craft_opt.bridge.quickstart.simulation import DRAWER_CLOSE
from craft_opt.bridge.report import metrics
from craft_opt.bridge.report.cell import Bench, Cell, Stage, prepare_seed, run_cell
from craft_opt.bridge.report.matrix import run_matrix
from craft_opt.bridge.report.methods import METHODS
from craft_opt.bridge.report.results import groups_of, summary_row
from craft_opt.bridge.report.suites import FAUCET_OPEN, HANDLE_PRESS, SUITES, Suite
from tests.support.asserts import assert_same_bits

# A minute for what the cells share; test_stages.py has what needs none of it.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
SIZES = {"episodes": 1, "held_out_episodes": 1, "teacher_steps": 2, "steps": 4, "rollouts": 2, "batch_size": 4}
SUITE = Suite("T", "three skills one after another", ((HANDLE_PRESS,), (FAUCET_OPEN,), (DRAWER_CLOSE,)))
BUDGET = 5
CELL = Cell("T", "hidden", BUDGET, 0, {}, SIZES, curve=1)


@pytest.fixture(scope="module", autouse=True)
def suite():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SUITES, "T", SUITE)
        yield


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Everything that the cells of the seed share, made once."""
    folder = tmp_path_factory.mktemp("report") / "out"
    told = []
    prepare_seed(folder, [CELL, replace(CELL, method="ewc")], told.append)
    assert told == sorted(told) and told[-1] == 1.0
    return folder


class Stopped(BaseException):
    """As Ctrl-C would."""


@pytest.fixture(scope="module")
def stopped(output):
    """The cell's folder as it was when it was stopped in its second stage."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        measure, measured = Bench.measure, []

        def dying(self, policy):
            if measured:
                raise Stopped
            measured.append(policy)
            return measure(self, policy)

        patch.setattr(Bench, "measure", dying)
        run_cell(output, CELL)
    folder = CELL.folder(output)
    return Path(shutil.copytree(folder, output.parent / "stopped"))


@pytest.fixture(scope="module")
def finished(output, stopped):
    """The result after going on, and what the second start did to the first stage's files."""
    before = times(CELL.folder(output) / "stage-1")
    caught = []
    with pytest.MonkeyPatch.context() as patch:
        train = Stage._train
        patch.setattr(Stage, "_train", lambda self, *a: (caught.append((self.number, before)), train(self, *a))[1])
        told = []
        result = run_cell(output, CELL, told.append)
    assert told == sorted(told) and told[-1] == 1.0
    assert [number for number, _ in caught] == [2], "the first stage was not done again"
    return result


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def without_times(value):
    """A result without what no two runs have in common."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if "seconds" not in k and k != "peak_memory_gib"}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def test_a_stopped_cell_leaves_whole_stages_only(stopped):
    assert (stopped / "stage-1" / "record.json").exists()
    assert not (stopped / "stage-2" / "record.json").exists()
    assert not (stopped / "result.json").exists()


def test_going_on_twice_gives_the_same(output, stopped, finished):
    """From the very state in which it was stopped, once more: every number of the result."""
    folder = CELL.folder(output)
    kept = folder.with_name("first")
    folder.rename(kept)
    try:
        shutil.copytree(stopped, folder)
        assert without_times(run_cell(output, CELL)) == without_times(finished)
        policies = [load_file(f / "stage-2" / "policy" / "model.safetensors") for f in (folder, kept)]
        for name in policies[0]:
            assert_same_bits(policies[0][name], policies[1][name], name)
    finally:
        shutil.rmtree(folder)
        kept.rename(folder)


def test_a_finished_cell_is_not_run_again(output, finished, monkeypatch):
    monkeypatch.setattr(Stage, "run", lambda *a: pytest.fail("a finished cell was run again"))
    before = times(output)
    assert run_cell(output, CELL) == finished
    assert times(output) == before


def test_what_a_result_holds(output, finished):
    assert finished["skills"] == ["handle-press", "faucet-open", "drawer-close"]
    assert finished["learned"] == [0, 1, 2]
    assert len(finished["before"]) == 3 and [stage["stage"] for stage in finished["stages"]] == [1, 2]
    for scores in (finished["before"], *(stage["scores"] for stage in finished["stages"])):
        assert [len(score["outcomes"]) for score in scores] == [2, 2, 2]
        assert all(score["successes"] == sum(score["outcomes"]) for score in scores)
        assert all(np.isfinite([score["action_ce"], score["action_mae"]]).all() for score in scores)
    first, second = finished["stages"]
    assert {k: len(curve) for k, curve in first["curves"].items()} == {"1": 3}, "before, between, after"
    assert {k: len(curve) for k, curve in second["curves"].items()} == {"2": 3}
    for stage in finished["stages"]:
        assert stage["step_seconds"] > 0 and stage["peak_memory_gib"] > 0.1 and stage["skipped_steps"] == 0
        assert set(stage["last"]) == {"retention_loss", "lambda", "epsilon", "projected"}
    assert finished["sizes"]["steps"] == 4 and finished["settings"]["lr"] == 3e-4
    row = summary_row(finished)
    group = groups_of([finished])[0]
    assert row["nbt"] == pytest.approx(float(metrics.nbt(group.success, group.learned)[0]))


def test_the_store_grows_by_the_budget_and_samples_never_change(output, finished):
    """The second stage's anchors hold the first's, looked at by another teacher."""
    first, second = finished["stages"]
    assert second["stored_bytes"] == pytest.approx(2 * first["stored_bytes"], rel=1e-6)
    bench = Bench(SUITE, 0, output, SIZES)
    policy = CELL.folder(output) / "stage-2" / "policy"
    one = AnchorCache.open(bench.anchors(METHODS["hidden"], BUDGET, 1))
    two = AnchorCache.open(bench.anchors(METHODS["hidden"], BUDGET, 2, policy, output.parent / "again"))
    latest = AnchorCache.open(
        bench.anchors(METHODS["ewc"], BUDGET, 2, policy, output.parent / "latest", only_latest=True)
    )
    assert (len(one), len(two), len(latest)) == (BUDGET, 2 * BUDGET, BUDGET)
    prompts = {HANDLE_PRESS.prompt: BUDGET, FAUCET_OPEN.prompt: BUDGET}
    assert {prompt: two.task_texts().count(prompt) for prompt in set(two.task_texts())} == prompts
    assert set(latest.task_texts()) == {FAUCET_OPEN.prompt}

    def samples(cache, prompt):
        chosen = cache.gather([k for k, text in enumerate(cache.task_texts()) if text == prompt])
        (images,) = chosen.images.values()
        return {image.numpy().tobytes() for image in images}, chosen.features

    (old, before), (same, after) = samples(one, HANDLE_PRESS.prompt), samples(two, HANDLE_PRESS.prompt)
    assert old == same and len(old) == BUDGET
    assert not torch.equal(before[3], after[3])

    settings = {"layers": [1, -1], "pooling": "mean_masked", "selection": "coverage"}
    other = bench.anchors(METHODS["hidden"].with_settings(settings), BUDGET, 1)
    made = AnchorCache.open(other).manifest
    assert (made.layers, made.pooling, made.selection) == ([1, made.depth], "mean_masked", "coverage")
    assert other != one.folder, "what is kept for one setting is not taken for another"


def test_the_next_stage_starts_from_the_policy_after_this_one(output, stopped):
    bench = Bench(SUITE, 0, output, SIZES)
    teacher = load_file(bench.teacher() / "model.safetensors")
    after = load_file(stopped / "stage-1" / "policy" / "model.safetensors")
    assert teacher.keys() == after.keys()
    assert any(not torch.equal(teacher[name], after[name]) for name in teacher)


def test_methods_of_a_seed_start_from_the_same_and_hand_on_what_they_keep(output, finished):
    ewc = run_cell(output, replace(CELL, method="ewc"))
    assert ewc["before"] == finished["before"]
    assert ewc["stages"][0]["curves"]["1"][0] == finished["stages"][0]["curves"]["1"][0]
    assert ewc["stages"][1]["stored_bytes"] == ewc["stages"][0]["stored_bytes"], "weights and Fisher, no samples"


def test_the_learning_curve_does_not_change_what_is_trained(output, finished):
    straight = run_cell(output, replace(CELL, curve=0))
    assert [stage["scores"] for stage in straight["stages"]] == [stage["scores"] for stage in finished["stages"]]
    assert {k: len(c) for stage in straight["stages"] for k, c in stage["curves"].items()} == {"1": 2, "2": 2}


# -- minutes long ----------------------------------------------------------------------------------------------------

FLAGS = [
    "--episodes",
    "2",
    "--held-out-episodes",
    "1",
    "--teacher-steps",
    "3",
    "--steps",
    "4",
    "--rollouts",
    "2",
    "--batch-size",
    "8",
    "--budgets",
    "8",
]


def start(console, *arguments):
    """The command in a process of its own; its console in a file, because a pipe that nobody reads would stop it."""
    with console.open("w") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "craft_opt.bridge.report", *arguments],
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )


def command(console, *arguments):
    assert start(console, *arguments).wait(timeout=3000) == 0, console.read_text()[-3000:]
    return console.read_text()


@pytest.mark.timeout(7200)
def test_a_killed_benchmark_goes_on(tmp_path):
    """The command itself with two workers, killed after its first cell, started again, shown again."""
    flags = ["run", "--suite", "S", "--methods", "naive", "replay", "hidden", "agem", "--seeds", "0", *FLAGS]
    output = tmp_path / "out"
    flags += ["--jobs", "2", "--output", str(output)]
    process = start(tmp_path / "first.txt", *flags)
    try:
        deadline = time.monotonic() + 3000
        while not list(output.glob("cells/S/*/result.json")):
            assert process.poll() is None, (tmp_path / "first.txt").read_text()[-3000:]
            assert time.monotonic() < deadline, "no cell was finished"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    first = {path: path.stat().st_mtime_ns for path in output.glob("cells/S/*/result.json")}
    assert 0 < len(first) < 4
    shared = times(output / "kept")

    shown = command(tmp_path / "second.txt", *flags)
    assert len(list(output.glob("cells/S/*/result.json"))) == 4
    assert {path: path.stat().st_mtime_ns for path in first} == first, "no finished cell was run again"
    assert {path: stamp for path, stamp in times(output / "kept").items() if path in shared} == shared
    assert "Benchmark: 4 of 4 cells 100%" in shown and "left]" in shown
    assert "| hidden |" in shown
    report = (output / "report.html").read_bytes()
    command(tmp_path / "third.txt", "show", str(output))
    assert (output / "report.html").read_bytes() == report
    assert len((output / "results.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("name", ["L", "D"])
def test_the_other_suites_run(name, tmp_path):
    sizes = {"episodes": 2, "held_out_episodes": 1, "teacher_steps": 3, "steps": 4, "rollouts": 2, "batch_size": 8}
    cells = [
        Cell(name, "hidden", 8, 0, {}, sizes),
        Cell(name, "hidden", 8, 0, {"prompted": 12}, sizes),
        Cell(name, "lora", 0, 0, {}, sizes),
    ]
    results = run_matrix(tmp_path, cells, 0, show=False)
    for result in results:
        assert len(result["stages"]) == len(SUITES[name].stages) - 1
        assert all(stage["skipped_steps"] == 0 for stage in result["stages"])
    stored, prompted, _ = ([stage["stored_bytes"] for stage in result["stages"]] for result in results)
    assert stored == prompted, "frames of the new skill are not kept for the next stage"


def test_a_tuning_runs(tmp_path):
    flags = ["tune", "--suite", "S", "--methods", "retain", "--tries", "2", "--jobs", "1", *FLAGS]
    shown = command(tmp_path / "console.txt", *flags, "--output", str(tmp_path / "out"))
    document = json.loads((tmp_path / "out" / "tuning.json").read_text())
    assert len(document["trials"]) == 2 and document["seeds"] == [1000]
    assert "S retain b0: " in shown
