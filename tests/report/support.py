"""Results as finished cells leave them, with outcomes that a test chooses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from craft_opt.bridge.report.cell import RESULT_FILE, STEPS, Cell
from craft_opt.bridge.report.methods import method_named
from craft_opt.bridge.report.suites import SUITES

ROLLOUTS = 10
MACHINE = {
    "machine": "2-core x86-64 machine", "cpu": "A CPU", "cores": 2, "threads": 1, "scheduling": "SCHED_OTHER",
    "python": "3.12.1", "torch": "2.11.0", "lerobot": "0.6.1",
}  # fmt: skip


def score(name: str, hits: int, rollouts: int = ROLLOUTS) -> dict[str, Any]:
    """The first ``hits`` rollouts succeed."""
    return {
        "skill": name,
        "successes": hits,
        "rollouts": rollouts,
        "action_ce": 1.0 - 0.5 * hits / rollouts,
        "action_mae": 0.2 - 0.1 * hits / rollouts,
        "outcomes": [number < hits for number in range(rollouts)],
    }


def result(
    suite: str = "S",
    method: str = "naive",
    budget: int = 0,
    seed: int = 0,
    *,
    hits: Sequence[Sequence[int]] = ((10, 10, 0), (2, 4, 9)),
    middle: float = 0.5,
    settings: Mapping[str, Any] | None = None,
    sizes: Mapping[str, Any] | None = None,
    stored_bytes: int | None = None,
) -> dict[str, Any]:
    """A cell whose successes after each stage are ``hits[stage][skill]``, with a curve of three points."""
    found = SUITES[suite]
    names, learned = [skill.name for skill in found.skills], found.learned
    cell = Cell(
        suite, method, budget, seed, dict(settings or {}), dict(sizes or {"rollouts": ROLLOUTS, "steps": STEPS})
    )
    stages = []
    for number in range(1, len(found.stages)):
        own = [k for k, stage in enumerate(learned) if stage == number]
        before, after = hits[number - 1], hits[number]
        stages.append(
            {
                "stage": number,
                "scores": [score(name, count) for name, count in zip(names, after, strict=True)],
                "curves": {str(k): [before[k] / ROLLOUTS, middle, after[k] / ROLLOUTS] for k in own},
                "step_seconds": 0.1 + 0.01 * seed,
                "setup_seconds": 1.0,
                "train_seconds": 40.0,
                "measure_seconds": 20.0,
                "peak_memory_gib": 1.25,
                "stored_bytes": 1000 * budget * number if stored_bytes is None else stored_bytes,
                "skipped_steps": 0,
                "last": {},
            }
        )
    return {
        "cell": asdict(cell),
        "skills": names,
        "learned": list(learned),
        "what": method_named(method).what,
        "settings": {"lr": 3e-4, "craft": dict(method_named(method).craft)},
        "sizes": {"steps": STEPS, "batch_size": 32, "rollouts": ROLLOUTS},
        "before": [score(name, count) for name, count in zip(names, hits[0], strict=True)],
        "stages": stages,
        "date": "2026-11-23",
        "commit": "0123456789abcdef",
        "machine": MACHINE,
    }


def put(output: Path, finished: Mapping[str, Any]) -> Path:
    """Lay a result where its cell would have left it."""
    folder = Cell(**finished["cell"]).folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT_FILE).write_text(json.dumps(finished))
    return folder
