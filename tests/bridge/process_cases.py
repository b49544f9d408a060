"""What the processes of tests/bridge/test_processes.py run."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from lerobot.configs.default import PeftConfig

from craft_opt.bridge.config import parse_config
from craft_opt.bridge.loop import prepare, run_steps
from tests.bridge.conftest import World

SHARDS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "GemmaDecoderLayer",
}
NUMBERS = ("loss", "grad_norm", "retention_loss", "lam_before", "lam", "epsilon", "conflict", "dot", "cos", "skipped")
LORA = {"target_modules": r".*language_model.*\.(q_proj|v_proj|down_proj)", "r": 4, "lora_alpha": 8}


def lora():
    return PeftConfig(**LORA)


@contextmanager
def launched(rank, world, **environment):
    """The environment of a launcher."""
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    said |= environment
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in said.items()})
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def whole(policy):
    """Everything that trains, as one vector, gathered where it is sharded."""
    trained = [p.detach() for p in policy.parameters() if p.requires_grad]
    return torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).reshape(-1).float() for p in trained])


def finished(run):
    """Do the run's steps; what they said and what they left."""
    records = []
    summary = run_steps(run, on_step=records.append, progress=False)
    return {
        "seen": [[float("nan") if (x := getattr(r, name)) is None else float(x) for name in NUMBERS] for r in records],
        "params": whole(run.ranks.unwrap(run.parts.policy)),
        "positions": list(run.term.positions) if run.term is not None else [],
        "steps": summary.steps,
        "skipped": summary.skipped_steps,
    }


def configured(world_folder, output, *, cache="cache", adapters=False, **settings):
    root = Path(world_folder)
    world = World(root / "old", root / "new", root / "teacher", root / "cache")
    cfg = world.config(Path(output), cache=root / cache, **({"peft": lora()} if adapters else {}), **settings)
    cfg._arguments.append("--policy.optimizer_lr=1e-2")
    return cfg


def trained(rank, world, folder, *, world_folder, output, shards=False, environment=None, **settings):
    """A run of the tiny policy in all processes."""
    with launched(rank, world, **(SHARDS if shards else {}), **(environment or {})):
        return finished(prepare(configured(world_folder, output, **settings)))


def resumed(rank, world, folder, *, source, step, shards=False, flags=()):
    """Go on from a checkpoint of a run, in a copy of its folder."""
    copy = Path(folder) / f"{Path(source).name}-resumed-{world}{'-shards' if shards else ''}"
    if rank == 0:
        shutil.copytree(source, copy, symlinks=True)
    if world > 1:
        dist.barrier()
    config_file = copy / "checkpoints" / step / "pretrained_model" / "train_config.json"
    with launched(rank, world, **(SHARDS if shards else {})):
        return finished(prepare(parse_config([f"--config_path={config_file}", "--resume=true", *flags])))


def failed(rank, world, folder, *, world_folder, output):
    """The cache of the last process alone is not there."""
    with launched(rank, world):
        try:
            prepare(configured(world_folder, output, cache="cache" if rank < world - 1 else "nowhere"))
        except (ValueError, OSError) as error:
            return {"type": type(error).__name__, "text": str(error)}
    return {"type": "", "text": ""}


def spoiled(rank, world, folder, *, world_folder, output, shards=False):
    """The task loss of the last process is not finite at the second step."""
    with launched(rank, world, **(SHARDS if shards else {})):
        run = prepare(configured(world_folder, output, batch_size=2))
        calls = []

        def poison(module, args, output):
            calls.append(1)
            return (output[0] * float("nan"), output[1]) if len(calls) == 2 and rank == world - 1 else output

        run.parts.policy.register_forward_hook(poison)
        return finished(run)
