"""The fuzzer of the readers: a few hundred cases of it here, ten thousand with ``-m slow``, and that it can fail."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bridge import fuzz

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bases(world, tmp_path_factory):
    return [
        fuzz.base_of("hidden", world.cache, fuzz.read_cache),
        fuzz.state_base(tmp_path_factory.mktemp("states") / "state"),
    ]


def test_damaged_files_are_refused_or_equal(bases, tmp_path):
    found = fuzz.fuzz(bases, 400, tmp_path)
    assert found["cases"] >= 400
    assert found["refused"] > 200 and found["equal"] > 0, "whole ones are read, too"
    assert found["refused"] + found["equal"] + found["another one, by its digest"] == found["cases"]


def damaged(base, place=-9):
    files = dict(base.files)
    content = bytearray(files["shard-00000.safetensors"])
    content[place] ^= 1
    return files | {"shard-00000.safetensors": bytes(content)}


def outcome_of(base, tmp_path, read):
    original = fuzz.read_cache(base.folder)
    with fuzz.bounded_memory():
        return fuzz.outcome(replace(base, read=read), damaged(base), False, tmp_path, original)


def test_the_fuzzer_sees_a_flipped_bit_refused(bases, tmp_path):
    assert outcome_of(bases[0], tmp_path, fuzz.read_cache) == "refused"


def test_the_fuzzer_fails_for_a_silently_different_load(bases, tmp_path, monkeypatch):
    monkeypatch.setattr("craft_opt.bridge.anchor_cache.check_shard", lambda *_: None)
    with pytest.raises(AssertionError, match="a damaged file was taken for a whole one"):
        outcome_of(bases[0], tmp_path, fuzz.read_cache)


def raising(error):
    def read(folder):
        raise error

    return read


def test_the_fuzzer_fails_for_another_exception_and_for_one_that_names_no_file(bases, tmp_path):
    with pytest.raises(KeyError):
        outcome_of(bases[0], tmp_path, raising(KeyError("shard")))
    with pytest.raises(AssertionError, match="an error that does not name the file"):
        outcome_of(bases[0], tmp_path, raising(ValueError("damaged")))


def test_the_fuzzer_fails_for_a_hang_and_for_a_flood(bases, tmp_path, monkeypatch):
    def hang(folder):
        while True:
            pass

    def flood(folder):
        return bytearray(2 * fuzz.MEMORY)

    with pytest.raises(MemoryError):
        outcome_of(bases[0], tmp_path, flood)
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    with pytest.raises(fuzz.Hang):
        outcome_of(bases[0], tmp_path, hang)


@pytest.mark.slow
def test_ten_thousand_cases(tmp_path):
    """In a process of its own: a crash would show as its return code."""
    command = [sys.executable, "-m", "tests.bridge.fuzz", "--cases", "10000", "--output", str(tmp_path)]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    [file] = tmp_path.glob("fuzz_*.json")
    document = json.loads(file.read_text())
    assert (document["cases"], document["failures"]) == (10_000, 0)
    assert document["outcomes"]["refused"] > 5_000
