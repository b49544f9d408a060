"""Run the quickstart in several variants and seeds, and write one results file.

``python -m benchmarks.quickstart --seeds 0 1 2``: the figures of docs/quickstart.md, five minutes a seed on a core.
``python -m benchmarks.quickstart --table --seeds 0 1 2 --jobs 2``: every retention mode, every pooling, what happens
between the measuring steps, and both choices of normalisation statistics; shorter runs, one to two minutes a cell.
``python -m benchmarks.quickstart --print benchmarks/results/<file>.json``: its tables, as markdown.

Every cell is a process of one thread. Cells that are finished in the output folder already are taken as they are; a
stopped one goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.harness import RESULTS, write_document
from craft_opt.bridge.report.metrics import wilson
from craft_opt.bridge.report.provenance import machine

Cell = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """What a row of the table does differently.

    Attributes:
        mode: ``none``, ``hidden`` or ``token_ce``.
        craft: Settings of the method, on top of the quickstart's.
        settings: Sizes and choices of the quickstart, on top of its own.
    """

    mode: str
    craft: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


_POOLINGS = ("mean_image_tokens", "mean_masked", "last_token", "cls_token", "none")
_DATASET = {"normalization_stats": "dataset"}
# "hidden" is the quickstart's own: action_tokens, retention at every step, the teacher's statistics.
VARIANTS: dict[str, Variant] = {
    "none": Variant("none"),
    "hidden": Variant("hidden"),
    **{f"hidden-{pooling}": Variant("hidden", settings={"pooling": pooling}) for pooling in _POOLINGS},
    "token_ce-kl": Variant("token_ce", {"token_loss": "kl"}),
    "token_ce-ce": Variant("token_ce", {"token_loss": "ce"}),
    "hidden-k5-skip": Variant("hidden", {"retention_freq": 5}),
    "hidden-k5-reuse": Variant("hidden", {"retention_freq": 5, "off_steps": "reuse"}),
    "hidden-k5-reuse0.8": Variant("hidden", {"retention_freq": 5, "off_steps": "reuse", "reuse_decay": 0.8}),
    "none-dataset-stats": Variant("none", settings=_DATASET),
    "hidden-dataset-stats": Variant("hidden", settings=_DATASET),
    "token_ce-kl-dataset-stats": Variant("token_ce", {"token_loss": "kl"}, _DATASET),
}
HEADLINE = ("none", "hidden")
# A cell of a minute: fewer steps than the quickstart takes, and anchors half the task batch.
TABLE_SETTINGS: dict[str, Any] = {"steps": 400}
TABLE_CRAFT: dict[str, Any] = {"anchor_batch_size": 16}
# Every stage at its smallest, for tests of this file.
MINIATURE: dict[str, Any] = {
    "episodes": 2,
    "held_out_episodes": 1,
    "teacher_steps": 3,
    "steps": 3,
    "anchors": 8,
    "rollouts": 1,
}


@dataclass(frozen=True)
class Job:
    """A cell, or (without a variant) what all cells of a seed start from."""

    output: Path
    seed: int
    variants: tuple[str, ...]
    settings: Mapping[str, Any]
    craft: Mapping[str, Any]

    def quickstarts(self) -> Iterator[Any]:
        """The quickstart of every variant."""
        from craft_opt import CraftConfig
        from craft_opt.bridge.quickstart.run import CRAFT_DEFAULTS, Quickstart
        from craft_opt.bridge.quickstart.settings import QuickstartSettings

        for name in self.variants:
            variant = VARIANTS[name]
            mode = {"enabled": variant.mode != "none"}
            if variant.mode != "none":
                mode["retention_mode"] = variant.mode
            craft = CraftConfig(**{**CRAFT_DEFAULTS, **self.craft, **variant.craft, **mode})
            settings = QuickstartSettings(**{"seed": self.seed, **self.settings, **variant.settings})
            yield Quickstart(settings, craft, variant.mode, self.output, name)


def prepare(job: Job) -> float:
    """Data, teacher and every anchor cache of a seed: two cells at once must not make one of them twice."""
    began = time.perf_counter()
    with _logged(job.output / "logs" / f"prepare-seed{job.seed}.log"):
        for quickstart in job.quickstarts():
            made = quickstart.prepare()
            if quickstart.craft.enabled:
                quickstart.anchors(made)
    return time.perf_counter() - began


def run(job: Job) -> Cell:
    """Run one cell, or take it where it is finished."""
    (quickstart,) = job.quickstarts()
    (name,) = job.variants
    folder = quickstart.finished()
    if folder is None:
        with _logged(job.output / "logs" / f"{name}-seed{job.seed}.log"):
            folder = quickstart.run()
    result = json.loads((folder / "result.json").read_text())
    lines = (folder / "training" / "metrics.jsonl").read_text().splitlines()
    measured = [step for step in map(json.loads, lines) if step.get("retention_loss") is not None]
    last = {key: measured[-1][key] for key in ("retention_loss", "lambda", "epsilon")} if measured else {}
    return {"variant": name, "steps": quickstart.settings.steps, **result, "last": last}


@contextlib.contextmanager
def _logged(file: Path) -> Iterator[None]:
    """The quickstart's own lines go into a file: the console has one line a cell."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def run_all(output: Path, variants: Sequence[str], seeds: Sequence[int], jobs: int, **sizes: Any) -> list[Cell]:
    """Every variant of every seed, ``jobs`` processes side by side."""
    # Spawned processes read it when they import torch: more threads than cores slow small models down many times over.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    began = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    cells: dict[tuple[str, int], Cell] = {}
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool:
        first = [pool.submit(prepare, Job(output, seed, tuple(variants), **sizes)) for seed in seeds]
        for seed, future in zip(seeds, first, strict=True):
            print(f"seed {seed}: data, teacher and anchors {future.result():.0f} s", flush=True)
        waiting = {
            pool.submit(run, Job(output, seed, (name,), **sizes)): (name, seed) for seed in seeds for name in variants
        }
        started = time.perf_counter()
        for future in as_completed(waiting):
            name, seed = waiting[future]
            cell = cells[name, seed] = future.result()
            left = (time.perf_counter() - started) / len(cells) * (len(waiting) - len(cells))
            outcome = ", ".join(f"{score['skill']} {score['successes']}/{score['rollouts']}" for score in cell["after"])
            print(
                f"[{len(cells)}/{len(waiting)}] {name}, seed {seed}: {outcome} | {left / 60:.1f} min left", flush=True
            )
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes", flush=True)
    return [cells[name, seed] for seed in seeds for name in variants]


