"""One cell of the benchmark: a method, a budget and a seed, through all stages of a suite.

A cell is a folder. Every stage leaves ``stage-<n>/record.json`` and the policy after it, written last, so that a killed
cell goes on with the stage that it was in; ``result.json`` says that the cell is finished.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lerobot.utils.random_utils import get_rng_state, set_rng_state
from torch import nn

from craft_opt import CraftConfig
from craft_opt.bridge.anchor_manifest import VERSION, write_atomically
from craft_opt.bridge.anchors import AnchorSource, build_cache
from craft_opt.bridge.config import fine_tune_config
from craft_opt.bridge.features import pi0_fast_of
from craft_opt.bridge.logs import StepRecord
from craft_opt.bridge.loop import Run, prepare, run_steps
from craft_opt.bridge.quickstart.measure import (
    SkillScore,
    load_scores,
    make_evaluator,
    measure,
    save_scores,
)
from craft_opt.bridge.quickstart.run import Kept
from craft_opt.bridge.quickstart.settings import (
    HELD_OUT_SEED,
    NEW_SEED,
    OLD_SEED,
    ROLLOUT_SEED,
    QuickstartSettings,
    fingerprint,
)
from craft_opt.bridge.quickstart.simulation import Skill
from craft_opt.bridge.quickstart.skills import collect
from craft_opt.bridge.quickstart.teacher import make_teacher
from craft_opt.bridge.report.memory import PeakMemory
from craft_opt.bridge.report.methods import Method, StageInputs, method_named
from craft_opt.bridge.report.provenance import provenance
from craft_opt.bridge.report.suites import SUITES, Suite
from craft_opt.bridge.retention_term import cache_weights, shares

RESULT_FILE, RECORD_FILE, PROGRESS_FILE, POLICY_FOLDER = "result.json", "record.json", "progress", "policy"
# Fewer than the quickstart's 1000: a minute and a half instead of three. After 400 those that retain had not yet
# learned the new skill.
STEPS = 600
ANCHOR_BATCH = 32
# Raised when the code of a cell changes what it measures: cells of before are then run anew.
CELL_VERSION = 1
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Cell:
    """What a cell is; two cells with the same fields give the same result.

    Attributes:
        suite: Name of the suite.
        method: Name of the method.
        budget: Anchors of each old skill; 0 for a method that uses none.
        seed: Of demonstrations, teacher, anchors, fine-tuning and rollouts.
        settings: Settings of the method that depart from its defaults.
        sizes: Fields of :class:`QuickstartSettings` that depart from the benchmark's.
        curve: Measurements of the new skill within each stage, beside those at its ends.
    """

    suite: str
    method: str
    budget: int
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=dict)
    curve: int = 1

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What tells it from the other cells of a matrix."""
        return (self.suite, self.method, self.budget, self.seed)

    @property
    def label(self) -> str:
        """Its name for people."""
        return f"{self.suite} {self.method}{f' b{self.budget}' if self.budget else ''} seed {self.seed}"

    def folder(self, output: Path) -> Path:
        """Where it lies."""
        made_with = {"version": CELL_VERSION, "anchors": VERSION, "cell": asdict(self)}
        name = f"{self.method}-b{self.budget}-s{self.seed}-{fingerprint(**made_with)}"
        return output / "cells" / self.suite / name


