"""The programs under test, as functions of their arguments: the commands themselves, and stages of the quickstart."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from craft_opt import CraftConfig
from craft_opt.bridge import anchors_cli, cli, loop
from craft_opt.bridge.anchor_manifest import write_atomically
from craft_opt.bridge.anchors import AnchorSource, build_cache
from craft_opt.bridge.quickstart import teacher
from craft_opt.bridge.quickstart.measure import SkillScore, load_scores, save_scores
from craft_opt.bridge.quickstart.run import DRY_RUN, Quickstart
from craft_opt.bridge.quickstart.settings import QuickstartSettings
from craft_opt.bridge.run_guard import sigterm_as_interrupt, written_to
from craft_opt.bridge.seals import seal
from tests.quickstart.support import make_tiny_dataset, make_tiny_policy, save_tiny_policy


def train(arguments: Sequence[str]) -> int:
    return cli.main(list(arguments))


def anchors(arguments: Sequence[str]) -> int:
    return anchors_cli.main(list(arguments))


def train_from_disk(arguments: Sequence[str]) -> int:
    """As a dataset that is too large for memory is trained on: with data workers."""
    loop.in_memory = lambda dataset: dataset
    return cli.main(list(arguments))


def build_world(arguments: Sequence[str]) -> None:
    """Datasets, teachers and caches as the commands make them, sealed as the quickstart's are."""
    root = Path(arguments[0])
    for seed, name in enumerate(("teacher", "stranger")):
        data = root / f"old-{seed}"
        old = make_tiny_dataset(data, seed=seed)
        seal(data)
        torch.manual_seed(seed)
        seal(save_tiny_policy(root / name, *make_tiny_policy(old)))
        build_cache(
            root / f"cache-{seed}",
            root / name,
            [AnchorSource("local/tiny", data)],
            num_samples=20,
            shard_size=8,
            batch_size=4,
            policy_overrides=["--device=cpu"],
            progress=False,
        )
    make_tiny_dataset(root / "new", tasks=("press the drawer",), seed=5)
    seal(root / "new")
    # Once here, so that no process after it has to import what LeRobot imports late.
    flags = [
        f"--policy.path={root / 'teacher'}",
        "--policy.device=cpu",
        "--dataset.repo_id=local/tiny",
        f"--dataset.root={root / 'new'}",
        f"--output_dir={root.parent / 'warm'}",
        "--batch_size=4",
        "--craft.anchor_batch_size=4",
        f"--craft.anchor_cache_dir={root / 'cache-0'}",
        "--dataset.image_transforms.enable=true",
        "--steps=2",
    ]
    if code := cli.main(flags):
        raise RuntimeError(f"the undisturbed run ended with {code}")


# -- the quickstart, stage by stage ----------------------------------------------------------------------------------


def small_quickstart(output: Path) -> Quickstart:
    """One old skill, one episode of everything."""
    whole = QuickstartSettings()
    settings = replace(whole, **DRY_RUN, old=whole.old[:1], batch_size=4)
    settings = replace(settings, episodes=1)
    return Quickstart(settings, CraftConfig(enabled=False), "none", output)


def as_command(made: Quickstart, work: Callable[[], object]) -> int:
    """What cli.main and Quickstart.run do around the stages."""
    with sigterm_as_interrupt():
        try:
            with written_to(made.output):
                work()
        except (ValueError, OSError) as error:
            return cli.report_error(error)
    return 0


def demonstrations(arguments: Sequence[str]) -> int:
    made = small_quickstart(Path(arguments[0]))
    return as_command(made, made._old_demonstrations)


def demonstrations_locked(arguments: Sequence[str]) -> int:
    """The same as the whole quickstart holds its folder."""
    made = small_quickstart(Path(arguments[0]))
    made._run = made._old_demonstrations
    return as_command(made, made.run)


def teach(arguments: Sequence[str]) -> int:
    """The teacher from kept demonstrations, with a checkpoint after every step."""
    teacher.SAVE_EVERY = 1
    made = small_quickstart(Path(arguments[0]))
    return as_command(made, lambda: made._teacher(made._old_demonstrations()))


