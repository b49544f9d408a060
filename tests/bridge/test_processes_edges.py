"""Several processes where it is easy to go wrong: ends of epochs, ignored settings, late errors, four of them."""

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from craft_opt.bridge.processes import Ranks, refuse_other_engines
from tests.bridge import process_cases as cases
from tests.bridge.test_processes import assert_alike, assert_equal_runs
from tests.support.worlds import run_world

ROOT = Path(__file__).parents[2]
EVERY_STEP = {"retention_freq": 1, "conflict_threshold": 0.0, "initial_lambda": 5.0}


def shares(order, batch_size, count):
    return [list(Ranks(rank, count).shares(order, batch_size)) for rank in range(count)]


@pytest.mark.parametrize(("frames", "count"), [(24, 2), (24, 3), (22, 2), (17, 4), (9, 4), (8, 4)])
def test_shares_are_the_batches_of_one_process(frames, count):
    found = shares(range(frames), 2, count)
    whole = list(BatchSampler(range(frames), 2 * count, drop_last=False))
    together = [list(chain.from_iterable(parts)) for parts in zip(*found, strict=True)]
    assert [batch[: len(expected)] for batch, expected in zip(together, whole, strict=True)] == whole
    for batch, expected in zip(together, whole, strict=True):
        assert len(batch) == 2 * count and set(batch) == set(expected)


def test_shares_go_on_in_the_middle_of_an_epoch():
    for start in (8, 16):
        for rank, uninterrupted in enumerate(shares(range(22), 4, 2)):
            assert shares(range(start, 22), 4, 2)[rank] == uninterrupted[start // 8 :]


def test_where_nothing_is_left_over_shares_are_accelerates():
    for rank, found in enumerate(shares(range(24), 4, 2)):
        assert found == list(BatchSamplerShard(BatchSampler(range(24), 4, drop_last=False), 2, rank))


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16 is not supported.*--mixed_precision bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "fp8 is not supported"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "--gradient_accumulation_steps to train.py"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--policy.compile_model=true"),
    ],
)
def test_settings_that_nothing_would_read_are_refused(monkeypatch, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        refuse_other_engines()


def test_what_accelerate_launch_says_by_default_is_not_refused(monkeypatch):
    said = {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "GRADIENT_ACCUMULATION_STEPS": "1"}
    for name, value in said.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    refuse_other_engines()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    refuse_other_engines()


def settings(world, output, count, **changes):
    """What each of several processes is told, where one takes batches of four."""
    own = {"world_folder": str(world.old.parent), "output": str(output), "steps": 4, "batch_size": 4 // count}
    craft = EVERY_STEP | {"anchor_batch_size": 4 // count} | changes.pop("craft", {})
    return own | {"craft": craft} | changes


@pytest.mark.slow
def test_four_processes_equal_one(world, tmp_path):
    planned = {
        engine: ("trained", settings(world, tmp_path / engine, 4, shards=engine == "fsdp"))
        for engine in ("ddp", "fsdp")
    }
    alone = cases.finished(cases.prepare(cases.configured(**one(world, tmp_path / "one"))))
    found = run_world(4, cases.__name__, planned, tmp_path)
    for engine in planned:
        assert_equal_runs(assert_alike(found, engine), alone)


@pytest.mark.slow
def test_adapters_of_shards_are_saved_as_those_of_one_process(world, tmp_path):
    """FSDP2 with PEFT: the teacher within the policy, and a checkpoint that one process goes on from."""
    within = {"adapters": True, "craft": {"teacher": "adapters_off"}}
    saving = {"save_checkpoint": True, "save_freq": 2}
    planned = {
        "within": ("trained", settings(world, tmp_path / "within", 2, shards=True, **within)),
        "saved": ("trained", settings(world, tmp_path / "saved", 2, shards=True, adapters=True, **saving)),
        "ddp bf16": (
            "trained",
            settings(world, tmp_path / "bf16", 2, environment={"ACCELERATE_MIXED_PRECISION": "bf16"}),
        ),
    }
    found = run_world(2, cases.__name__, planned, tmp_path)
    alone = {
        name: cases.finished(cases.prepare(cases.configured(**one(world, tmp_path / f"one {name}", **changes))))
        for name, changes in (("within", within), ("saved", {"adapters": True}), ("ddp bf16", {}))
    }
    for name in ("within", "saved"):
        assert_equal_runs(assert_alike(found, name), alone[name])
    flags = ["--batch_size=4", "--craft.anchor_batch_size=4"]
    again = cases.resumed(0, 1, tmp_path, source=tmp_path / "saved", step="000002", flags=flags)
    assert_equal_runs(again, alone["saved"], start=2)
    # bf16 reaches the retention loss as well: before the first step its drift is no longer the rounding of fp32.
    column = cases.NUMBERS.index("retention_loss")
    half = assert_alike(found, "ddp bf16")["seen"][0][column]
    assert half > 10 * alone["ddp bf16"]["seen"][0][column] >= 0
    assert half < 1e-2


def one(world, output, **changes):
    """The same in one process."""
    told = settings(world, output, 1, **changes)
    return {**told, "output": output}


@pytest.mark.slow
def test_a_late_error_of_another_process_is_told(world, tmp_path):
    """A data worker of the second process dies after some steps: the message names the process and how to go on."""
    program = (
        "import os, sys\n"
        "from craft_opt.bridge import cli, loop\n"
        "step, calls = loop.train_step, []\n"
        "def failing(*given, **named):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2 and os.environ['RANK'] == '1':\n"
        "        raise ChildProcessError('a data worker died')\n"
        "    return step(*given, **named)\n"
        "loop.train_step = failing\n"
        "sys.exit(cli.main())\n"
    )
    file = tmp_path / "program.py"
    file.write_text(program)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(file)]
    flags = [*world.flags(tmp_path / "out"), "--retention-mode", "hidden", "--steps=3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launcher, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert done.stderr.count("error in process 1: a data worker died; see whether the memory ran out") == 1
    assert done.stdout.count("Step 1/3") == 1
