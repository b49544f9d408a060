"""The quickstart's stages at their smallest, through the command that users type."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from craft_opt import CraftConfig
from craft_opt.bridge import cli
from craft_opt.bridge.anchor_cache import AnchorCache
from craft_opt.bridge.checkpoint import latest_checkpoint
from craft_opt.bridge.quickstart.run import DRY_RUN, Quickstart, run_quickstart
from craft_opt.bridge.quickstart.settings import QuickstartSettings
from tests.quickstart.test_quickstart_figures import assert_figures, quickstart

ROOT = Path(__file__).parents[2]
STEPS = DRY_RUN["steps"]
METHOD = CraftConfig()
BANNER = f"""\
CRaFT enabled: True
Retention Mode: hidden
initial λ: {METHOD.initial_lambda}
λ learning rate: {METHOD.lambda_lr}
λ max: {METHOD.lambda_max}
ε start: {METHOD.epsilon_start}
ε end: {METHOD.epsilon_end}
gradient projection: True
conflict threshold: -0.1
merge mode: weighted
"""
KEPT_BY_ALL = {"old", "new", "held-out", "teacher", "before"}

# Dies like a machine that loses power, before a step of training that is counted over the teacher's and the
# fine-tuning's; a checkpoint is written after each.
KILLED = """
import os, signal, sys
from craft_opt.bridge import cli, loop
from craft_opt.bridge.quickstart import teacher

last = int(sys.argv[1])
step = loop.train_step
done = []

def dying_step(*args, **kwargs):
    if len(done) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(True)
    return step(*args, **kwargs)