class Bench:
    """What the cells of a suite and a seed share: demonstrations, teacher, its scores and its anchors; made once.

    Args:
        suite: The suite.
        seed: The seed.
        output: Folder of the benchmark.
        sizes: Fields of :class:`QuickstartSettings` that depart from the benchmark's.
    """

    def __init__(self, suite: Suite, seed: int, output: Path, sizes: Mapping[str, Any]) -> None:
        self.suite, self.seed = suite, seed
        new = tuple(skill for stage in suite.stages[1:] for skill in stage)
        self.settings = QuickstartSettings(
            **{"steps": STEPS, **sizes, "seed": seed, "old": suite.stages[0], "new": new}
        )
        self.kept = Kept(output / "kept")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def rollout_seed(self) -> int:
        """Seed of the first rollout."""
        return ROLLOUT_SEED + self.settings.first_seed(0)

    @property
    def held_out_repo(self) -> str:
        """Name of the demonstrations that are measured on."""
        return f"craft/{self.suite.name}-held-out"

    def repo(self, stage: int) -> str:
        """Name of a stage's demonstrations."""
        return f"craft/{self.suite.name}-stage{stage}"

    def demonstrations(self, stage: int) -> Path:
        """Demonstrations of a stage's skills."""
        offset = OLD_SEED if stage == 0 else NEW_SEED
        return self._collect(self.repo(stage), self.suite.stages[stage], self.settings.episodes, offset)

    def held_out(self) -> Path:
        """Demonstrations that are measured on."""
        settings = self.settings
        return self._collect(self.held_out_repo, settings.skills, settings.held_out_episodes, HELD_OUT_SEED)

    def _collect(self, repo_id: str, skills: Sequence[Skill], episodes: int, offset: int) -> Path:
        seed = self.settings.first_seed(offset)
        parts = {"skills": [asdict(skill) for skill in skills], "episodes": episodes, "seed": seed}
        root = self.kept.path(repo_id.removeprefix("craft/"), **parts)
        if not root.exists():
            collect(root, repo_id, skills, episodes, seed)
        return root

    def teacher(self) -> Path:
        """The policy after the pre-training."""
        settings, data = self.settings, self.demonstrations(0)
        made_with = (settings.teacher_steps, settings.teacher_lr, settings.batch_size, settings.seed)
        words = sorted(skill.prompt for skill in settings.skills)
        output = self.kept.path("teacher", data=data.name, made_with=made_with, words=words)
        return make_teacher(settings, self.repo(0), data, output)

    def before(self) -> list[SkillScore]:
        """What the teacher can do."""
        teacher, held_out = self.teacher(), self.held_out()
        rollouts = (self.settings.rollouts, self.rollout_seed, self.device)
        file = self.kept.path("scores", teacher=teacher.name, data=held_out.name, rollouts=rollouts)
        if not file.exists():
            save_scores(file, self.measure(teacher))
        return load_scores(file)

    def measure(self, policy: Path) -> list[SkillScore]:
        """What a saved policy can do."""
        settings = self.settings
        return measure(
            policy,
            settings.skills,
            self.held_out(),
            self.held_out_repo,
            settings.rollouts,
            self.rollout_seed,
            self.device,
        )

    def anchors(
        self,
        method: Method,
        budget: int,
        stage: int,
        teacher: Path | None = None,
        into: Path | None = None,
        *,
        only_latest: bool = False,
    ) -> Path:
        """Anchors of the skills learned before a stage, ``budget`` of each, as a teacher sees them.

        Which samples they are depends on the demonstrations and the seed alone, so the store of a stage holds that of
        the stage before.

        Args:
            method: Its kind of cache, pooling, layers and selection.
            budget: Anchors of each skill.
            stage: The stage that will use them.
            teacher: The policy before that stage; None is the suite's.
            into: Folder of the cache; None keeps it with what the cells share.
            only_latest: Whether the skills of the stage before this one are all.
        """
        numbers = [stage - 1] if only_latest else list(range(stage))
        sources = [AnchorSource(self.repo(number), self.demonstrations(number)) for number in numbers]
        count = budget * sum(len(self.suite.stages[number]) for number in numbers)
        what = self._of_cache(method) | {"selection": method.selection}
        teacher = teacher or self.teacher()
        if into is None:
            names = [Path(str(source.root)).name for source in sources]
            made_with = {"teacher": teacher.name, "data": names, "count": count, "seed": self.seed}
            into = self.kept.path("anchors", version=VERSION, what=what, **made_with)
        self._build(into, teacher, sources, count, what)
        return into

    def prompted(self, method: Method, stage: int, teacher: Path, into: Path) -> Path:
        """Frames of a stage's own demonstrations with a teacher's answers to the prompts of the skills before it.

        Args:
            method: Its kind of cache, pooling, layers, and number of frames.
            stage: The stage that will use them.
            teacher: The policy before it.
            into: Folder of the cache.
        """
        prompts = [skill.prompt for stage in self.suite.stages[:stage] for skill in stage]
        repo, root = self.repo(stage), self.demonstrations(stage)
        sources = [AnchorSource(repo, root, prompt=prompt) for prompt in prompts]
        self._build(into, teacher, sources, method.prompted, self._of_cache(method) | {"token_source": "teacher"})
        return into

    def _of_cache(self, method: Method) -> dict[str, Any]:
        if method.kind == "hidden":
            return {"kind": method.kind, "pooling": method.pooling, "layers": list(method.layers)}
        return {"kind": method.kind, "top_k": self.settings.top_k, "token_source": "teacher"}

    def _build(
        self, into: Path, teacher: Path, sources: Sequence[AnchorSource], count: int, what: Mapping[str, Any]
    ) -> None:
        build_cache(
            into,
            teacher,
            sources,
            num_samples=count,
            seed=self.seed,
            policy_overrides=[f"--device={self.device}"],
            progress=False,
            **what,
        )


