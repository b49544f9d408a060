"""Two thousand steps with NaN batches, checkpoints at random steps, interruptions: nothing grows or differs."""

from __future__ import annotations

import json
import random
import signal
from dataclasses import dataclass
from pathlib import Path

from tests.faults.lab import Lab
from tests.faults.world import BEFORE, RESULT, World, run_result

STEPS = 2000
# Ctrl-C, Ctrl-C and kill -9 after these steps, in a process each.
PARTS = (500, 1000, 1500)
WARM_UP = 100
# A leaked graph, gradient or batch of the tiny policy is 100 KiB a step and more. The allocator still settles after the
# warm-up, by up to a MiB in all, which in a process of 400 steps looks steeper than in one of 2,000.
BYTES_A_STEP = 2048.0
SETTLING = 2**20
POISONED = 40
SOAK = "tests.faults.programs:soak"


@dataclass(frozen=True)
class Growth:
    """What a process held while it trained.

    Attributes:
        steps: First and last step measured.
        bytes_a_step: Slope of the resident memory, least squares, after ``WARM_UP`` steps.
        handles: Fewest and most open file handles.
        threads: Fewest and most threads.
    """

    steps: tuple[int, int]
    bytes_a_step: float
    handles: tuple[int, int]
    threads: tuple[int, int]

    @property
    def flat(self) -> bool:
        return (
            self.bytes_a_step < BYTES_A_STEP + SETTLING / (self.steps[1] - self.steps[0])
            and self.handles[1] - self.handles[0] <= 1
            and self.threads[0] == self.threads[1]
        )


def growth(file: Path) -> Growth:
    """Of one process, from its notes."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    first = rows[0]["step"]
    rows = [row for row in rows if row["step"] >= first + WARM_UP]
    steps, resident = [row["step"] for row in rows], [row["resident"] for row in rows]
    middle, mean = sum(steps) / len(steps), sum(resident) / len(resident)
    over = sum((s - middle) * (r - mean) for s, r in zip(steps, resident, strict=True))
    slope = over / sum((s - middle) ** 2 for s in steps)
    handles, threads = ([row[name] for row in rows] for name in ("handles", "threads"))
    return Growth((steps[0], steps[-1]), round(slope, 1), (min(handles), max(handles)), (min(threads), max(threads)))


def soak(world: World, lab: Lab) -> dict:
    """Run it in parts and in one go.

    Returns:
        Growth of every process, and names of what differs between the two runs (none).
    """
    generator = random.Random(2000)
    poison = json.dumps(sorted(generator.sample(range(1, STEPS + 1), POISONED)))
    found: dict = {
        "steps": STEPS,
        "poisoned_steps": POISONED,
        "bound_bytes_a_step": BYTES_A_STEP,
        "bytes_to_settle": SETTLING,
        "processes": [],
    }
    results = []
    for name, ends in (("in one go", ()), ("in parts", PARTS)):
        root = world.folder()
        out = root / "out"
        flags = [f for f in world.flags(root) if f not in (f"--steps={int(RESULT)}", f"--save_freq={int(BEFORE)}")]
        flags = [*flags, f"--steps={STEPS}", "--save_freq=1000", "--log_freq=50"]
        flags.remove("--log_freq=1")
        for k, last in enumerate((*ends, STEPS)):
            notes = root / f"notes-{k}"
            killed = last == PARTS[-1]
            ended = lab.run(SOAK, [notes, k, last if not killed else -last, poison, *flags])
            expected = 0 if last == STEPS else -signal.SIGKILL if killed else 130
            assert ended.code == expected, (ended.code, ended.err[-2000:])
            held = growth(notes)
            found["processes"].append({"run": name, **vars(held), "flat": held.flat})
            config = out / "checkpoints" / "last" / "pretrained_model" / "train_config.json"
            flags = ["--resume=true", f"--config_path={config}"]
        results.append(run_result(out, f"{STEPS:06d}"))
    whole, parts = results
    found["different"] = sorted(name for name in whole.keys() | parts.keys() if whole.get(name) != parts.get(name))
    return found