loop.train_step = dying_step
teacher.SAVE_EVERY = 1
sys.exit(cli.main(sys.argv[2:]))
"""


def flags(output: Path, mode: str) -> list[str]:
    return ["--retention-mode", mode, "--dry-run", f"--output_dir={output}"]


def subprocess_run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    # As many threads as here: sums in another order would not be equal bit for bit.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


def in_process(output: Path, mode: str) -> str:
    log = io.StringIO()
    with redirect_stdout(log):
        quickstart(output, mode, "--dry-run")
    return log.getvalue()


def kept(output: Path) -> dict[str, Path]:
    """Name without fingerprint → what is kept under it."""
    return {path.name.rpartition("-")[0]: path for path in (output / "kept").iterdir()}


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def weights(policy: Path) -> dict[str, torch.Tensor]:
    return load_file(policy / "model.safetensors")


def metrics_of(folder: Path) -> list[dict]:
    lines = (folder / "training" / "metrics.jsonl").read_text().splitlines()
    varying = ("update_s", "data_s")
    return [{k: v for k, v in json.loads(line).items() if k not in varying} for line in lines]


@pytest.fixture(scope="module")
def hidden(tmp_path_factory) -> tuple[Path, str]:
    """The command itself, in a process of its own: output folder and log."""
    output = tmp_path_factory.mktemp("quickstart") / "out"
    done = subprocess_run(["train.py", *flags(output, "hidden")])
    assert done.returncode == 0, done.stderr[-3000:]
    return output, done.stdout


@pytest.fixture(scope="module")
def none(hidden) -> tuple[Path, str, dict[Path, int]]:
    """A second run into the same folder: its log, and the times of what was kept before it."""
    output, _ = hidden
    before = times(output)
    return output, in_process(output, "none"), before


def test_a_run_ends_with_its_table_and_files(hidden):
    output, log = hidden
    folder = output / "hidden-seed0-001"
    table = (folder / "table.txt").read_text()
    assert table in log
    assert [line.split(" | ")[0].strip() for line in table.splitlines()[2:]] == ["old", "old", "new"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((folder / "result.json").read_text())
    assert result["mode"] == "hidden"
    assert [score["skill"] for score in result["after"]] == ["drawer-close", "button-press", "window-close"]
    assert all(score["rollouts"] == 1 for score in result["before"] + result["after"])
    assert result["seconds"]["total"] > 0
    assert result["peak_memory_gib"] > 0
    steps = metrics_of(folder)
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(step["retention_loss"] is not None for step in steps), "retention at every step"
    for path in (folder / "training" / "metrics.jsonl", folder / "curves.png", folder / "result.json", output / "kept"):
        assert f": {path}\n" in log
    assert weights(folder / "training" / "checkpoints" / "last" / "pretrained_model")


def test_the_log_is_what_a_monitor_waits_for(hidden):
    _, log = hidden
    assert BANNER in log
    before, after = log.split(BANNER)
    assert "AnchorCache" in before
    assert [line.split("]")[0] for line in log.splitlines() if line.startswith("[")] == [f"[{n}/7" for n in range(1, 8)]
    lines = [line for line in after.splitlines() if line.startswith("Step ")]
    assert [line.split(" | ")[0] for line in lines] == ["Step 1/3", "Step 2/3", "Step 3/3"]
    assert all("mode=hidden" in line and "L_ret=" in line and "λ=" in line and "ε=" in line for line in lines)


def test_a_second_run_takes_what_is_kept(none):
    output, log, before = none
    assert {name for name, path in kept(output).items() if f"kept from an earlier run: {path}" in log} == KEPT_BY_ALL
    after = times(output)
    changed = {path for path in before if after.get(path) != before[path]}
    assert changed <= {output}, "only a new run's folder was added"
    assert set(kept(output)) == KEPT_BY_ALL | {"anchors"}
    folder = output / "none-seed0-001"
    assert "CRaFT enabled: False" in log
    assert all("retention_loss" not in step for step in metrics_of(folder))
    assert not [line for line in log.splitlines() if line.startswith("Step") and "L_ret" in line]
    first, second = (json.loads((output / f"{m}-seed0-001/result.json").read_text()) for m in ("hidden", "none"))
    assert first["before"] == second["before"]
    # What the slow test of the full quickstart does with its two results; three steps teach nothing.
    with pytest.raises(AssertionError, match="the teacher does drawer-close"):
        assert_figures(first, second)
    assert (folder / "table.txt").read_text() in log
    assert (folder / "curves.png").read_bytes() != (output / "hidden-seed0-001" / "curves.png").read_bytes()


def test_a_finished_run_is_never_written_over(none):
    output, _, _ = none
    first = times(output / "none-seed0-001")
    log = in_process(output, "none")
    assert str(output / "none-seed0-002") in log
    assert times(output / "none-seed0-001") == first
    assert metrics_of(output / "none-seed0-002") == metrics_of(output / "none-seed0-001"), "the seed decides everything"


def test_a_killed_run_goes_on_where_it_was(hidden, tmp_path):
    """Killed in the teacher's training, then in the fine-tuning: the same policies bit for bit, no step done twice."""
    finished, _ = hidden
    output = tmp_path / "out"
    for name in ("old", "new", "held-out"):
        shutil.copytree(kept(finished)[name], output / "kept" / kept(finished)[name].name)
    command = ["-c", KILLED]

    # 3 steps of the teacher; dies before the third.
    done = subprocess_run([*command, "2", *flags(output, "hidden")])
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert set(kept(output)) == {"old", "new", "held-out", "teacher"}
    assert kept(output)["teacher"].name.endswith(".partial"), "nothing under the finished teacher's name"
    assert latest_checkpoint(kept(output)["teacher"]).name == "000002"

    # One step of the teacher is left; dies before the third of fine-tuning.
    done = subprocess_run([*command, "3", *flags(output, "hidden")])
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert "Resumed from" in done.stdout
    assert "after step 2" in done.stdout
    teacher = kept(output)["teacher"]
    assert teacher.name == kept(finished)["teacher"].name
    folder = output / "hidden-seed0-001"
    assert latest_checkpoint(folder / "training").name == "000002"
    assert not (folder / "result.json").exists()

    log = in_process(output, "hidden")
    assert f"Going on with {folder / 'training'} after step 2" in log
    assert [line.split(" | ")[0] for line in log.splitlines() if line.startswith("Step ")] == ["Step 3/3"]
    assert [path.name for path in output.iterdir() if path.name != "kept"] == ["hidden-seed0-001"]
    assert metrics_of(folder) == metrics_of(finished / "hidden-seed0-001")
    last = Path("hidden-seed0-001/training/checkpoints/last/pretrained_model")
    for ours, theirs in (
        (teacher, kept(finished)["teacher"]),
        (output / last, finished / last),
    ):
        found, expected = weights(ours), weights(theirs)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    # Killed in the last measurement: nothing is trained again.
    (folder / "result.json").unlink()
    before = times(folder / "training")
    assert not [line for line in in_process(output, "hidden").splitlines() if line.startswith("Step ")]
    assert (folder / "result.json").is_file()
    assert times(folder / "training") == before


