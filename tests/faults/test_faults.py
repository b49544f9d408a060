"""A sample of the campaign: six deaths in a checkpoint, a signal of each kind, and two runs in one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from craft_opt.bridge import run_guard
from craft_opt.bridge.run_guard import locked
from craft_opt.bridge.seals import SEAL_FILE, check_prefix, check_seal, prefix_note, seal
from tests.faults.campaign import Campaign
from tests.faults.judge import CLEAR, CONTINUED, MENDED, SILENT, UNCLEAR, follow, is_clear
from tests.faults.lab import Ended, Lab
from tests.faults.world import World


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    lab = Lab(root / "lab")
    yield Campaign(World(root, lab), lab)
    lab.close()


def outcomes(campaign: Campaign, before: int) -> list[tuple[str, str]]:
    return [(o.outcome, f"{o.name}: {o.detail}") for o in campaign.outcomes[before:]]


def test_a_run_killed_anywhere_in_a_checkpoint_goes_on_bit_for_bit(campaign):
    before = len(campaign.outcomes)
    campaign.kills("kill", "training", campaign.world.training, 6, after="000004.partial")
    found = outcomes(campaign, before)
    assert len(found) == 6
    assert all(outcome in (CONTINUED, MENDED) for outcome, _ in found), found


def test_signals_end_a_run_in_order(campaign):
    before = len(campaign.outcomes)
    campaign.signals_at_points("signal", "training", campaign.world.training, 2, after="000004.partial")
    assert [outcome for outcome, _ in outcomes(campaign, before)] == [CONTINUED] * 2, outcomes(campaign, before)


def test_two_runs_in_one_folder(campaign):
    job = campaign.world.resuming()
    with locked(job.made / ".lock", "it"):
        ended = campaign.lab.run(job.target, job.arguments)
    assert ended.code == 2
    assert is_clear(ended, job.root)
    assert f"is in use by another process (number {os.getpid()}" in ended.message
    outcome, detail = follow(campaign.lab, job, None)
    assert outcome == CONTINUED, detail


def test_a_flipped_bit_in_a_checkpoint_is_named(campaign):
    before = len(campaign.outcomes)
    job = campaign.world.resuming()
    file = job.made / "checkpoints" / "000002" / "training_state" / "optimizer_state.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 16
    file.write_bytes(content)
    ended = campaign.lab.run(job.target, job.arguments)
    assert "optimizer_state.safetensors is damaged: its checksum differs" in ended.message
    campaign.judge_error("damage", "optimizer", job, ended, damaged=True)
    assert [outcome for outcome, _ in outcomes(campaign, before)] == [CLEAR], outcomes(campaign, before)


def test_the_judge_sees_what_is_wrong(campaign):
    """Without the seal the same damage is silent, and the judge says so: the campaign can fail."""
    job = campaign.world.resuming()
    folder = job.made / "checkpoints" / "000002"
    (folder / SEAL_FILE).unlink()
    file = folder / "training_state" / "optimizer_state.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 16
    file.write_bytes(content)
    outcome, detail = follow(campaign.lab, job, None)
    assert outcome == SILENT, detail
    assert "training_state/optimizer_state.safetensors" in detail
    crash = Ended(1, "", "Traceback (most recent call last)\nKeyError: 'x'")
    assert not is_clear(crash, job.root)
    assert not is_clear(Ended(2, "", f"error: {job.root} is bad"), job.root), "no remedy"
    assert not is_clear(Ended(2, "", "error: it is bad; delete it"), job.root), "no place"
    outcome, _ = follow(campaign.lab, replace(job, arguments=("--nothing",)), crash)
    assert outcome == UNCLEAR


# -- the parts by themselves -----------------------------------------------------------------------------------------


def test_a_lock_ends_with_its_process(tmp_path):
    file = tmp_path / "lock"
    # The file by itself: importing the package imports torch, for seconds.
    script = (
        "import runpy, sys, time; from pathlib import Path; locked = runpy.run_path(sys.argv[1])['locked']\n"
        "with locked(Path(sys.argv[2]), 'it'):\n    print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, run_guard.__file__, file]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(BlockingIOError, match=rf"it is in use by another process \(number {holder.pid}"):
        locked(file, "it").__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert file.is_file(), "a stale file, and no stale lock"
    with locked(file, "it"):
        pass
    assert not file.exists()


def test_a_seal_names_what_is_damaged(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "weights").write_bytes(b"abc")
    (tmp_path / "config.json").write_text("{}")
    assert check_seal(tmp_path, "") == {}, "no seal, nothing to compare with"
    seal(tmp_path, step=3)
    assert check_seal(tmp_path, "") == {"step": 3}
    (tmp_path / "later").write_text("what the seal does not name may come")
    check_seal(tmp_path, "")
    (tmp_path / "inner" / "weights").write_bytes(b"abd")
    check_seal(tmp_path, "", suffix=".json")
    check_seal(tmp_path, "", part="other/")
    with pytest.raises(ValueError, match=r"inner/weights is damaged: its checksum differs .*; take a copy; if you"):
        check_seal(tmp_path, "take a copy")
    (tmp_path / "inner" / "weights").unlink()
    with pytest.raises(ValueError, match="inner/weights is missing"):
        check_seal(tmp_path, "")
    file = tmp_path / SEAL_FILE
    file.write_text(file.read_text().replace('"step": 3', '"step": 4'))
    with pytest.raises(ValueError, match="its own checksum differs"):
        check_seal(tmp_path, "")
    file.write_text("{")
    with pytest.raises(ValueError, match=r"checksums.json is damaged \("):
        check_seal(tmp_path, "")


def test_a_growing_file_must_begin_as_before(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert prefix_note(file) == {}
    file.write_text("1\n2\n")
    note = prefix_note(file)
    file.write_text("1\n2\n3\n")
    check_prefix(note, file)
    file.write_text("1\n9\n3\n")
    with pytest.raises(ValueError, match="move it away to go on without its history"):
        check_prefix(note, file)
    file.unlink()
    check_prefix(note, file)