def report(arguments: Sequence[str]) -> int:
    """Scores kept, then the last stage: picture, table, result."""
    made = small_quickstart(Path(arguments[0]))
    scores = [SkillScore(skill.name, 1, 1, 0.5) for skill in made.settings.skills]
    file = made.kept.folder / "before-scores"

    def work() -> None:
        made.kept.folder.mkdir(parents=True, exist_ok=True)
        folder = made._run_folder()
        metrics = folder / "training" / "metrics.jsonl"
        if not metrics.is_file():
            metrics.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps({"step": k, "loss": 1.0 / k}) for k in range(1, 4)]
            write_atomically(metrics, "".join(f"{line}\n" for line in lines))
        if not made._have(file):
            save_scores(file, scores)
        made._report(folder, load_scores(file), scores, 1.0)

    return as_command(made, work)


def prepare(arguments: Sequence[str]) -> int:
    """Everything that is kept, taken or made."""
    teacher.SAVE_EVERY = 1
    made = small_quickstart(Path(arguments[0]))
    return as_command(made, made.prepare)


# -- what is not finite ----------------------------------------------------------------------------------------------


def poisoned(arguments: Sequence[str]) -> int:
    """Train with NaN or inf in places: ``<report file> <JSON: step → [where, value]> <flags of train.py>``.

    Writes for every poisoned step what the step changed that it must not change.
    """
    file, plan, *flags = arguments
    poison = {int(step): what for step, what in json.loads(plan).items()}
    step_of, found = loop.train_step, {}

    def step(parts, batches, precision, *, step, data_s):
        if step not in poison:
            return step_of(parts, batches, precision, step=step, data_s=data_s)
        where, value = poison[step]
        before = _state(parts)
        undo = _poison(parts, where, float(value))
        result = step_of(parts, batches, precision, step=step, data_s=data_s)
        undo()
        after = _state(parts)
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        found[step] = {"changed": changed, "skipped": bool(result.metrics.skipped), "measured": result.measured}
        Path(file).write_text(json.dumps(found))
        return result

    loop.train_step = step
    return cli.main(flags)


def _state(parts) -> dict[str, torch.Tensor]:
    """Parameters, moments, λ and ε's clock; NaN as a number, so that it equals itself."""
    found = {f"parameter {name}": value for name, value in parts.policy.named_parameters()}
    for number, state in parts.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if name == "craft_dual":
                found |= {f"dual {key}": v for key, v in value.items() if key != "skipped"}
            else:
                found[f"moment {number} {name}"] = value
    return {name: torch.nan_to_num(torch.as_tensor(v).detach().clone().double(), nan=-7.0) for name, v in found.items()}


def _poison(parts, where: str, value: float) -> Callable[[], None]:
    policy = parts.policy
    if where == "loss":
        handle = policy.register_forward_hook(lambda _module, _inputs, out: (out[0] * value, *out[1:]))
        return handle.remove
    if where == "gradient":
        parameter = next(p for p in policy.parameters() if p.requires_grad)
        handle = parameter.register_hook(lambda grad: torch.full_like(grad, value))
        return handle.remove
    assert where == "anchors"
    cache = parts.term.terms[0].cache
    gather = cache.gather

    def bad(indices):
        batch = gather(indices)
        return replace(batch, features={k: torch.full_like(v, value) for k, v in batch.features.items()})

    cache.gather = bad
    return lambda: setattr(cache, "gather", gather)


# -- a long run ------------------------------------------------------------------------------------------------------


def soak(arguments: Sequence[str]) -> int:
    """A part of a long run: ``<file> <seed> <last step> <JSON: poisoned steps> <flags>``; notes memory and handles.

    After the last step Ctrl-C comes, or kill -9 where its number is negative.
    """
    file, seed, last, plan, *flags = arguments
    generator, poison = random.Random(int(seed)), set(json.loads(plan))
    step_of, saves = loop.train_step, loop.should_save_checkpoint
    notes = Path(file).open("a", encoding="utf-8")  # noqa: SIM115  open as long as the run is
    page = os.sysconf("SC_PAGE_SIZE")

    def step(parts, batches, precision, *, step, data_s):
        if step > abs(int(last)):
            os.kill(os.getpid(), signal.SIGINT if int(last) > 0 else signal.SIGKILL)
        undo = _poison(parts, "loss", float("nan")) if step in poison else None
        result = step_of(parts, batches, precision, step=step, data_s=data_s)
        if undo is not None:
            undo()
        if step % 10 == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
            handles = len(os.listdir("/proc/self/fd"))
            threads = len(os.listdir("/proc/self/task"))
            row = {"step": step, "resident": resident, "handles": handles, "threads": threads}
            print(json.dumps(row), file=notes, flush=True)
        return result

    loop.train_step = step
    loop.should_save_checkpoint = lambda step, freq, steps: generator.random() < 0.01 or saves(step, freq, steps)
    return cli.main(flags)
