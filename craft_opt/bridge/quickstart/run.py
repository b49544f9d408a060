"""The embedded quickstart: demonstrations, teacher, anchors, fine-tuning, measurement; kept and gone on with."""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from craft_opt import CraftConfig
from craft_opt.bridge.anchor_manifest import VERSION, write_atomically
from craft_opt.bridge.anchors import AnchorSource, build_cache
from craft_opt.bridge.checkpoint import check_whole, latest_checkpoint
from craft_opt.bridge.config import fine_tune_config, resume_config
from craft_opt.bridge.logs import say, set_up_logging
from craft_opt.bridge.loop import train
from craft_opt.bridge.quickstart.figures import picture, table
from craft_opt.bridge.quickstart.measure import SkillScore, load_scores, measure, save_scores
from craft_opt.bridge.quickstart.settings import (
    HELD_OUT_SEED,
    NEW_SEED,
    OLD_SEED,
    ROLLOUT_SEED,
    QuickstartSettings,
    fingerprint,
)
from craft_opt.bridge.quickstart.simulation import Skill
from craft_opt.bridge.quickstart.skills import WORKERS, collect
from craft_opt.bridge.quickstart.teacher import make_teacher
from craft_opt.bridge.run_guard import LOCK_FILE, locked, written_to
from craft_opt.bridge.seals import check_seal

DEFAULT_OUTPUT = Path("outputs/quickstart")
OLD_REPO, NEW_REPO, HELD_OUT_REPO = "craft/old-skills", "craft/new-skill", "craft/held-out"
# What the quickstart sets unless the command line does: anchors are cheap at this size, so retention runs every step.
CRAFT_DEFAULTS: dict[str, Any] = {"anchor_batch_size": 32, "retention_freq": 1}
SETTINGS_FILE, RESULT_FILE = "settings.json", "result.json"
DRY_RUN: dict[str, Any] = {
    "episodes": 2,
    "held_out_episodes": 1,
    "teacher_steps": 3,
    "steps": 3,
    "anchors": 16,
    "rollouts": 1,
}
STAGES = 7


@dataclass(frozen=True)
class Kept:
    """Folder of what is kept for the next run; every name ends in a fingerprint of how it was made."""

    folder: Path

    def path(self, name: str, **made_with: Any) -> Path:
        """Where a thing made so belongs."""
        return self.folder / f"{name}-{fingerprint(name=name, **made_with)}"


def run_quickstart(
    *,
    retention_mode: str,
    craft_overrides: Mapping[str, Any],
    seed: int | None = None,
    output_dir: Path | None = None,
    steps: int | None = None,
    dry_run: bool = False,
    settings: QuickstartSettings | None = None,
) -> int:
    """Run the quickstart and print its table.

    Args:
        retention_mode: ``hidden``, ``token_ce`` or ``none``.
        craft_overrides: Settings of the method that the command line gave.
        seed: Seed of everything; None takes 0.
        output_dir: Folder of all that is written; None takes ``outputs/quickstart``.
        steps: Steps of fine-tuning; None takes the default.
        dry_run: Every part once, as small as it gets; nothing can be read from the figures.
        settings: Other sizes, for tests.

    Returns:
        Exit code 0.

    Raises:
        ValueError: A setting does not fit.
    """
    set_up_logging()
    chosen = settings or QuickstartSettings()
    if dry_run:
        chosen = replace(chosen, **DRY_RUN)
    if seed is not None:
        chosen = replace(chosen, seed=seed)
    if steps is not None:
        chosen = replace(chosen, steps=steps)
    values = {**CRAFT_DEFAULTS, "enabled": retention_mode != "none", **craft_overrides}
    if retention_mode != "none":
        values["retention_mode"] = retention_mode
    craft = CraftConfig(**values)
    total = chosen.anchors * len(chosen.old)
    if craft.enabled and total < craft.anchor_batch_size:
        raise ValueError(
            f"craft.anchor_batch_size is {craft.anchor_batch_size}, and the quickstart keeps {total} anchors; "
            f"set --craft.anchor_batch_size={total} or less"
        )
    Quickstart(chosen, craft, retention_mode, output_dir or DEFAULT_OUTPUT).run()
    return 0