def prepare_seed(output: Path, cells: Sequence[Cell], progress: Progress = lambda share: None) -> None:
    """Make what the cells of a suite and a seed share: two of them at once must not make one thing twice."""
    first = cells[0]
    bench = Bench(SUITES[first.suite], first.seed, output, first.sizes)
    work: list[Callable[[], object]] = [partial_stage(bench, number) for number in range(len(bench.suite.stages))]
    work += [bench.held_out, bench.teacher, bench.before]
    for cell in cells:
        method = method_named(cell.method).with_settings(cell.settings)
        if method.uses_anchors:
            work.append(first_anchors(bench, method, cell.budget))
    for done, part in enumerate(work):
        progress(done / len(work))
        part()
    progress(1.0)


def partial_stage(bench: Bench, number: int) -> Callable[[], object]:
    """A stage's demonstrations, later."""
    return lambda: bench.demonstrations(number)


def first_anchors(bench: Bench, method: Method, budget: int) -> Callable[[], object]:
    """Anchors of the first stage, later."""
    return lambda: bench.anchors(method, budget, 1, only_latest=method.only_latest)


def run_cell(output: Path, cell: Cell, progress: Progress = lambda share: None) -> dict[str, Any]:
    """Run a cell, go on with a stopped one, or take the result of a finished one.

    Args:
        output: Folder of the benchmark; what the cell shares is there (:func:`prepare_seed`) or is made.
        cell: The cell.
        progress: Told the share that is done, in [0, 1].
    """
    folder = cell.folder(output)
    result_file = folder / RESULT_FILE
    if result_file.exists():
        return dict(json.loads(result_file.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    suite = SUITES[cell.suite]
    bench = Bench(suite, cell.seed, output, cell.sizes)
    method = method_named(cell.method).with_settings(cell.settings)
    policy, records = bench.teacher(), []
    stages = len(suite.stages) - 1
    for number in range(1, stages + 1):
        told = _part_of(progress, (number - 1) / stages, number / stages)
        records.append(Stage(bench, cell, method, number, policy, folder).run(told))
        policy = folder / f"stage-{number}" / POLICY_FOLDER
    result = {
        "cell": asdict(cell),
        "skills": [skill.name for skill in suite.skills],
        "learned": list(suite.learned),
        "what": method.what,
        "settings": {"lr": method.lr or bench.settings.lr, **_own_settings(method), "craft": dict(method.craft)},
        "sizes": {name: getattr(bench.settings, name) for name in SIZES},
        "before": [asdict(score) for score in bench.before()],
        "stages": records,
        **provenance(),
    }
    write_atomically(result_file, json.dumps(result, indent=1))
    for number in range(1, stages):  # only the last policy is of use to anyone, and there are many cells
        shutil.rmtree(folder / f"stage-{number}", ignore_errors=True)
    progress(1.0)
    return dict(json.loads(result_file.read_text()))


# What a results file says of the sizes of a run.
SIZES = ("episodes", "held_out_episodes", "teacher_steps", "teacher_lr", "steps", "lr", "batch_size", "rollouts")


def _own_settings(method: Method) -> dict[str, Any]:
    """Settings that a method has beside those of every method."""
    common = set(Method.__dataclass_fields__)
    return {name: value for name, value in asdict(method).items() if name not in common}


def _part_of(progress: Progress, low: float, high: float) -> Progress:
    return lambda share: progress(low + share * (high - low))


def anchors_a_step(craft: CraftConfig, sizes: Sequence[int]) -> int:
    """As many as the task's batch has samples, or fewer where a cache has not its share of so many.

    Args:
        craft: The weights of the caches.
        sizes: Anchors of each of them.
    """
    if not sizes:
        return 1
    weights = cache_weights(craft)
    for batch in range(min(ANCHOR_BATCH, sum(sizes)), len(sizes), -1):
        if all(share <= size for share, size in zip(shares(batch, weights), sizes, strict=True)):
            return batch
    return len(sizes)


@dataclass(frozen=True)
class Stage:
    """One stage of a cell.

    Attributes:
        bench: What the cells share.
        cell: The cell.
        method: Its method, with its settings.
        number: Of the stage, from 1.
        start: Folder of the policy before it.
        folder: Of the cell.
    """

    bench: Bench
    cell: Cell
    method: Method
    number: int
    start: Path
    folder: Path

    def run(self, progress: Progress) -> dict[str, Any]:
        """Train, save and measure, or take what a finished stage left."""
        home = self.folder / f"stage-{self.number}"
        record_file = home / RECORD_FILE
        if record_file.exists():
            return dict(json.loads(record_file.read_text()))
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        began = time.perf_counter()
        with PeakMemory(self.bench.device) as peak:
            inputs = self._inputs(home)
            run = self._prepare(home, inputs)
            begins = {name: p.detach().clone() for name, p in pi0_fast_of(run.parts.policy).named_parameters()}
            run = self.method.attach(run, inputs)
            stored = self.method.stored_bytes(run, inputs)
            ready = time.perf_counter()
            curve, measuring = self._train(run, begins, progress)
            trained = time.perf_counter()
        with self.method.deployed(run, begins) as policy:
            self._save(home / POLICY_FOLDER, policy, run)
        progress(0.8)
        scores = self.bench.measure(home / POLICY_FOLDER)
        steps = [json.loads(line) for line in (home / "training" / "metrics.jsonl").read_text().splitlines()]
        own = [k for k, stage in enumerate(self.bench.suite.learned) if stage == self.number]
        ends = {k: (self._score_before(k), scores[k].success) for k in own}
        record = {
            "stage": self.number,
            "scores": [asdict(score) for score in scores],
            "curves": {str(k): [ends[k][0], *(point[k] for point in curve), ends[k][1]] for k in own},
            "step_seconds": _median([step["update_s"] + step["data_s"] for step in steps]),
            "setup_seconds": ready - began,
            "train_seconds": trained - ready - measuring,
            "measure_seconds": measuring + time.perf_counter() - trained,
            "peak_memory_gib": peak.gib,
            "stored_bytes": stored,
            "skipped_steps": sum(step["skipped"] for step in steps),
            "last": _last(steps),
        }
        for leftover in ("training", "anchors", "latest", "prompted"):
            shutil.rmtree(home / leftover, ignore_errors=True)
        write_atomically(record_file, json.dumps(record, indent=1))
        progress(1.0)
        return record

    def _score_before(self, skill: int) -> float:
        """Success of a skill before the stage."""
        if self.number == 1:
            return self.bench.before()[skill].success
        record = json.loads((self.folder / f"stage-{self.number - 1}" / RECORD_FILE).read_text())
        score = record["scores"][skill]
        return float(score["successes"] / score["rollouts"])

    def _inputs(self, home: Path) -> StageInputs:
        """Build what the method looks at of the old skills; in the first stage the cells share it."""
        method, found = self.method, None
        if method.uses_anchors:
            into = None if self.number == 1 else home / ("latest" if method.only_latest else "anchors")
            found = self.bench.anchors(
                method, self.cell.budget, self.number, self.start, into, only_latest=method.only_latest
            )
        prompted = None
        if method.prompted:
            prompted = self.bench.prompted(method, self.number, self.start, home / "prompted")
        before = self.folder / f"stage-{self.number - 1}" / "memory" if self.number > 1 else None
        return StageInputs(
            number=self.number,
            seed=self.cell.seed,
            cache=None if method.only_latest else found,
            latest=found if method.only_latest else None,
            prompted=prompted,
            memory=home / "memory",
            before=before,
        )

    def _prepare(self, home: Path, inputs: StageInputs) -> Run:
        settings, method = self.bench.settings, self.method
        old = sum(stage < self.number for stage in self.bench.suite.learned)
        held = ((inputs.cache, self.cell.budget * old), (inputs.prompted, method.prompted))
        sizes = {cache: size for cache, size in held if cache is not None}
        craft = method.craft_config(list(sizes), max(1, len(sizes)))
        cfg = fine_tune_config(
            self.start,
            self.bench.repo(self.number),
            self.bench.demonstrations(self.number),
            home / "training",
            craft=replace(craft, anchor_batch_size=anchors_a_step(craft, list(sizes.values()))),
            device=self.bench.device,
            policy_overrides=[
                f"--optimizer_lr={method.lr or settings.lr}",
                f"--scheduler_decay_steps={settings.steps}",
            ],
            steps=settings.steps,
            batch_size=settings.batch_size,
            seed=self.cell.seed,
            log_freq=max(1, settings.steps // 20),
            save_checkpoint=False,
        )
        method.configure(cfg)
        return prepare(cfg)

    def _train(
        self, run: Run, begins: Mapping[str, torch.Tensor], progress: Progress
    ) -> tuple[list[dict[int, float]], float]:
        """Do the steps, with the measurements of the learning curve in between.

        Returns:
            At each point of the curve, skill → success; and the seconds spent on measuring.
        """
        total, points = run.cfg.steps, self.cell.curve
        share = 0.8 / total

        def tell(record: StepRecord) -> None:
            progress(record.step * share)

        curve, measuring = [], 0.0
        for point in range(1, points + 2):
            run.cfg.steps = max(run.start + 1, round(total * point / (points + 1)))
            run_steps(run, on_step=tell, progress=False)
            run = replace(run, start=run.cfg.steps)
            if point <= points:
                began = time.perf_counter()
                with self.method.deployed(run, begins) as policy:
                    curve.append(self._success(policy, run))
                measuring += time.perf_counter() - began
        return curve, measuring

    def _success(self, policy: nn.Module, run: Run) -> dict[int, float]:
        """Success of the skills of this stage, with the policy as it is in memory."""
        settings = self.bench.settings
        random, training = get_rng_state(), policy.training
        policy.eval()
        assert run.cfg.policy is not None
        evaluator = make_evaluator(settings.rollouts, run.cfg.policy.n_action_steps)
        found = {}
        for k, stage in enumerate(self.bench.suite.learned):
            if stage == self.number:
                skill = self.bench.suite.skills[k]
                done = evaluator.success(
                    policy, run.preprocessor, run.postprocessor, skill, settings.rollouts, self.bench.rollout_seed
                )
                found[k] = sum(done) / len(done)
                evaluator.close()
        policy.train(training)
        set_rng_state(random)
        return found

    def _save(self, folder: Path, policy: Any, run: Run) -> None:
        partial = folder.with_name(folder.name + ".partial")
        for part in (policy, run.preprocessor, run.postprocessor):
            part.save_pretrained(partial)
        partial.rename(folder)


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())


def _last(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where the constraint ended, and how often the task's gradient was projected."""
    measured = [step for step in steps if step.get("retention_loss") is not None]
    if not measured:
        return {}
    kept = {name: measured[-1][name] for name in ("retention_loss", "lambda", "epsilon")}
    return {**kept, "projected": sum(bool(step["conflict"]) for step in measured) / len(measured)}