def test_other_settings_take_other_folders(tmp_path):
    whole = QuickstartSettings()
    settings = replace(whole, episodes=1, old=whole.old[:1])

    def made(**changes) -> Path:
        craft = CraftConfig(enabled=False)
        return Quickstart(replace(settings, **changes), craft, "none", tmp_path)._old_demonstrations()

    first = made()
    before = times(first)
    assert made(seed=1) != first
    assert made(episodes=2) != first
    assert made(new=settings.new * 2, steps=7, rollouts=3) == first, "what old demonstrations do not depend on"
    assert times(first) == before


def test_a_folder_is_gone_on_with_only_by_the_same_settings(tmp_path):
    def folder(craft=None, **changes) -> Path:
        settings = replace(QuickstartSettings(), **changes)
        return Quickstart(settings, craft or CraftConfig(), "hidden", tmp_path)._run_folder()

    first = folder()
    assert first == tmp_path / "hidden-seed0-001"
    assert folder() == first
    assert folder(steps=7).name == "hidden-seed0-002"
    assert folder(craft=CraftConfig(lambda_lr=0.5)).name == "hidden-seed0-003"
    assert folder(seed=1).name == "hidden-seed1-001"
    assert folder(steps=7).name == "hidden-seed0-002"
    (first / "result.json").write_text("{}")
    assert folder().name == "hidden-seed0-004"


def test_token_ce_runs_from_a_cache_of_its_own(hidden):
    """The third command, into the folder of the first: the teacher is taken, the anchors are tokens."""
    output, _ = hidden
    log = in_process(output, "token_ce")
    assert "Retention Mode: token_ce" in log
    assert "token loss: kl" in log
    assert "AnchorCache tokens: teacher, top 8 probabilities" in log
    assert {"anchors", "anchors-tokens"} <= set(kept(output))
    folder = output / "token_ce-seed0-001"
    steps = metrics_of(folder)
    assert steps[0]["retention_loss"] == pytest.approx(0, abs=1e-6), "the student is the teacher"
    assert steps[2]["retention_loss"] > 1e-6, "and no longer after two steps"
    assert json.loads((folder / "result.json").read_text())["mode"] == "token_ce"
    manifest = AnchorCache.open(kept(output)["anchors-tokens"]).manifest
    assert (manifest.kind, manifest.top_k, manifest.token_source) == ("token_ce", 8, "teacher")


def test_a_batch_of_more_anchors_than_there_are_is_refused(tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main([*flags(output, "hidden"), "--craft.anchor_batch_size=33"]) == 2
    error = capsys.readouterr().err
    assert "craft.anchor_batch_size is 33, and the quickstart keeps 32 anchors" in error
    assert "--craft.anchor_batch_size=32 or less" in error
    assert not output.exists(), "refused before anything runs"
    total = QuickstartSettings().anchors * len(QuickstartSettings().old)
    with pytest.raises(ValueError, match=f"the quickstart keeps {total} anchors"):
        run_quickstart(retention_mode="hidden", craft_overrides={"anchor_batch_size": total + 1}, output_dir=output)
