"""LeRobot's own loop: with craft_adamw as its optimizer, and with retention attached."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from lerobot.configs.default import DatasetConfig, PeftConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.optim import AdamWConfig
from lerobot.optim.schedulers import CosineDecayWithWarmupSchedulerConfig
from lerobot.scripts import lerobot_train as lerobots
from safetensors.torch import load_file

from craft_opt import CraftOptimizer
from craft_opt.bridge import lerobot_train, loop
from craft_opt.bridge.config import CraftAdamWConfig, resume_config
from craft_opt.bridge.loop import prepare
from craft_opt.bridge.loop import train as train_explicitly
from craft_opt.bridge.policies import read_policy_config
from tests.support.asserts import assert_same_bits

COMPARED = ("step", "loss", "lr", "grad_norm", "retention_loss", "lambda_before", "lambda", "epsilon", "dot", "cos")
WEIGHTS = Path("pretrained_model", "model.safetensors")


@pytest.fixture(autouse=True)
def accelerate_starts_afresh():
    """Accelerate keeps the first run's precision for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def records_of(output_dir):
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name in COMPARED} for line in lines]


def assert_same_weights(found, expected, name="model.safetensors"):
    found, expected = (load_file(folder / "pretrained_model" / name) for folder in (found, expected))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(found[name], tensor, name)


# -- retention attached ----------------------------------------------------------------------------------------------


def run_config(world, output_dir, **settings):
    """Seven steps of four over 48 frames: with a batch of 8 that would be more than an epoch, which counts too."""
    given = {"steps": 7, "batch_size": 8, "save_checkpoint": True, "save_freq": 100, "seed": 3, "num_workers": 0}
    return world.config(output_dir, **(given | settings))


def test_the_attached_loop_is_the_explicit_loop(world, tmp_path):
    """Every number of every step and every bit of the result; clip, scheduler, λ and a second epoch included."""
    explicit = train_explicitly(run_config(world, tmp_path / "explicit"), progress=False)
    attached = lerobot_train.train(run_config(world, tmp_path / "attached"))
    records = records_of(tmp_path / "attached")
    assert records == records_of(tmp_path / "explicit")
    assert [("retention_loss" in record) for record in records] == [True, False] * 3 + [True]
    assert records[-1]["lambda"] != 1.0
    assert_same_weights(attached.checkpoint, explicit.checkpoint)


@pytest.mark.parametrize("what", ["adapters", "gradient checkpointing", "compiled", "reuse", "none"])
def test_the_attached_loop_is_the_explicit_loop_also_with(world, tmp_path, what):
    """What PEFT, checkpointing and torch.compile do to the policy, and accelerate after them; other settings."""
    craft = {"reuse": {"off_steps": "reuse"}, "none": {"enabled": False, "anchor_cache_dir": ""}}.get(what, {})

    def config(output_dir):
        cfg = run_config(world, output_dir, steps=4, craft=craft)
        if what == "adapters":
            cfg.peft = PeftConfig(target_modules=r".*language_model.*\.(q_proj|down_proj)", r=4, lora_alpha=8)
        elif what == "gradient checkpointing":
            cfg._arguments.append("--policy.gradient_checkpointing=true")
        return cfg

    def compiled(run):
        if what == "compiled":
            run.parts.policy.model.forward = torch.compile(run.parts.policy.model.forward, backend="eager")
        return run

    with pytest.MonkeyPatch.context() as patched:
        for module in (loop, lerobot_train):
            patched.setattr(module, "prepare", lambda cfg: compiled(prepare(cfg)))
        explicit = train_explicitly(config(tmp_path / "explicit"), progress=False)
        attached = lerobot_train.train(config(tmp_path / "attached"))
    assert records_of(tmp_path / "attached") == records_of(tmp_path / "explicit")
    name = "adapter_model.safetensors" if what == "adapters" else "model.safetensors"
    assert_same_weights(attached.checkpoint, explicit.checkpoint, name)