# -- tables ----------------------------------------------------------------------------------------------------------


def _by_variant(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Variant → its cells; files of before there were variants have modes only."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.get("variant", cell["mode"]), []).append(cell)
    return groups


def _seconds(cell: Cell) -> float:
    """Seconds of fine-tuning, anchors included."""
    return sum(value for what, value in cell["seconds"].items() if what.startswith("Fine-tuning"))


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def table(cells: Sequence[Cell], old: int) -> str:
    """A markdown table: success over all seeds, with intervals over rollouts and deviations over seeds."""
    lines = [
        "| retention | skill | before | after | 95 % interval | over seeds | action CE before → after |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, chosen in _by_variant(cells).items():
        for i, first in enumerate(chosen[0]["before"]):
            before = [cell["before"][i] for cell in chosen]
            after = [cell["after"][i] for cell in chosen]
            rates = [score["successes"] / score["rollouts"] for score in after]
            hits, rollouts = sum(s["successes"] for s in after), sum(s["rollouts"] for s in after)
            low, high = wilson(hits, rollouts)
            start = sum(s["successes"] for s in before) / sum(s["rollouts"] for s in before)
            entropy = f"{mean(s['action_ce'] for s in before):.2f} → {mean(s['action_ce'] for s in after):.2f}"
            kind = "old" if i < old else "new"
            lines.append(
                f"| {variant} | {first['skill']} ({kind}) | {start:.2f} | {hits / rollouts:.2f} ({hits}/{rollouts}) | "
                f"{low:.2f} to {high:.2f} | {_spread(rates)} | {entropy} |"
            )
    return "\n".join(lines)


def summary(cells: Sequence[Cell], old: int) -> str:
    """A markdown table with a row a variant: old and new success, time, and where the constraint ended."""
    lines = [
        "| variant | old skills | 95 % interval | over seeds | new skill | L_ret at the end | λ at the end | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def rate(scores: Sequence[Mapping[str, Any]]) -> float:
        return sum(s["successes"] for s in scores) / sum(s["rollouts"] for s in scores)

    for variant, chosen in _by_variant(cells).items():
        olds = [score for cell in chosen for score in cell["after"][:old]]
        hits, rollouts = sum(s["successes"] for s in olds), sum(s["rollouts"] for s in olds)
        low, high = wilson(hits, rollouts)
        ends = [cell["last"] for cell in chosen if cell.get("last")]
        drift, lam = ("–", "–")
        if ends:
            drift = f"{mean(end['retention_loss'] for end in ends):.3f}"
            lam = f"{mean(end['lambda'] for end in ends):.2f}"
        lines.append(
            f"| {variant} | {hits / rollouts:.2f} ({hits}/{rollouts}) | {low:.2f} to {high:.2f} | "
            f"{_spread([rate(cell['after'][:old]) for cell in chosen])} | "
            f"{_spread([rate(cell['after'][old:]) for cell in chosen])} | {drift} | {lam} | "
            f"{mean(_seconds(cell) for cell in chosen):.0f} |"
        )
    return "\n".join(lines)


def markdown(document: Mapping[str, Any]) -> str:
    """Both tables of a results file."""
    cells, old = document["cells"], document.get("old_skills", 2)
    return f"{summary(cells, old)}\n\n{table(cells, old)}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--output-dir", type=Path, default=Path("outputs/quickstart"))
    add("--table", action="store_true", help="all variants, in shorter runs")
    add("--variants", nargs="+", choices=list(VARIANTS), help="these only")
    add("--steps", type=int, help="steps of fine-tuning")
    add("--rollouts", type=int, help="closed-loop episodes of each skill")
    add("--jobs", type=int, default=1, help="cells side by side, a core each")
    add("--miniature", action="store_true", help="every stage at its smallest: the figures mean nothing")
    add("--results", type=Path, default=RESULTS, help="folder of the results file")
    add("--print", type=Path, dest="shown", help="print the tables of a results file and do nothing else")
    arguments = parser.parse_args(argv)
    if arguments.shown:
        print(markdown(json.loads(arguments.shown.read_text())))
        return
    settings = dict(TABLE_SETTINGS) if arguments.table else {}
    craft = dict(TABLE_CRAFT) if arguments.table else {}
    if arguments.miniature:
        settings |= MINIATURE
        craft |= {"anchor_batch_size": 4}
    settings |= {name: value for name in ("steps", "rollouts") if (value := getattr(arguments, name)) is not None}
    variants = arguments.variants or (tuple(VARIANTS) if arguments.table else HEADLINE)
    sizes = {"settings": settings, "craft": craft}
    cells = run_all(arguments.output_dir, variants, arguments.seeds, arguments.jobs, **sizes)
    name = "quickstart-table" if arguments.table else "quickstart"
    options = "".join(f" --{o}" for o in ("table", "miniature") if getattr(arguments, o))
    options += "".join(f" --{o} {v}" for o in ("steps", "rollouts") if (v := getattr(arguments, o)) is not None)
    options += f" --variants {' '.join(arguments.variants)}" if arguments.variants else ""
    seeds = " ".join(map(str, arguments.seeds))
    file, result = write_document(
        arguments.results,
        name,
        f"python -m benchmarks.quickstart{options} --seeds {seeds} --jobs {arguments.jobs}",
        machine={**machine(), "threads": 1},
        old_skills=2,
        sizes=sizes,
        cells=cells,
    )
    print(markdown(result))
    print(f"written to {file}")


if __name__ == "__main__":
    main()
