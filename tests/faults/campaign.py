"""The campaign: every kind of fault against every kind of work, and what became of each."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.faults.judge import (
    CLEAR,
    CONTINUED,
    OUTCOMES,
    SILENT,
    UNCLEAR,
    Job,
    Outcome,
    differences,
    follow,
    is_clear,
)
from tests.faults.lab import LIMIT_SECONDS, TRAIN, Ended, Lab, Program
from tests.faults.world import BEFORE, RESULT, World

ENOSPC, EROFS = 28, 30
EXIT_OF = {signal.SIGTERM: 143, signal.SIGINT: 130}
WORD_OF = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}


@dataclass(frozen=True)
class Point:
    """A call that changes something on disk."""

    number: int
    call: str
    path: str


def sampled[T](items: Sequence[T], count: int) -> list[T]:
    """As many of them, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(k * (len(items) - 1) / (count - 1))] for k in range(count)]


@dataclass
class Campaign:
    """Faults and their outcomes.

    Attributes:
        world: Jobs.
        lab: Starts programs.
        scale: Share of the sampled points that are taken.
        outcomes: What became of every fault.
        points: Job → number of calls that change something, and how many of them were disturbed.
    """

    world: World
    lab: Lab
    scale: float = 1.0
    outcomes: list[Outcome] = field(default_factory=list)
    points: dict[str, dict[str, int]] = field(default_factory=dict)
    random: random.Random = field(default_factory=lambda: random.Random(6))
    _recorded: dict[str, list[Point]] = field(default_factory=dict)

    def note(self, kind: str, name: str, outcome: str, detail: str = "") -> None:
        self.outcomes.append(Outcome(kind, name, outcome, detail))
        mark = "" if outcome not in (SILENT, UNCLEAR) else f"  <<< {detail}"
        print(f"{len(self.outcomes):4d} | {kind} | {name} | {outcome}{mark}", flush=True)

    def count(self, number: int) -> int:
        return max(2, round(number * self.scale))

    # -- at every point where a file is written ----------------------------------------------------------------------

    def recorded(self, name: str, make: Callable[[], Job]) -> list[Point]:
        """The calls of an undisturbed run, in order."""
        if name not in self._recorded:
            job = make()
            log = job.root / "calls"
            ended = self.lab.run(job.target, job.arguments, {"root": job.root, "mode": "record", "log": log})
            assert ended.code == 0, ended.err[-3000:]
            assert not differences(job), differences(job)
            rows = [line.split("\t") for line in log.read_text().splitlines()]
            self._recorded[name] = [Point(int(number), call, path) for number, call, path in rows]
            self.world.done_with(job)
        return self._recorded[name]

    def points_of(self, name: str, make: Callable[[], Job], count: int, after: str = "") -> list[Point]:
        """Some of the points, evenly spread, those before the first call on ``after`` left out."""
        points = self.recorded(name, make)
        first = next((k for k, point in enumerate(points) if after in point.path), 0)
        chosen = sampled(points[first:], self.count(count))
        seen = self.points.setdefault(name, {"calls": len(points), "faults": 0})
        seen["faults"] += len(chosen)
        return chosen

    def kills(self, kind: str, name: str, make: Callable[[], Job], count: int, after: str = "") -> None:
        """kill -9 before a call; where it writes, half of the time after half of it."""
        for k, point in enumerate(self.points_of(name, make, count, after)):
            half = point.call == "write" and k % 2 == 1
            job = make()
            fault = {"root": job.root, "mode": "signal", "at": point.number, "value": signal.SIGKILL, "half": half}
            ended = self.lab.run(job.target, job.arguments, fault)
            self.judge_death(kind, f"{'in half of' if half else 'before'} {_shown(point)}", job, ended)

    def power_cuts(self, kind: str, name: str, make: Callable[[], Job], count: int) -> None:
        """Killed, and of every file only what was synced is left."""
        for point in self.points_of(name, make, count):
            job = make()
            fault = {"root": job.root, "mode": "power", "at": point.number}
            ended = self.lab.run(job.target, job.arguments, fault)
            self.judge_death(kind, f"before {_shown(point)}", job, ended)

    def judge_death(self, kind: str, name: str, job: Job, ended: Ended) -> None:
        if ended.code != -signal.SIGKILL:
            self.note(kind, name, UNCLEAR, f"the fault did not happen: exit code {ended.code}: {ended.err[-300:]}")
        elif half := self.half_written(job):
            self.note(kind, name, SILENT, half)
        else:
            self.note(kind, name, *follow(self.lab, self.again(job), None))
        self.world.done_with(job)

    def failures(self, kind: str, name: str, make: Callable[[], Job], count: int, error: int) -> None:
        """A call and all after it fail, as on a full or a read-only disk; then there is room again."""
        calls = {"open", "write", "mkdir", "rename", "symlink", "truncate", "fsync"}
        for point in self.points_of(name, make, count):
            if point.call not in calls:
                continue
            job = make()
            fault = {"root": job.root, "mode": "fail", "at": point.number, "value": error, "lasting": True}
            ended = self.lab.run(job.target, job.arguments, fault)
            self.judge_error(kind, f"at {_shown(point)}", job, ended)

    def judge_error(self, kind: str, name: str, job: Job, ended: Ended, *, damaged: bool = False) -> None:
        """A fault that the program outlived: it must say so, and what it says must lead on."""
        half = "" if damaged else self.half_written(job)
        if half:
            self.note(kind, name, SILENT, half)
        elif ended.code == 0:
            wrong = differences(job)
            self.note(kind, name, SILENT if wrong else CONTINUED, f"exit code 0, and other: {wrong[:4]}")
        elif not is_clear(ended, job.root):
            self.note(kind, name, UNCLEAR, f"exit code {ended.code}: {' / '.join(ended.err.splitlines()[-2:])[-500:]}")
        else:
            outcome, detail = follow(self.lab, job, ended)
            self.note(kind, name, outcome if outcome in (SILENT, UNCLEAR) else CLEAR, detail or ended.message)
        self.world.done_with(job)

    def half_written(self, job: Job) -> str:
        """What lies there under the name of something whole and is not."""
        from craft_opt.bridge.seals import SEAL_FILE, check_seal

        for folder in job.made.rglob("*") if job.made.is_dir() else ():
            under_its_name = folder.is_dir() and (folder.name.isdigit() or "kept" in folder.parent.name)
            # The remains of a finished teacher's training are removed last, and read by nobody.
            parts = folder.relative_to(job.made).parts
            if not under_its_name or any(part.endswith((".partial", ".copy", ".replaced")) for part in parts):
                continue
            if not (folder / SEAL_FILE).is_file():
                return f"{folder} has no seal"
            try:
                check_seal(folder, "")
            except ValueError as error:
                return f"{folder} is not whole: {error}"
        last = job.made / "checkpoints" / "last"
        if last.is_symlink() and not last.exists():
            return f"{last} points to nothing"
        return ""

    def again(self, job: Job) -> Job:
        """What a user types after a crash: to resume where there is a checkpoint, else the same command."""
        config = job.made / "checkpoints" / "last" / "pretrained_model" / "train_config.json"
        if job.target != TRAIN or not config.is_file():
            return job
        return _with(job, "--resume=true", f"--config_path={config}")

    # -- damaged files -------------------------------------------------------------------------------------------------

    def damages(
        self,
        kind: str,
        make: Callable[[], Job],
        place: Callable[[Job], Path],
        hurts: Sequence[str],
        count: int = 100,
    ) -> None:
        """Files below a place are cut in half, emptied, removed, or have one bit flipped."""
        probe = make()
        names = sorted(str(p.relative_to(place(probe))) for p in place(probe).rglob("*") if p.is_file())
        self.world.done_with(probe)
        for name in sampled(names, self.count(count)):
            for hurt in hurts:
                job = make()
                damage(place(job) / name, hurt, self.random)
                ended = self.lab.run(job.target, job.arguments)
                self.judge_error(f"{kind}: {hurt}", name, job, ended, damaged=True)

    # -- signals -------------------------------------------------------------------------------------------------------

    def signals_at_points(self, kind: str, name: str, make: Callable[[], Job], count: int, after: str = "") -> None:
        """SIGTERM and SIGINT in the very call that writes."""
        for k, point in enumerate(self.points_of(name, make, count, after)):
            number = (signal.SIGTERM, signal.SIGINT)[k % 2]
            job = make()
            half = point.call == "write" and k % 4 > 1
            fault = {"root": job.root, "mode": "signal", "at": point.number, "value": number, "half": half}
            ended = self.lab.run(job.target, job.arguments, fault)
            self.judge_signal(kind, f"{number.name} at {_shown(point)}", job, ended, number)

    def signals_at_times(self, kind: str, make: Callable[[], Job], count: int) -> None:
        """SIGTERM to the process, or Ctrl-C to its group, at random times."""
        probe = make()
        began = time.monotonic()
        self.lab.run(probe.target, probe.arguments)
        length = time.monotonic() - began
        self.world.done_with(probe)
        for k in range(self.count(count)):
            number = (signal.SIGTERM, signal.SIGINT)[k % 2]
            job = make()
            # Not in the first tenth of a second: there the program has not begun.
            wait = 0.1 + self.random.random() * (length - 0.1)
            program = self.lab.start(job.target, job.arguments)
            time.sleep(wait)
            program.kill(number, group=number == signal.SIGINT)
            self.judge_signal(kind, f"{number.name} after {wait / length:.0%}", job, program.wait(), number)

    def judge_signal(self, kind: str, name: str, job: Job, ended: Ended, number: signal.Signals) -> None:
        half = self.half_written(job)
        if half:
            self.note(kind, name, SILENT, half)
        elif ended.code == 0:
            wrong = differences(job)
            self.note(kind, name, SILENT if wrong else CONTINUED, f"exit code 0, and other: {wrong[:4]}")
        elif ended.code != EXIT_OF[number] or ended.crashed or WORD_OF[number] not in ended.message:
            self.note(kind, name, UNCLEAR, f"exit code {ended.code}: {' / '.join(ended.err.splitlines()[-3:])[-500:]}")
        else:
            self.note(kind, name, *follow(self.lab, self.again(job), None))
        self.world.done_with(job)

    # -- what is not finite --------------------------------------------------------------------------------------------

    def not_finite(self, count: int) -> None:
        """NaN and inf in losses, gradients and anchors at random steps: skipped, reported, nothing touched."""
        steps = 12
        for k in range(self.count(count)):
            where = ("loss", "gradient", "anchors")[k % 3]
            value = ("nan", "inf", "-inf")[k // 3 % 3]
            job = self.world.training()
            chosen = sorted(self.random.sample(range(1, steps + 1), 3))
            plan = {step: [where, value] for step in chosen}
            flags = [*job.arguments, f"--steps={steps}", "--save_freq=100", "--craft.retention_freq=1"]
            flags = [f for f in flags if f not in (f"--steps={int(RESULT)}", f"--save_freq={int(BEFORE)}")]
            flags.remove("--craft.retention_freq=2")
            file = job.root / "poison.json"
            ended = self.lab.run("tests.faults.programs:poisoned", [file, json.dumps(plan), *flags])
            name = f"{value} in the {where} at steps {chosen}"
            found = json.loads(file.read_text()) if file.is_file() else {}
            rows = [json.loads(line) for line in (job.made / "metrics.jsonl").read_text().splitlines()]
            skipped = [row["step"] for row in rows if row["skipped"]]
            said = [step for step in chosen if f"Step {step}/{steps} skipped" in ended.out]
            touched = [name for step in found.values() for name in step["changed"]]
            if ended.code != 0:
                outcome = (UNCLEAR, f"exit code {ended.code}: {ended.message[-300:]}")
            elif touched or skipped != chosen or not all(step["skipped"] for step in found.values()):
                outcome = (SILENT, f"skipped {skipped}, changed {touched[:3]}")
            elif said != chosen:
                outcome = (UNCLEAR, f"reported {said}")
            else:
                outcome = (CONTINUED, "")
            self.note("not finite", name, *outcome)
            self.world.done_with(job)

    # -- other processes -----------------------------------------------------------------------------------------------

    def dying_workers(self) -> None:
        """A data worker is killed: of the run (one worker, two) and of a cache's build.

        Forked ones: LeRobot's default, a fresh interpreter for each, takes half a minute to start and dies the same.
        """
        for workers in (1, 2):
            job = self.world.training(target="tests.faults.programs:train_from_disk", workers=True)
            flags = tuple(f"--num_workers={workers}" if "num_workers" in flag else flag for flag in job.arguments)
            program = self.lab.start(job.target, flags)
            _until(lambda program=program: "Output directory" in program.out(), program)
            _until(lambda program=program: bool(_children(program.pid)), program)
            victims = _children(program.pid)
            for victim in victims[-1:]:
                os.kill(victim, signal.SIGKILL)
            ended = program.wait()
            self.judge_error("data worker dies", f"training, {workers} workers", _with(job, *flags), ended)
        job = self.world.caching()
        flags = (*job.arguments, "--num-workers=1")
        program = self.lab.start(job.target, flags)
        if _until(lambda: bool(_children(program.pid)), program):
            os.kill(_children(program.pid)[-1], signal.SIGKILL)
        self.judge_error("data worker dies", "anchor cache, 1 worker", _with(job, *flags), program.wait())

    def two_at_once(self) -> None:
        """Two programs in one folder: one is refused, the other ends as if it had been alone."""
        kind = "two in one folder"
        for name, make in (("two fresh runs", self.world.training), ("two builds of a cache", self.world.caching)):
            job = make()
            self.judge_pair(kind, name, job, [self.lab.start(job.target, job.arguments) for _ in range(2)])
        for delay in (0.3, 0.8):
            job = self.world.resuming()
            programs = [self.lab.start(job.target, job.arguments)]
            time.sleep(delay)
            programs.append(self.lab.start(job.target, job.arguments))
            self.judge_pair(kind, f"two resumed runs, {delay} s apart", job, programs)
        job = self.world.stage("demonstrations_locked")
        first = self.lab.start(job.target, job.arguments)
        _until((job.made / ".lock").is_file, first)
        self.judge_pair(kind, "two quickstarts", job, [first, self.lab.start(job.target, job.arguments)])
        job = self.world.resuming()
        (job.made / ".lock").write_text("1")
        ended = self.lab.run(job.target, job.arguments)
        self.judge_error(kind, "the lock file of a process that was killed", job, ended)

    def judge_pair(self, kind: str, name: str, job: Job, programs: Sequence[Program]) -> None:
        ended = sorted((program.wait() for program in programs), key=lambda e: e.code or 0)
        codes = [e.code for e in ended]
        wrong = differences(job) if 0 in codes else ["nothing was made"]
        if codes == [0, 0] and not wrong:
            self.note(kind, name, CONTINUED, "one after the other")
        elif codes != [0, 2]:
            self.note(kind, name, SILENT if codes == [0, 0] else UNCLEAR, f"exit codes {codes}: {ended[-1].err[-300:]}")
        elif wrong:
            self.note(kind, name, SILENT, f"the first one's result is other: {wrong[:4]}")
        else:
            clear = is_clear(ended[1], job.root)
            self.note(kind, name, CLEAR if clear else UNCLEAR, ended[1].message)
        self.world.done_with(job)

    # -- of another run ------------------------------------------------------------------------------------------------

    def strangers(self) -> None:
        """Checkpoints, caches and files of another run in the place of one's own."""
        kind = "of another run"
        other = self._other_run()
        probe = self.world.resuming()
        folder = Path("checkpoints") / BEFORE
        names = sorted(str(p.relative_to(probe.made)) for p in (probe.made / folder).rglob("*") if p.is_file())
        self.world.done_with(probe)
        for name in names:
            if (other / name).read_bytes() == (self.world.root / "references" / "stopped" / name).read_bytes():
                continue
            job = self.world.resuming()
            shutil.copy(other / name, job.made / name)
            ended = self.lab.run(job.target, job.arguments)
            self.judge_error(kind, f"{name} of another seed", job, ended, damaged=True)
        job = self.world.resuming()
        shutil.rmtree(job.made / folder)
        shutil.copytree(other / folder, job.made / folder)
        ended = self.lab.run(job.target, job.arguments)
        self.judge_error(kind, "a whole checkpoint of another seed", job, ended, damaged=True)
        stranger = self.world.base / "cache-1"
        for name, flag in (
            ("another teacher's cache, fresh", f"--craft.anchor_cache_dir={stranger}"),
            ("another policy, fresh", f"--policy.path={self.world.base / 'stranger'}"),
        ):
            job = self.world.training()
            flags = [flag if old.startswith(flag.split("=")[0]) else old for old in job.arguments]
            self.judge_refusal(kind, name, job, self.lab.run(job.target, flags))
        job = self.world.resuming()
        ended = self.lab.run(job.target, [*job.arguments, f"--craft.anchor_cache_dir={stranger}"])
        self.judge_refusal(kind, "another teacher's cache, resumed", job, ended)
        for name in ("manifest.json", "shard-00001.safetensors"):
            job = self.world.training(copied=True)
            shutil.copy(stranger / name, job.root / "world" / "cache-0" / name)
            self.judge_refusal(kind, f"{name} of another cache", job, self.lab.run(job.target, job.arguments))
        for name in ("data/chunk-000/file-000.parquet",):
            job = self.world.resuming()
            flags = [*job.arguments, f"--dataset.root={self.world.base / 'old-0'}"]
            self.judge_refusal(kind, "another dataset, resumed", job, self.lab.run(job.target, flags))
            del name

    def judge_refusal(self, kind: str, name: str, job: Job, ended: Ended) -> None:
        """A command that can only be refused: with its own inputs the work still comes to the same end."""
        if ended.code == 0:
            self.note(kind, name, SILENT, "taken")
        elif not is_clear(ended, job.root):
            self.note(kind, name, UNCLEAR, f"exit code {ended.code}: {' / '.join(ended.err.splitlines()[-2:])[-500:]}")
        else:
            for place, copy in job.pristine.items():
                shutil.rmtree(place)
                shutil.copytree(copy, place, symlinks=True)
            outcome, detail = follow(self.lab, job, None)
            right = outcome == CONTINUED
            self.note(kind, name, CLEAR if right else UNCLEAR, ended.message if right else f"afterwards: {detail}")
        self.world.done_with(job)

    def _other_run(self) -> Path:
        job = self.world.training()
        ended = self.lab.run(job.target, [*job.arguments, "--seed=77"])
        assert ended.code == 0, ended.err
        return job.made

    # -- all of it -----------------------------------------------------------------------------------------------------

    def kinds(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Name of a part → the part."""
        world = self.world
        half, whole = ("bit flipped", "cut in half"), ("emptied", "removed")

        def teaching() -> Job:
            return world.stage("teach", kept=("demonstrations",))

        def recording() -> Job:
            return world.stage("demonstrations")

        def reporting() -> Job:
            return world.stage("report")

        def preparing() -> Job:
            return world.stage("prepare", kept=("prepare",))

        yield "kill", lambda: self.kills("kill -9: checkpoint and metrics", "training", world.training, 44)
        yield "kill-cache", lambda: self.kills("kill -9: anchor cache", "cache", world.caching, 20)
        yield "kill-data", lambda: self.kills("kill -9: demonstrations", "demonstrations", recording, 8)
        yield "kill-teacher", lambda: self.kills("kill -9: teacher", "teacher", teaching, 14)
        yield "kill-report", lambda: self.kills("kill -9: scores, report, picture", "report", reporting, 14)
        yield "power", lambda: self.power_cuts("power cut: checkpoint", "training", world.training, 12)
        yield "power-cache", lambda: self.power_cuts("power cut: anchor cache", "cache", world.caching, 6)
        yield "power-teacher", lambda: self.power_cuts("power cut: teacher", "teacher", teaching, 4)
        yield "full", lambda: self.failures("disk full: checkpoint", "training", world.training, 14, ENOSPC)
        yield "full-cache", lambda: self.failures("disk full: anchor cache", "cache", world.caching, 8, ENOSPC)
        yield "full-report", lambda: self.failures("disk full: quickstart", "report", reporting, 5, ENOSPC)
        yield "full-data", lambda: self.failures("disk full: quickstart", "demonstrations", recording, 3, ENOSPC)
        yield "readonly", lambda: self.failures("read-only: checkpoint", "training", world.training, 8, EROFS)
        yield "readonly-cache", lambda: self.failures("read-only: anchor cache", "cache", world.caching, 5, EROFS)
        yield "readonly-report", lambda: self.failures("read-only: quickstart", "report", reporting, 3, EROFS)
        yield (
            "damage",
            lambda: self.damages("checkpoint", world.resuming, lambda job: job.made / "checkpoints" / BEFORE, half),
        )
        yield (
            "damage-more",
            lambda: self.damages("checkpoint", world.resuming, lambda job: job.made / "checkpoints" / BEFORE, whole, 6),
        )
        yield "damage-metrics", self.damaged_metrics
        for name, label in (("cache-0", "anchor cache"), ("teacher", "teacher"), ("new", "dataset")):
            yield (
                f"damage-{name}",
                lambda name=name, label=label: self.damages(
                    label, lambda: world.training(copied=True), lambda job: job.root / "world" / name, half
                ),
            )
        yield "damage-partial", self.damaged_partial_cache
        yield (
            "damage-kept",
            lambda: self.damages("quickstart's kept", preparing, lambda job: job.made / "kept", ("bit flipped",), 8),
        )
        yield "strangers", self.strangers
        yield "nan", lambda: self.not_finite(12)
        yield "signals", lambda: self.signals_at_times("SIGTERM, Ctrl-C: training", world.training, 8)
        yield (
            "signals-checkpoint",
            lambda: self.signals_at_points(
                "SIGTERM, Ctrl-C: checkpoint", "training", world.training, 10, after="checkpoints"
            ),
        )
        yield "signals-cache", lambda: self.signals_at_points("SIGTERM, Ctrl-C: cache", "cache", world.caching, 6)
        yield "workers", self.dying_workers
        yield "locks", self.two_at_once

    def damaged_metrics(self) -> None:
        for hurt in ("bit flipped", "cut in half", "emptied", "removed"):
            job = self.world.resuming()
            if hurt == "emptied":
                job = replace(job, pristine={})  # no copy: the file has to be moved away, as the error says
            damage(job.made / "metrics.jsonl", hurt, self.random)
            ended = self.lab.run(job.target, job.arguments)
            if hurt == "removed" and ended.code == 0:
                # Its history is gone, and was asked for by nobody: everything else must be the same.
                wrong = [name for name in differences(job) if name != "metrics.jsonl"]
                self.note(f"metrics: {hurt}", "metrics.jsonl", SILENT if wrong else CONTINUED, str(wrong))
                self.world.done_with(job)
            else:
                self.judge_error(f"metrics: {hurt}", "metrics.jsonl", job, ended, damaged=True)

    def damaged_partial_cache(self) -> None:
        """Files of an unfinished build that the next one goes on from."""
        points = self.recorded("cache", self.world.caching)
        late = next(point for point in points if "00003" in point.path)
        names = ("shard-00000.safetensors", "shard-00001.safetensors", "plan", "shard-00000.sha256")
        for name in names:
            for hurt in ("bit flipped", "cut in half"):
                job = self.world.caching()
                fault = {"root": job.root, "mode": "signal", "at": late.number, "value": signal.SIGKILL}
                self.lab.run(job.target, job.arguments, fault)
                damage(job.root / "cache.partial" / name, hurt, self.random)
                ended = self.lab.run(job.target, job.arguments)
                self.judge_error(f"unfinished cache: {hurt}", name, job, ended)

    def table(self) -> list[str]:
        """Counts by kind and outcome."""
        counted = Counter((o.kind, o.outcome) for o in self.outcomes)
        kinds = list(dict.fromkeys(o.kind for o in self.outcomes))
        width = max(map(len, kinds), default=0)
        short = ("clear error", "continued", "mended", "SILENT WRONG", "unclear")
        lines = [f"{'fault':<{width}} | faults | " + " | ".join(short)]
        for kind in kinds:
            row = [counted[kind, outcome] for outcome in OUTCOMES]
            cells = " | ".join(f"{n:>{len(title)}}" for n, title in zip(row, short, strict=True))
            lines.append(f"{kind:<{width}} | {sum(row):>6} | {cells}")
        row = [sum(counted[kind, outcome] for kind in kinds) for outcome in OUTCOMES]
        cells = " | ".join(f"{n:>{len(title)}}" for n, title in zip(row, short, strict=True))
        return [*lines, f"{'all':<{width}} | {sum(row):>6} | {cells}"]


def damage(file: Path, how: str, generator: random.Random) -> None:
    """Damage a file (through a link, what it points to)."""
    content = bytearray(file.read_bytes())
    if how == "removed":
        file.unlink()
        return
    if how == "emptied":
        content = bytearray()
    elif how == "cut in half":
        content = content[: len(content) // 2]
    elif content:
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    file.write_bytes(content)


def _with(job: Job, *arguments: str) -> Job:
    return replace(job, arguments=arguments)


def _shown(point: Point) -> str:
    return f"call {point.number}: {point.call} {point.path}"


def _children(pid: int) -> list[int]:
    try:
        found = [(Path(task) / "children").read_text().split() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []
    return [int(child) for children in found for child in children]


def _until(condition: Callable[[], bool], program: Program) -> bool:
    """Wait until something is the case; False where it never was."""
    ends = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < ends:
        if condition():
            return True
        if not Path(f"/proc/{program.pid}").exists() or _ended(program.pid):
            return False
        time.sleep(0.005)
    return False


def _ended(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