def test_lerobots_clip_is_off_and_the_optimizers_is_on(world, tmp_path):
    """A clip that always acts: LeRobot's own would act on the task gradient alone, before the merge."""

    def config(output_dir):
        cfg = run_config(world, output_dir)
        cfg._arguments.append("--optimizer.grad_clip_norm=0.01")
        cfg.optimizer = CraftAdamWConfig(grad_clip_norm=0.01)
        return cfg

    explicit = train_explicitly(config(tmp_path / "explicit"), progress=False)
    attached = lerobot_train.train(config(tmp_path / "attached"))
    assert all(record["grad_norm"] > 0.01 for record in records_of(tmp_path / "attached"))
    assert_same_weights(attached.checkpoint, explicit.checkpoint)
    saved = json.loads((attached.checkpoint / "pretrained_model" / "train_config.json").read_text())
    assert saved["optimizer"]["grad_clip_norm"] == 0.01, "and a resumed run has it too"


@pytest.mark.parametrize("off_steps", ["skip", "reuse"])
def test_resumed_is_uninterrupted(world, tmp_path, off_steps):
    """Between two measuring steps: a reused gradient is in the checkpoint."""
    craft = {"off_steps": off_steps}
    whole = lerobot_train.train(run_config(world, tmp_path / "whole", craft=craft))
    first = run_config(world, tmp_path / "halves", save_freq=3, craft=craft)
    stop = RuntimeError("killed")

    def kill(record):
        if record.step == 5:
            raise stop

    with pytest.raises(RuntimeError, match="killed"):
        lerobot_train.train(first, on_step=kill)
    checkpoint = tmp_path / "halves" / "checkpoints" / "000003"
    resumed = lerobot_train.train(resume_config(checkpoint))
    assert records_of(tmp_path / "halves") == records_of(tmp_path / "whole")
    assert_same_weights(resumed.checkpoint, whole.checkpoint)


def test_the_two_loops_resume_each_other(world, tmp_path):
    whole = train_explicitly(run_config(world, tmp_path / "whole"), progress=False)
    train_explicitly(run_config(world, tmp_path / "halves", save_freq=4), progress=False)
    resumed = lerobot_train.train(resume_config(tmp_path / "halves" / "checkpoints" / "000004"))
    assert_same_weights(resumed.checkpoint, whole.checkpoint)


