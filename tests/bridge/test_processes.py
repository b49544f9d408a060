"""train.py in several processes: what one process does on the global batch, whoever holds which part of the policy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from craft_opt.bridge import cli
from craft_opt.bridge.processes import refuse_other_engines
from tests.bridge import process_cases as cases
from tests.bridge.test_retention_term import make_cache
from tests.support.asserts import assert_norm_close, assert_same_bits
from tests.support.worlds import run_world

ROOT = Path(__file__).parents[2]
STEPS = 6
# Each process' part of what one process would take.
HALF = {"batch_size": 2, "craft": {"anchor_batch_size": 2}}
TOKENS = {"retention_mode": "token_ce"}


def settings(**changes):
    craft = changes.pop("craft", {})
    common = {"steps": STEPS, **changes}
    return {"two": common | HALF | {"craft": HALF["craft"] | craft}, "one": common | {"craft": craft}}


VARIANTS = {
    "hidden": settings(),
    "hidden every step": settings(craft={"retention_freq": 1, "conflict_threshold": 0.0, "initial_lambda": 5.0}),
    "reuse": settings(craft={"retention_freq": 3, "off_steps": "reuse"}),
    "token_ce": settings(cache="tokens", craft=TOKENS),
    "accumulated": settings(gradient_accumulation_steps=2),
    "lora": settings(adapters=True, craft={"retention_freq": 1}),
    "lora, teacher within": settings(adapters=True, craft={"retention_freq": 1, "teacher": "adapters_off"}),
}
SHARDED = ("hidden every step", "reuse", "token_ce", "accumulated", "lora")
COMPARED = [(name, engine) for name in VARIANTS for engine in ("ddp", "fsdp") if engine == "ddp" or name in SHARDED]


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    make_cache(world, world.cache.with_name("tokens"), kind="token_ce", top_k=4, token_source="teacher")
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def alone(world, folder):
    """Every variant in this process; a checkpoint in the middle of the first."""
    found = {}
    for name, variant in VARIANTS.items():
        saving = {"save_checkpoint": True, "save_freq": 3} if name == "hidden" else {}
        run = cases.prepare(cases.configured(world.old.parent, folder / f"one {name}", **variant["one"], **saving))
        found[name] = cases.finished(run)
    return found


@pytest.fixture(scope="module")
def two(world, folder, alone):
    own = {"world_folder": str(world.old.parent)}
    planned = {
        f"{engine} {name}": (
            "trained",
            own | VARIANTS[name]["two"] | {"output": str(folder / f"{engine} {name}"), "shards": engine == "fsdp"},
        )
        for name, engine in COMPARED
    }
    planned["fsdp reuse"][1].update(save_checkpoint=True, save_freq=3)
    half = {"output": str(folder / "bf16"), "shards": True, "environment": {"ACCELERATE_MIXED_PRECISION": "bf16"}}
    planned["fsdp bf16"] = ("trained", own | VARIANTS["hidden every step"]["two"] | half)
    planned["ddp resumed"] = ("resumed", from_one(folder))
    planned["fsdp resumed"] = ("resumed", from_one(folder) | {"shards": True})
    planned["failed"] = ("failed", own | {"output": str(folder / "failed")})
    for engine in ("ddp", "fsdp"):
        spoiled = {"output": str(folder / f"spoiled {engine}"), "shards": engine == "fsdp"}
        planned[f"spoiled {engine}"] = ("spoiled", own | spoiled)
    return run_world(2, cases.__name__, planned, folder)


def from_one(folder):
    return {
        "source": str(folder / "one hidden"),
        "step": "000003",
        "flags": ["--batch_size=2", "--craft.anchor_batch_size=2"],
    }


def assert_alike(found, name):
    first = found[0][name]
    for other in found[1:]:
        assert_same_bits(other[name]["params"], first["params"], name)
        assert repr(other[name]["seen"]) == repr(first["seen"])
        assert other[name]["positions"] == first["positions"]
    return first


def assert_equal_runs(found, expected, start=0):
    ours = torch.tensor(found["seen"], dtype=torch.float64)
    theirs = torch.tensor(expected["seen"], dtype=torch.float64)[start:]
    # Other orders of summation in fp32, through the model and six steps of AdamW.
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5, equal_nan=True)
    for exact in ("epsilon", "conflict", "skipped"):
        column = cases.NUMBERS.index(exact)
        assert repr(ours[:, column].tolist()) == repr(theirs[:, column].tolist())
    assert_norm_close(found["params"], expected["params"], 1e-4, "parameters")
    assert found["positions"] == expected["positions"]


@pytest.mark.parametrize(("name", "engine"), COMPARED)
def test_two_processes_equal_one(two, alone, name, engine):
    assert_equal_runs(assert_alike(two, f"{engine} {name}"), alone[name])


def test_shards_computed_in_bf16_stay_near_fp32(two, alone):
    first, exact = assert_alike(two, "fsdp bf16"), alone["hidden every step"]
    assert first["steps"] == STEPS and first["skipped"] == 0
    # Losses, not parameters: AdamW takes a step of full size where the sign of a tiny gradient was rounded away.
    ours, theirs = (torch.tensor([row[0] for row in run["seen"]]) for run in (first, exact))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=0)
    assert ours[0] != theirs[0]
    # Losses leave the model in fp32: bf16 has 8 bits, and these would then be multiples of 2^-7 or so.
    assert any(row[0] != torch.tensor(row[0]).bfloat16().item() for row in first["seen"])


def test_the_runs_compared_measured_conflicts_and_moved(alone):
    conflicts = [row[cases.NUMBERS.index("conflict")] for row in alone["hidden every step"]["seen"]]
    assert {0.0, 1.0} <= set(conflicts)
    losses = [row[0] for row in alone["hidden"]["seen"]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_checkpoint_of_one_process_goes_on_in_two(two, alone, engine):
    assert_equal_runs(assert_alike(two, f"{engine} resumed"), alone["hidden"], start=3)


def test_a_checkpoint_of_shards_goes_on_in_one_process(two, alone, folder):
    flags = ("--batch_size=4", "--craft.anchor_batch_size=4")
    found = cases.resumed(0, 1, folder, source=folder / "fsdp reuse", step="000003", flags=flags)
    assert_equal_runs(found, alone["reuse"], start=3)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_in_one_process_skips_the_step_in_all(two, engine):
    first = assert_alike(two, f"spoiled {engine}")
    assert [row[cases.NUMBERS.index("skipped")] for row in first["seen"]] == [0.0, 1.0, 0.0]
    assert first["skipped"] == 1 and torch.isfinite(first["params"]).all()


def test_an_error_of_one_process_ends_all_of_them(two):
    first, second = two[0]["failed"], two[1]["failed"]
    assert first["type"] == "ValueError" and first["text"].startswith("process 1 of 2: ")
    assert second["type"] == "FileNotFoundError" and second["text"] in first["text"]


def test_another_global_batch_is_refused_on_resume(alone, folder):
    with pytest.raises(ValueError, match=r"--batch_size=4, got --batch_size=3;.* resume with --batch_size=4"):
        cases.resumed(0, 1, folder, source=folder / "one hidden", step="000003", flags=["--batch_size=3"])


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "tensor, context or pipeline parallelism"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1 is not supported.*--fsdp_version 2"),
    ],
)
def test_other_engines_are_refused(monkeypatch, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        refuse_other_engines()


def test_the_quickstart_and_lerobots_loop_run_in_one_process(monkeypatch, capsys, world, tmp_path):
    from craft_opt.bridge import lerobot_train

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["--retention-mode", "hidden"]) == 2
    assert "the quickstart runs in one process, and the launcher started 2" in capsys.readouterr().err
    assert lerobot_train.main([*world.flags(tmp_path / "out"), "--retention-mode", "hidden"]) == 2
    assert "accelerate launch train.py" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli, "_TIME_TO_TELL", 0.0)
    assert cli.main(["--retention-mode", "hidden"]) == 2
    assert capsys.readouterr().err == ""


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    # accelerate has no other way to start several processes on a CPU without mpirun.
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--mixed_precision=no"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_start_train_py(world, tmp_path, name):
    """The command line: one log, one metrics file, one checkpoint; and once more from that checkpoint."""
    launcher = [sys.executable, "-m", *LAUNCHERS[name], "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    flags = [*world.flags(tmp_path / "out"), "--retention-mode", "hidden", "--steps=4"]
    done = subprocess.run([*launcher, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("CRaFT enabled: True") == 1 and done.stdout.count("Step 4/4") == 1
    assert "Processes: 2 (replicas, DDP)" in done.stdout
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    config_file = tmp_path / "out" / "checkpoints" / "last" / "pretrained_model" / "train_config.json"
    again = [f"--config_path={config_file}", "--resume=true", "--steps=6"]
    done = subprocess.run([*launcher, *again], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "after step 4" in done.stdout and done.stdout.count("Step 6/6") == 1
    once_more = [*launcher, *flags]
    done = subprocess.run(once_more, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and "is there already" in done.stderr
    assert "TerminatedError" not in done.stderr


@pytest.mark.slow
def test_replicas_and_shards_are_bitwise_equal_after_200_steps(world, tmp_path):
    planned = {
        engine: (
            "trained",
            {
                "world_folder": str(world.old.parent),
                "output": str(tmp_path / engine),
                "shards": engine == "fsdp",
                "steps": 200,
                **HALF,
            },
        )
        for engine in ("ddp", "fsdp")
    }
    found = run_world(4, cases.__name__, planned, tmp_path)
    for engine in planned:
        assert len(assert_alike(found, engine)["seen"]) == 200
