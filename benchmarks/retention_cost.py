"""What retention costs: the time and memory of a training step with it over the naive run's, on the tiny pi0_fast.

``python -m benchmarks.retention_cost``: task batch 32, anchor batch 16, random images; less than two minutes on a core.
A step is the loop's own, from the next batch of the dataset to the updated parameters; data lie decoded in memory. A
round is one cycle of K steps of every variant, in an order that turns from round to round, and a variant's ratio is the
median over rounds of its cycle's time over the naive cycle of the same round: what slows the machine for a while slows
both. ``--print FILE`` prints the table of a results file.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.harness import RESULTS, peak_bytes, quantile, synchronize, write_document

TASK_BATCH, ANCHOR_BATCH, CYCLE = 32, 16, 5
EPISODES, FRAMES, ANCHORS = 4, 60, 96
REPO = "craft/retention-cost"
# Ratio that a variant must not exceed, by K; reuse does a projection more in the off-steps.
TARGETS = {5: 1.15, 1: 1.65}
VARIANTS: dict[str, dict[str, Any]] = {
    "naive": {"enabled": False},
    **{
        f"{mode} K={k} {off}".strip(): {"retention_mode": mode, "retention_freq": k, "off_steps": off or "skip"}
        for mode in ("hidden", "token_ce")
        for k, off in ((1, ""), (5, "skip"), (5, "reuse"))
    },
}


def make_world(folder: Path) -> dict[str, Path]:
    """A dataset of random images, an untrained teacher of the quickstart's size, a cache of each kind."""
    import torch
    from lerobot.configs import FeatureType
    from lerobot.datasets import LeRobotDataset
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.utils.feature_utils import dataset_to_policy_features

    from craft_opt.bridge.anchors import AnchorSource, build_cache
    from craft_opt.bridge.quickstart.configuration_pi0_fast_tiny import PI0FastTinyConfig
    from craft_opt.bridge.quickstart.modeling_pi0_fast_tiny import PI0FastTinyPolicy
    from craft_opt.bridge.quickstart.skills import ACTION_KEY, IMAGE_KEY, STATE_KEY, features
    from craft_opt.bridge.quickstart.tokenizers import words_of

    generator = np.random.default_rng(0)
    writer = LeRobotDataset.create(REPO, fps=10, features=features(), root=folder / "data", use_videos=False)
    side = features()[IMAGE_KEY]["shape"][0]
    for _ in range(EPISODES):
        for step in range(FRAMES):
            wave = np.sin(0.2 * step + np.arange(4)).astype(np.float32)
            image = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            writer.add_frame({IMAGE_KEY: image, STATE_KEY: wave, ACTION_KEY: wave, "task": "close the drawer"})
        writer.save_episode()
    writer.finalize()
    dataset = LeRobotDataset(REPO, root=folder / "data")
    found = dataset_to_policy_features(dataset.meta.features)
    torch.manual_seed(0)
    config = PI0FastTinyConfig(
        text_words=words_of(dataset.meta.tasks.index),
        input_features={k: f for k, f in found.items() if f.type is not FeatureType.ACTION},
        output_features={k: f for k, f in found.items() if f.type is FeatureType.ACTION},
        device="cpu",
    )
    pre, post = make_pre_post_processors(config, dataset_stats=dataset.meta.stats)
    for part in (PI0FastTinyPolicy(config), pre, post):
        part.save_pretrained(folder / "teacher")
    for kind, settings in (("hidden", {}), ("token_ce", {"top_k": 8})):
        build_cache(
            folder / kind,
            folder / "teacher",
            [AnchorSource(REPO, folder / "data")],
            num_samples=ANCHORS,
            kind=kind,
            policy_overrides=["--device=cpu"],
            progress=False,
            **settings,
        )
    return {name: folder / name for name in ("data", "teacher", "hidden", "token_ce")}


