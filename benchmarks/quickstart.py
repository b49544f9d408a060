"""Run the quickstart for several seeds with and without retention, and write one results file.

``python -m benchmarks.quickstart --seeds 0 1 2``: about seven minutes a seed on two cores.
Runs that are finished in the output folder already are taken as they are; a stopped one goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.harness import RESULTS, commit, machine

MODES = ("none", "hidden")
TRAIN = Path(__file__).parent.parent / "train.py"


def finished(output: Path, mode: str, seed: int) -> dict[str, Any] | None:
    """The last finished run of a mode and seed."""
    folders = sorted(output.glob(f"{mode}-seed{seed}-*/result.json"))
    return json.loads(folders[-1].read_text()) if folders else None


def run(output: Path, mode: str, seed: int) -> dict[str, Any]:
    """Run one cell, or take it where it is finished."""
    done = finished(output, mode, seed)
    if done is None:
        arguments = ["--retention-mode", mode, "--seed", str(seed), "--output_dir", str(output)]
        subprocess.run([sys.executable, str(TRAIN), *arguments], check=True)
        done = finished(output, mode, seed)
        assert done is not None, "the quickstart writes its result last"
    return done


def wilson(successes: int, rollouts: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a success rate (Wilson 1927)."""
    rate, squared = successes / rollouts, z * z
    centre = (rate + squared / (2 * rollouts)) / (1 + squared / rollouts)
    half = z / (1 + squared / rollouts) * math.sqrt(rate * (1 - rate) / rollouts + squared / (4 * rollouts**2))
    # Rounding must not leave [0, 1] where all or none succeeded.
    return max(0.0, centre - half), min(1.0, centre + half)


def table(cells: Sequence[dict[str, Any]], old: int) -> str:
    """A markdown table: success over all seeds, with intervals over rollouts and deviations over seeds."""
    lines = [
        "| retention | skill | before | after | 95 % interval | over seeds | action CE before → after |",
        "|---|---|---|---|---|---|---|",
    ]
    for mode in MODES:
        chosen = [cell for cell in cells if cell["mode"] == mode]
        for i, first in enumerate(chosen[0]["before"]):
            before = [cell["before"][i] for cell in chosen]
            after = [cell["after"][i] for cell in chosen]
            rates = [score["successes"] / score["rollouts"] for score in after]
            hits, rollouts = sum(s["successes"] for s in after), sum(s["rollouts"] for s in after)
            low, high = wilson(hits, rollouts)
            start = sum(s["successes"] for s in before) / sum(s["rollouts"] for s in before)
            spread = f"{mean(rates):.2f} ± {stdev(rates):.2f}" if len(rates) > 1 else f"{rates[0]:.2f}"
            entropy = f"{mean(s['action_ce'] for s in before):.2f} → {mean(s['action_ce'] for s in after):.2f}"
            kind = "old" if i < old else "new"
            lines.append(
                f"| {mode} | {first['skill']} ({kind}) | {start:.2f} | {hits / rollouts:.2f} ({hits}/{rollouts}) | "
                f"{low:.2f} to {high:.2f} | {spread} | {entropy} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/quickstart"))
    arguments = parser.parse_args()
    cells = [run(arguments.output_dir, mode, seed) for seed in arguments.seeds for mode in MODES]
    date = datetime.date.today().isoformat()
    seeds = " ".join(map(str, arguments.seeds))
    result = {
        "benchmark": "quickstart",
        "date": date,
        "commit": commit(),
        "command": f"python -m benchmarks.quickstart --seeds {seeds}",
        "machine": machine(),
        "cells": cells,
    }
    file = RESULTS / f"quickstart_{date}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(table(cells, old=2))
    print(f"written to {file}")


if __name__ == "__main__":
    main()