def test_a_checkpoint_without_crafts_state_is_no_checkpoint(world, tmp_path):
    done = lerobot_train.train(run_config(world, tmp_path / "out", save_freq=4)).checkpoint.parent / "000004"
    (done / "training_state" / "craft_state.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"craft_state.safetensors is missing, so λ, ε's clock"):
        lerobot_train.train(resume_config(done))


def test_lerobot_gets_its_own_parts_back(world, tmp_path):
    names = ("make_policy", "update_policy", "save_checkpoint", "load_training_state")
    before = [getattr(lerobots, name) for name in names]
    cfg = run_config(world, tmp_path / "out", steps=1, save_checkpoint=False)
    lerobot_train.train(cfg)
    assert [getattr(lerobots, name) for name in names] == before
    assert "validate" not in vars(cfg)


def test_what_the_loop_has_not_is_refused(world, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--gradient_accumulation_steps=2: LeRobot's own loop steps after every"):
        lerobot_train.train(run_config(world, tmp_path / "out", gradient_accumulation_steps=2))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match=r"ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4: LeRobot's own loop"):
        lerobot_train.train(run_config(world, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_it_fails_closed_as_train_py_does(world, tmp_path, capsys):
    argv = [*world.flags(tmp_path / "out"), "--steps=2", "--craft.anchor_cache_dir=/nowhere"]
    argv = [flag for flag in argv if flag != f"--craft.anchor_cache_dir={world.cache}"]
    assert lerobot_train.main(argv) == 2
    assert "error: " in (shown := capsys.readouterr().err)
    assert "/nowhere" in shown
    assert lerobot_train.main(["--retention-mode", "hidden"]) == 2
    assert "LeRobot's loop trains on your own data" in capsys.readouterr().err


def test_the_command_line(world, tmp_path):
    """A process of its own, as a user starts it: LeRobot's lines, CRaFT's lines, the files."""
    flags = [*world.flags(tmp_path / "out"), "--steps=2", "--num_workers=0", "--save_checkpoint=false"]
    command = [sys.executable, "-m", "craft_opt.bridge.lerobot_train", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert "CRaFT enabled: True" in done.stdout
    assert "Step 2/2 | loss=" in done.stdout
    assert "End of training" in done.stderr + done.stdout
    assert len(records_of(tmp_path / "out")) == 2


# -- craft_adamw in LeRobot's loop as it is --------------------------------------------------------------------------


def lerobot_config(world, output_dir, optimizer):
    policy = read_policy_config(world.teacher, ("--device=cpu", "--push_to_hub=false"))
    scheduler = CosineDecayWithWarmupSchedulerConfig(
        num_warmup_steps=2, num_decay_steps=7, peak_lr=optimizer.lr, decay_lr=optimizer.lr / 10
    )
    return TrainPipelineConfig(
        dataset=DatasetConfig("local/tiny", root=str(world.new)),
        policy=policy,
        output_dir=output_dir,
        steps=7,
        batch_size=8,
        num_workers=0,
        save_freq=7,
        seed=3,
        use_policy_training_preset=False,
        optimizer=optimizer,
        scheduler=scheduler,
    )


# At 0.3 the clip acts at every step (the tiny policy's gradient norm is above 1); at 1e6 at none.
@pytest.mark.parametrize("clip", [0.3, 1e6])
def test_lerobots_loop_trains_with_craft_adamw_as_with_adamw(world, tmp_path, clip, monkeypatch):
    """LeRobot clips before step() and step() clips once more, which changes rounding only."""
    monkeypatch.setattr(sys, "argv", ["lerobot-train"])
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01, "grad_clip_norm": clip}
    for name, optimizer in (("adamw", AdamWConfig(**settings)), ("craft", CraftAdamWConfig(**settings))):
        lerobots.train.__wrapped__(lerobot_config(world, tmp_path / name, optimizer))
    found, expected = (load_file(tmp_path / name / "checkpoints/last" / WEIGHTS) for name in ("craft", "adamw"))
    start = load_file(world.teacher / "model.safetensors")
    moved = max((expected[name] - start[name]).abs().max().item() for name in expected)
    assert moved > 1e-3
    # A key's bias shifts all scores of a query alike, which softmax does not see: its gradient is nothing but rounding.
    compared = [name for name in expected if not name.endswith("k_proj.bias")]
    assert len(compared) > 0.9 * len(expected)
    # Seven updates of at most 1e-3. A gradient that is rounded by 2^-23 of the largest in its tensor moves an update by
    # as much only where it is far above AdamW's eps: a thousandth of one update bounds the rest.
    for name in compared:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=f"{name} differs")


def test_lerobot_train_finds_craft_adamw_by_its_plugin_flag(world, tmp_path):
    """The command of docs/integrations.md, in a process that imports nothing of CRaFT by itself."""
    command = [
        *(sys.executable, "-m", "lerobot.scripts.lerobot_train", "--optimizer.discover_packages_path=craft_opt.bridge"),
        *("--optimizer.type=craft_adamw", "--optimizer.lr=1e-4", "--use_policy_training_preset=false"),
        *("--scheduler.type=cosine_decay_with_warmup", "--scheduler.num_warmup_steps=1"),
        *("--scheduler.num_decay_steps=2", "--scheduler.peak_lr=1e-4", "--scheduler.decay_lr=1e-5"),
        *(f"--policy.path={world.teacher}", "--policy.device=cpu", "--policy.push_to_hub=false"),
        *("--dataset.repo_id=local/tiny", f"--dataset.root={world.new}", f"--output_dir={tmp_path / 'out'}"),
        *("--steps=2", "--batch_size=4", "--num_workers=0", "--save_freq=2"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    state = load_file(tmp_path / "out/checkpoints/last/training_state/optimizer_state.safetensors")
    assert any("craft_dual" in name for name in state), "CRaFT's optimizer, not AdamW"
    assert isinstance(CraftAdamWConfig().build([torch.nn.Parameter(torch.ones(2))]), CraftOptimizer)