def make_stepper(name: str, world: Mapping[str, Path], folder: Path, device: str) -> tuple[Callable[[], None], Any]:
    """The loop's step of a variant, and the run that it works on."""
    from craft_opt import CraftConfig
    from craft_opt.bridge.config import fine_tune_config
    from craft_opt.bridge.loop import _processed, _task_batches, prepare
    from craft_opt.bridge.policies import precision_context
    from craft_opt.bridge.step import train_step

    craft = {"anchor_batch_size": ANCHOR_BATCH, **VARIANTS[name]}
    if craft.get("enabled", True):
        craft["anchor_cache_dir"] = str(world[craft["retention_mode"]])
    run = prepare(
        fine_tune_config(
            world["teacher"],
            REPO,
            world["data"],
            folder / name.replace(" ", "-"),
            craft=CraftConfig(**craft),
            device=device,
            steps=10**6,
            batch_size=TASK_BATCH,
            seed=0,
        )
    )
    batches, precision = _task_batches(run), precision_context(run.cfg.policy)

    def step() -> None:
        train_step(run.parts, _processed(run, batches), precision, step=1, data_s=0.0)

    return step, run


def measure(rounds: int, device: str, folder: Path) -> list[dict[str, Any]]:
    """Seconds of every round's cycle and peak bytes of a measuring step, variant by variant."""
    import torch

    torch.set_num_threads(1)
    where = torch.device(device)
    world = make_world(folder)
    steppers = {name: make_stepper(name, world, folder, device) for name in VARIANTS}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in range(-1, rounds):  # the first is a warm-up
        for name in _turned(list(VARIANTS), number):
            step, _ = steppers[name]
            synchronize(where)
            began = time.perf_counter()
            for _ in range(CYCLE):
                step()
            synchronize(where)
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    rows = []
    for name, (step, run) in steppers.items():
        numel = sum(p.numel() for p in run.parts.policy.parameters() if p.requires_grad)
        # Every variant is at the start of a cycle here: with retention this step measures L_ret.
        rows.append({"variant": name, "seconds": seconds[name], "peak": peak_bytes(step, where), "numel": numel})
    return rows


def _turned(names: list[str], number: int) -> Iterator[str]:
    start = number % len(names)
    yield from names[start:]
    yield from names[:start]


def with_ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with their ratio over the naive run, paired by round."""
    (naive,) = (row for row in rows if row["variant"] == "naive")
    result = []
    for row in rows:
        ratios = [own / base for own, base in zip(row["seconds"], naive["seconds"], strict=True)]
        k = VARIANTS[row["variant"]].get("retention_freq", 0)
        result.append(
            {
                **row,
                "ms": 1e3 * median(row["seconds"]) / CYCLE,
                "ratio": median(ratios),
                "quartiles": [quantile(ratios, 0.25), quantile(ratios, 0.75)],
                "target": TARGETS.get(k),
                "extra_bytes": row["peak"] - naive["peak"],
            }
        )
    return result


def markdown(document: Mapping[str, Any]) -> str:
    """The table of a results file."""
    lines = [
        "| step | ms | over naive | quartiles | target | peak of a measuring step over naive, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in with_ratios(document["rows"]):
        low, high = row["quartiles"]
        target = f"≤ {row['target']}" if row["target"] else "–"
        lines.append(
            f"| {row['variant']} | {row['ms']:.0f} | {row['ratio']:.2f} | {low:.2f} to {high:.2f} | {target} | "
            f"{row['extra_bytes'] / 2**20:.1f} |"
        )
    buffer = document["rows"][0]["numel"] * 4 / 2**20
    held = "the peak leaves out what is held between steps, that buffer among it"
    lines.append(f"\nOne fp32 gradient buffer is {buffer:.1f} MiB; {held}.")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=15, help="cycles of K = 5 steps of every variant")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--results", type=Path, default=RESULTS, help="folder of the results file")
    add("--print", type=Path, dest="shown", help="print the table of a results file and do nothing else")
    arguments = parser.parse_args(argv)
    if arguments.shown:
        print(markdown(json.loads(arguments.shown.read_text())))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments.rounds, arguments.device, Path(folder))
    file, document = write_document(
        arguments.results,
        f"retention-cost-{arguments.device}",
        f"python -m benchmarks.retention_cost --rounds {arguments.rounds} --device {arguments.device}",
        task_batch=TASK_BATCH,
        anchor_batch=ANCHOR_BATCH,
        rows=rows,
    )
    print(markdown(document))
    print(f"written to {file}")


if __name__ == "__main__":
    main()
