"""Checkpoints: whole or not there, and a resumed run is the uninterrupted one bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from craft_opt.bridge import cli
from craft_opt.bridge.anchor_manifest import AnchorManifest
from craft_opt.bridge.checkpoint import CraftState, latest_checkpoint
from craft_opt.bridge.config import resume_config
from craft_opt.bridge.loop import train

# Dies like a machine that loses power: in the middle of the second checkpoint, after the fourth step.
KILLED_RUN = """
import os, signal, sys
from craft_opt.bridge import checkpoint, cli
write = checkpoint.CraftState.write
def dying_write(self, file):
    if "000004" in str(file):
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, file)
checkpoint.CraftState.write = dying_write
cli.main(sys.argv[1:])
"""


def flags(world, output):
    # Random image transforms draw from torch's global generator at every sample: its state must come back, too.
    return [*world.flags(output), "--steps=4", "--save_freq=2", "--dataset.image_transforms.enable=true"]


def metrics_of(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out"
    assert cli.main(flags(world, output)) == 0
    return output


@pytest.fixture
def checkpoint(uninterrupted, tmp_path):
    """A copy of the run's checkpoint after step 2 that a test may damage."""
    output = Path(shutil.copytree(uninterrupted, tmp_path / "run", symlinks=True))
    return output / "checkpoints" / "000002"


def resume(folder, *extra):
    return cli.main(["--resume=true", f"--config_path={folder}/pretrained_model/train_config.json", *extra])


def assert_same_tensors(first, second):
    ours, theirs = load_file(first), load_file(second)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        # NaN in the dual state says that a running average has not begun.
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_a_killed_run_resumes_to_the_same_bits(world, uninterrupted, tmp_path):
    output = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, *flags(world, output)],
        capture_output=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == -signal.SIGKILL
    # The half checkpoint is not taken for a whole one, by anybody.
    assert (output / "checkpoints" / "000004.partial").is_dir()
    assert not (output / "checkpoints" / "000004").exists()
    assert latest_checkpoint(output) == output / "checkpoints" / "000002"
    assert os.readlink(output / "checkpoints" / "last") == "000002"
    assert [record["step"] for record in metrics_of(output)] == [1, 2, 3, 4]

    assert resume(output / "checkpoints" / "last") == 0
    for file in (
        "pretrained_model/model.safetensors",
        "training_state/optimizer_state.safetensors",
        "training_state/craft_state.safetensors",
        "training_state/rng_state.safetensors",
    ):
        assert_same_tensors(*(run / "checkpoints" / "000004" / file for run in (output, uninterrupted)))
    timings = ("update_s", "data_s")
    ours, theirs = (
        [{k: v for k, v in record.items() if k not in timings} for record in metrics_of(run)]
        for run in (output, uninterrupted)
    )
    assert ours == theirs, "every step once, with the same numbers"
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["000002", "000004", "last"]


def test_the_checkpoint_holds_what_craft_needs(uninterrupted):
    state = CraftState.read(uninterrupted / "checkpoints/000004/training_state/craft_state.safetensors")
    records = metrics_of(uninterrupted)
    assert state.lam == records[2]["lambda"], "the last retention step is the third"
    assert (state.t, state.skipped, state.anchor_positions, state.accumulated) == (4, 0, (8,), 1)
    assert state.normalization_stats == "teacher"


def test_a_program_resumes_like_the_command_line(uninterrupted, checkpoint):
    output = checkpoint.parents[1]
    (output / "checkpoints" / "last").unlink()
    shutil.rmtree(output / "checkpoints" / "000004")
    cfg = resume_config(latest_checkpoint(output))
    cfg.output_dir = output
    summary = train(cfg, progress=False)
    assert summary.checkpoint == output / "checkpoints" / "000004"
    assert_same_tensors(
        *(run / "checkpoints/000004/pretrained_model/model.safetensors" for run in (output, uninterrupted))
    )


def test_a_run_without_retention_resumes_too(world, tmp_path):
    output = tmp_path / "out"
    assert cli.main([*flags(world, output), "--retention-mode=none"]) == 0
    whole = load_file(output / "checkpoints/000004/pretrained_model/model.safetensors")
    shutil.rmtree(output / "checkpoints/000004")
    assert resume(output / "checkpoints/000002") == 0
    again = load_file(output / "checkpoints/000004/pretrained_model/model.safetensors")
    assert all(torch.equal(whole[name], tensor) for name, tensor in again.items())


def refused(capsys, folder, *extra):
    assert resume(folder, *extra) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_without_crafts_state_is_refused(checkpoint, capsys):
    (checkpoint / "training_state" / "craft_state.safetensors").unlink()
    error = refused(capsys, checkpoint)
    assert "craft_state.safetensors is missing, so λ, ε's clock and the order of anchors are lost" in error


def test_a_damaged_craft_state_is_refused(checkpoint, capsys):
    file = checkpoint / "training_state" / "craft_state.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    assert "craft_state.safetensors is damaged" in refused(capsys, checkpoint)


def test_states_of_different_checkpoints_are_refused(checkpoint, capsys):
    shutil.copy(
        checkpoint.parent / "000004" / "training_state" / "craft_state.safetensors", checkpoint / "training_state"
    )
    assert "craft_state.safetensors is damaged: its checksum differs" in refused(capsys, checkpoint)
    (checkpoint / "checksums.json").unlink()  # of before there were any
    assert "the files are of different checkpoints" in refused(capsys, checkpoint)


def test_another_cache_than_before_is_refused(world, cache_copy, checkpoint, capsys):
    replace(AnchorManifest.read(cache_copy), seed=9).write(cache_copy)
    error = refused(capsys, checkpoint, f"--craft.anchor_cache_dir={cache_copy}")
    assert "was trained with anchor cache" in error
    assert "resume with the same cache and retention mode" in error
    assert "is none; resume with the same cache" in refused(capsys, checkpoint, "--craft.enabled=false")


def test_other_settings_than_the_order_allows_are_refused(checkpoint, capsys):
    assert "was trained with --batch_size=4, got --batch_size=2; the order" in refused(
        capsys, checkpoint, "--batch_size=2"
    )
    assert "has 2 steps behind it, and --steps=2; nothing is left to do" in refused(capsys, checkpoint, "--steps=2")


def test_other_statistics_than_before_are_refused(checkpoint, capsys):
    error = refused(capsys, checkpoint, "--normalization_stats=dataset")
    assert "normalisation statistics, and this run takes the dataset's" in error


def test_weights_that_do_not_load_are_refused_on_resume(checkpoint, capsys):
    file = checkpoint / "pretrained_model" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file)
    (checkpoint / "checksums.json").unlink()
    assert resume(checkpoint) == 2
    assert "did not load every weight" in capsys.readouterr().err


def test_an_unfinished_checkpoint_is_refused(checkpoint, capsys):
    partial = checkpoint.rename(checkpoint.with_name("000002.partial"))
    assert "is an unfinished checkpoint" in refused(capsys, partial)


def test_a_checkpoint_saved_again_replaces_the_old_one(world, uninterrupted, checkpoint):
    """Resumed from step 2, the run comes to step 4 where a checkpoint lies already."""
    marker = checkpoint.parent / "000004" / "marker"
    marker.touch()
    assert resume(checkpoint, f"--output_dir={checkpoint.parents[1]}") == 0
    assert not marker.exists()
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["000002", "000004", "last"]
