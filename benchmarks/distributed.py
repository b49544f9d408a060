"""What averaging the retention gradient costs: a training step of two gloo processes with and without it.

``python -m benchmarks.distributed``: DistributedDataParallel, a task and a retention batch each, K = 1, about a minute.
``none`` lets every process keep its own retention gradient (a group of one process), which is wrong and costs nothing;
``beside the forward`` averages as ``opt.retention(loss)`` does, while the task's forward runs; ``in the step`` averages
when ``step()`` needs it (``sync=False``). Rounds go through the variants in an order that turns; a variant's ratio is
the median over rounds of its time over that of ``none`` in the same round.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import RESULTS, quantile, write_document
from craft_opt import CraftConfig, CraftOptimizer

PROCESSES = 2
VARIANTS = ("none", "beside the forward", "in the step")
# Layers of a multilayer perceptron: 1 and 8 million parameters.
WIDTHS = {"1 M": (512, 4), "8 M": (1024, 8)}
BATCH = 128


def measure(rank: int, rounds: int, folder: str) -> None:
    """One process: the same steps as the others; the first writes what it took."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(minutes=5))
    alone = [dist.new_group([other]) for other in range(PROCESSES)][rank]
    rows = {}
    for name, (width, depth) in WIDTHS.items():
        steps = {variant: _make_step(width, depth, variant, alone, rank) for variant in VARIANTS}
        seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for turn in range(rounds + 2):
            for k in range(len(VARIANTS)):
                variant = VARIANTS[(turn + k) % len(VARIANTS)]
                dist.barrier()
                started = time.perf_counter()
                steps[variant]()
                if turn >= 2:  # the first rounds lay out, compile and connect
                    seconds[variant].append(time.perf_counter() - started)
        parameters = width * width * depth + width * depth
        rows[name] = {"parameters": parameters, "averaged_bytes": 4 * parameters} | summary(seconds)
    if rank == 0:
        torch.save(rows, Path(folder) / "rows.pt")
    dist.barrier()
    dist.destroy_process_group()


def _make_step(width: int, depth: int, variant: str, alone: Any, rank: int) -> Any:
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    model = nn.Sequential(*layers)
    ddp = DistributedDataParallel(model)
    opt = CraftOptimizer(
        model.parameters(), lr=1e-4, config=CraftConfig(), process_group=alone if variant == "none" else None
    )
    generator = torch.Generator().manual_seed(rank)
    new, old = (torch.randn(n, width, generator=generator) for n in (BATCH, BATCH // 2))

    def step() -> None:
        loss = model(old).square().mean()
        with opt.retention(loss, sync=variant == "beside the forward"):
            loss.backward()
        (ddp(new) - 1.0).square().mean().backward()
        opt.step()
        opt.zero_grad()

    return step


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and ratios to ``none`` of the same round with their quartiles."""
    found: dict[str, Any] = {"milliseconds": {name: 1e3 * median(times) for name, times in seconds.items()}}
    for name in VARIANTS[1:]:
        ratios = [a / b for a, b in zip(seconds[name], seconds["none"], strict=True)]
        found[name] = {"ratio": median(ratios), "quartiles": [quantile(ratios, 0.25), quantile(ratios, 0.75)]}
    return found


def run(rounds: int) -> dict[str, Any]:
    """All rows, from new processes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (rounds, folder), nprocs=PROCESSES)
        rows: dict[str, Any] = torch.load(Path(folder) / "rows.pt", weights_only=True)
    return rows


def table(rows: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = ["| parameters | averaged | ms without | beside the forward | in the step |", "|---|---|---|---|---|"]
    for row in rows.values():
        cells = [
            f"{row[name]['ratio']:.2f} ({row[name]['quartiles'][0]:.2f} to {row[name]['quartiles'][1]:.2f})"
            for name in VARIANTS[1:]
        ]
        bytes_ = f"{row['averaged_bytes'] / 1e6:.1f} MB"
        lines.append(
            f"| {row['parameters'] / 1e6:.1f} M | {bytes_} | {row['milliseconds']['none']:.1f} | "
            f"{cells[0]} | {cells[1]} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the results, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results file")
    options = parser.parse_args(argv)
    rows = run(options.rounds)
    file, _ = write_document(
        options.output,
        "distributed-cpu",
        f"python -m benchmarks.distributed --rounds {options.rounds}",
        processes=PROCESSES,
        batch=BATCH,
        rows=rows,
    )
    print(table(rows))
    print(f"written: {file.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