@dataclass(frozen=True)
class Prepared:
    """What every run of a seed starts from.

    Attributes:
        old: Dataset of the old skills.
        new: Dataset of the new skill.
        held_out: Dataset that is measured on.
        teacher: The policy.
        before: What it can do.
    """

    old: Path
    new: Path
    held_out: Path
    teacher: Path
    before: list[SkillScore]


class Quickstart:
    """One run of the quickstart, stage by stage.

    Args:
        settings: Sizes.
        craft: Settings of the method.
        mode: ``hidden``, ``token_ce`` or ``none``, for titles.
        output: Folder of all that is written.
        name: First part of the name of the run's folder; empty takes the mode.
    """

    def __init__(
        self, settings: QuickstartSettings, craft: CraftConfig, mode: str, output: Path, name: str = ""
    ) -> None:
        self.settings, self.craft, self.mode, self.output = settings, craft, mode, output
        self.name = name or mode
        self.kept = Kept(output / "kept")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.seconds: dict[str, float] = {}
        self.peak_gib = 0.0

    def run(self) -> Path:
        """Do what is left to do, print the table, and return the folder of the run."""
        self.output.mkdir(parents=True, exist_ok=True)
        with locked(self.output / LOCK_FILE, f"the quickstart's folder {self.output}"), written_to(self.output):
            return self._run()

    def _run(self) -> Path:
        began = time.perf_counter()
        settings = self.settings
        old, new = (", ".join(skill.name for skill in skills) for skills in (settings.old, settings.new))
        say(f"Quickstart: keep {old} while learning {new}; retention {self.mode}; everything in {self.output}/")
        made = self.prepare()
        folder = self._run_folder()
        rollouts = f"{settings.rollouts} episodes of each skill"
        policy = self._stage(6, f"Fine-tuning on {new}", lambda: self._fine_tune(folder, made))
        after = self._stage(7, f"Measuring the result ({rollouts})", lambda: self._measure(policy, made.held_out))
        self._report(folder, made.before, after, time.perf_counter() - began)
        return folder

    def prepare(self) -> Prepared:
        """Make what every run of this seed starts from, or take what is kept."""
        settings = self.settings
        old, new = (", ".join(skill.name for skill in skills) for skills in (settings.old, settings.new))
        old_data = self._stage(1, f"Demonstrations of the old skills ({old})", self._old_demonstrations)
        new_data = self._stage(2, f"Demonstrations of the new skill ({new})", self._new_demonstrations)
        held_out = self._stage(3, "Demonstrations held out for measuring", self._held_out_demonstrations)
        self.peak_gib = _memory_with_workers()  # the workers are gone in the stages that follow
        teacher = self._stage(4, f"Teacher: pre-training on {old}", lambda: self._teacher(old_data))
        rollouts = f"{settings.rollouts} episodes of each skill"
        before = self._stage(5, f"Measuring the teacher ({rollouts})", lambda: self._before(teacher, held_out))
        return Prepared(old_data, new_data, held_out, teacher, before)

    def _stage[T](self, number: int, what: str, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        say(f"[{number}/{STAGES}] {what}")
        result = work()
        self.seconds[what] = time.perf_counter() - began
        return result

    def _data_parts(self, skills: tuple[Skill, ...], episodes: int, offset: int) -> dict[str, Any]:
        return {
            "skills": [asdict(skill) for skill in skills],
            "episodes": episodes,
            "seed": self.settings.first_seed(offset),
        }

    def _demonstrations(self, name: str, repo_id: str, skills: tuple[Skill, ...], episodes: int, offset: int) -> Path:
        parts = self._data_parts(skills, episodes, offset)
        root = self.kept.path(name, **parts)
        if not self._have(root):
            collect(root, repo_id, skills, episodes, parts["seed"])
        return root

    def _old_demonstrations(self) -> Path:
        return self._demonstrations("old", OLD_REPO, self.settings.old, self.settings.episodes, OLD_SEED)

    def _new_demonstrations(self) -> Path:
        return self._demonstrations("new", NEW_REPO, self.settings.new, self.settings.episodes, NEW_SEED)

    def _held_out_demonstrations(self) -> Path:
        settings = self.settings
        return self._demonstrations(
            "held-out", HELD_OUT_REPO, settings.skills, settings.held_out_episodes, HELD_OUT_SEED
        )

    def _teacher(self, data: Path) -> Path:
        settings = self.settings
        made_with = (settings.teacher_steps, settings.teacher_lr, settings.batch_size, settings.seed)
        words = sorted(skill.prompt for skill in settings.skills)
        output = self.kept.path("teacher", data=data.name, made_with=made_with, words=words)
        if not self._have(output):
            make_teacher(settings, OLD_REPO, data, output)
        return output

    def _before(self, teacher: Path, held_out: Path) -> list[SkillScore]:
        settings = self.settings
        rollouts = (settings.rollouts, self._rollout_seed, self.device)
        file = self.kept.path("before", teacher=teacher.name, data=held_out.name, rollouts=rollouts)
        if not self._have(file):
            save_scores(file, self._measure(teacher, held_out))
        return load_scores(file)

    def _measure(self, policy: Path, held_out: Path) -> list[SkillScore]:
        settings = self.settings
        return measure(
            policy, settings.skills, held_out, HELD_OUT_REPO, settings.rollouts, self._rollout_seed, self.device
        )

    @property
    def _rollout_seed(self) -> int:
        return ROLLOUT_SEED + self.settings.first_seed(0)

    def anchors(self, made: Prepared) -> Path:
        """Build the anchor cache of these settings, or take the kept one."""
        settings, kind = self.settings, self.craft.retention_mode
        what: dict[str, Any] = {"kind": kind, "normalization_stats": settings.normalization_stats}
        if kind == "hidden":
            what["pooling"] = settings.pooling
        else:
            # What the teacher itself would do: its own tokens, and how sure it was of them.
            what |= {"top_k": settings.top_k, "token_source": "teacher"}
        count = settings.anchors * len(settings.old)
        folder = self.kept.path(
            "anchors" if kind == "hidden" else "anchors-tokens",
            teacher=made.teacher.name,
            data=[made.old.name, made.new.name if settings.normalization_stats == "dataset" else ""],
            count=count,
            seed=settings.seed,
            version=VERSION,
            what=what,
        )
        build_cache(
            folder,
            made.teacher,
            [AnchorSource(OLD_REPO, made.old)],
            num_samples=count,
            seed=settings.seed,
            stats_source=AnchorSource(NEW_REPO, made.new) if settings.normalization_stats == "dataset" else None,
            policy_overrides=[f"--device={self.device}"],
            **what,
        )
        return folder

    def _fine_tune(self, folder: Path, made: Prepared) -> Path:
        settings, craft = self.settings, self.craft
        if craft.enabled:
            craft = replace(craft, anchor_cache_dir=str(self.anchors(made)))
        training = folder / "training"
        checkpoint = latest_checkpoint(training)
        if checkpoint is not None:
            check_whole(checkpoint, training)
        if checkpoint is not None and int(checkpoint.name) >= settings.steps:
            return checkpoint / "pretrained_model"
        if checkpoint is not None:
            say(f"Going on with {training} after step {int(checkpoint.name)}")
            cfg = resume_config(checkpoint)
        else:
            shutil.rmtree(training, ignore_errors=True)
            cfg = fine_tune_config(
                made.teacher,
                NEW_REPO,
                made.new,
                training,
                craft=craft,
                device=self.device,
                policy_overrides=[f"--optimizer_lr={settings.lr}", f"--scheduler_decay_steps={settings.steps}"],
                steps=settings.steps,
                batch_size=settings.batch_size,
                seed=settings.seed,
                log_freq=max(1, settings.steps // 20),
                save_freq=max(1, settings.steps // 4),
                normalization_stats=settings.normalization_stats,
            )
        finished = train(cfg).checkpoint
        assert finished is not None, "the fine-tuning saves its last step"
        return finished / "pretrained_model"

    def _have(self, path: Path) -> bool:
        if path.exists():
            say(f"  kept from an earlier run: {path}")
            check_seal(path, f"delete {path}, and the same command makes it again")
            for left in (".partial", ".copy"):  # by a run that was killed while it tidied up
                shutil.rmtree(path.with_name(path.name + left), ignore_errors=True)
        return path.exists()

    def finished(self) -> Path | None:
        """The folder of a finished run of these very settings, None without one."""
        return next((f for f in self._folders_of_these_settings() if (f / RESULT_FILE).exists()), None)

    def _folders_of_these_settings(self) -> list[Path]:
        folders = sorted(self.output.glob(f"{self.name}-seed{self.settings.seed}-*"))
        return [f for f in folders if (f / SETTINGS_FILE).is_file() and (f / SETTINGS_FILE).read_text() == self._text]

    @property
    def _text(self) -> str:
        settings = {"settings": asdict(self.settings), "craft": asdict(self.craft), "device": self.device}
        return json.dumps(settings, indent=2, sort_keys=True)

    def _run_folder(self) -> Path:
        """The unfinished run of these very settings, or a new folder: a finished run is never written over."""
        for folder in self._folders_of_these_settings():
            if not (folder / RESULT_FILE).exists():
                return folder
        number = 1
        while not _is_free(folder := self.output / f"{self.name}-seed{self.settings.seed}-{number:03d}"):
            number += 1
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / SETTINGS_FILE, self._text)
        return folder

    def _report(self, folder: Path, before: list[SkillScore], after: list[SkillScore], seconds: float) -> None:
        old = len(self.settings.old)
        text = table(before, after, old)
        title = f"CRaFT quickstart: retention {self.mode}, seed {self.settings.seed}, {self.settings.steps} steps"
        metrics = folder / "training" / "metrics.jsonl"
        picture(folder / "curves.png", metrics, before, after, old, title)
        write_atomically(folder / "table.txt", text + "\n")
        result = {
            "mode": self.mode,
            "seed": self.settings.seed,
            "before": [asdict(score) for score in before],
            "after": [asdict(score) for score in after],
            "seconds": {**self.seconds, "total": seconds},
            "peak_memory_gib": self._peak_memory(),
            "torch_threads": torch.get_num_threads(),
        }
        # Last, because its presence says that the run is finished.
        write_atomically(folder / RESULT_FILE, json.dumps(result, indent=2))
        say("")
        say(text)
        say("")
        for name, path in (
            ("fine-tuned policy", folder / "training" / "checkpoints" / "last" / "pretrained_model"),
            ("metrics, one JSON object a step", metrics),
            ("curves", folder / "curves.png"),
            ("all figures", folder / RESULT_FILE),
            ("kept for the next run", self.kept.folder),
        ):
            say(f"{name}: {path}")
        say(f"{seconds / 60:.1f} minutes, {self._peak_memory():.1f} GiB at most")

    def _peak_memory(self) -> float:
        return max(self.peak_gib, _largest(resource.RUSAGE_SELF))


def _is_free(folder: Path) -> bool:
    """Whether nothing lies there, or only what a run leaves that was killed before its settings were written."""
    return not folder.exists() or {path.name for path in folder.iterdir()} <= {f"{SETTINGS_FILE}.tmp"}


def _largest(who: int) -> float:
    """Largest resident memory of this process, or of its largest worker, so far, GiB."""
    unit = 2**30 if sys.platform == "darwin" else 2**20  # Linux counts in KiB, macOS in bytes
    return resource.getrusage(who).ru_maxrss / unit


def _memory_with_workers() -> float:
    return _largest(resource.RUSAGE_SELF) + WORKERS * _largest(resource.RUSAGE_CHILDREN)
