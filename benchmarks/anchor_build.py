"""How fast ``craft-anchors build`` is against the bare forwards of its teacher on the same batches.

``python -m benchmarks.anchor_build [--output FILE]``: a teacher of the quickstart's size with random weights, frames of
the quickstart's size, each form of the cache. Everything that a build does besides the forwards is in its time, from
the first frame read to the folder's rename; loading the teacher is not. Under a minute on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from lerobot.datasets import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.utils.constants import ACTION, ACTION_TOKEN_MASK, ACTION_TOKENS, OBS_STATE
from lerobot.utils.feature_utils import dataset_to_policy_features

from craft_opt.bridge.anchor_shards import Teacher
from craft_opt.bridge.anchors import AnchorBuild, AnchorSource, prepare_build
from craft_opt.bridge.features import action_logits, generated_tokens, hidden_features
from craft_opt.bridge.policies import precision_context
from craft_opt.bridge.quickstart.configuration_pi0_fast_tiny import PI0FastTinyConfig
from craft_opt.bridge.quickstart.modeling_pi0_fast_tiny import PI0FastTinyPolicy
from craft_opt.bridge.quickstart.tokenizers import words_of
from craft_opt.bridge.report.provenance import provenance

TARGET = 0.9  # of the bare forwards' speed
TASKS = ("close the drawer", "press the button down")
IMAGE, IMAGE_SIDE = "observation.image", 64
FORMS: dict[str, dict[str, Any]] = {
    "hidden": {},
    "hidden, read by a process": {"num_workers": 1},
    "hidden, by reference": {"storage": "reference", "num_workers": 1},
    "token_ce, teacher's tokens": {"kind": "token_ce"},
    "token_ce, demonstrated tokens": {"kind": "token_ce", "token_source": "demonstrated", "num_workers": 1},
}


# The quickstart's teacher, of a millisecond a forward and anchor, and one of ten times its work. Everything besides the
# forward costs the same for both; for a real pi0_fast's, a thousand times the first's, it is less than either shows.
TEACHERS: dict[str, dict[str, int]] = {
    "quickstart": {},
    "larger": {"width": 384, "mlp_dim": 768, "head_dim": 96, "vision_width": 384, "vision_mlp_dim": 768},
}


def make_world(root: Path, frames: int, sizes: dict[str, int]) -> tuple[Path, AnchorSource]:
    """A saved teacher with the quickstart's sizes, but for those given, and a dataset of smooth frames for it."""
    rng = np.random.default_rng(0)
    vector = {"dtype": "float32", "shape": (4,), "names": ["x", "y", "z", "gripper"]}
    image = {"dtype": "image", "shape": (IMAGE_SIDE, IMAGE_SIDE, 3), "names": ["height", "width", "channels"]}
    features = {IMAGE: image, OBS_STATE: vector, ACTION: vector}
    writer = LeRobotDataset.create("local/frames", fps=10, features=features, root=root / "data", use_videos=False)
    for episode in range(8):
        phase, coarse = rng.uniform(0, 2 * np.pi, size=4), rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        blocks = np.kron(coarse, np.ones((IMAGE_SIDE // 8, IMAGE_SIDE // 8, 1), dtype=np.uint8))
        for step in range(-(-frames // 8)):
            wave = np.sin(phase + 0.1 * step).astype(np.float32)
            row = {IMAGE: np.roll(blocks, step, axis=1), OBS_STATE: wave[::-1].copy(), ACTION: wave}
            writer.add_frame({**row, "task": TASKS[episode % 2]})
        writer.save_episode()
    writer.finalize()
    meta = LeRobotDataset("local/frames", root=root / "data").meta
    found = dataset_to_policy_features(meta.features)
    config = PI0FastTinyConfig(
        input_features={key: feature for key, feature in found.items() if key != ACTION},
        output_features={ACTION: found[ACTION]},
        text_words=words_of(TASKS),
        device="cpu",
        **sizes,
    )
    torch.manual_seed(0)
    for part in (PI0FastTinyPolicy(config), *make_pre_post_processors(config, dataset_stats=meta.stats)):
        part.save_pretrained(root / "teacher")
    return root / "teacher", AnchorSource("local/frames", root / "data")


@torch.no_grad()
def bare_forward(teacher: Teacher, batch: dict[str, Any]) -> Any:
    """The forwards that a build cannot do without, and nothing else."""
    with precision_context(teacher.policy.config):
        if teacher.token_source == "teacher":
            batch[ACTION_TOKENS], batch[ACTION_TOKEN_MASK] = generated_tokens(teacher.policy, batch)
        if teacher.spec is None:
            return action_logits(teacher.policy, batch)
        return hidden_features(teacher.policy, batch, teacher.spec)


def measure(build: AnchorBuild, folder: Path, repeats: int) -> dict[str, Any]:
    """Bare forwards and whole builds in turn, so that what slows one down slows the other."""
    teacher, size = build.teacher, build.batch_size
    chunks = [build.frames[start : start + size] for start in range(0, len(build.frames), size)]
    frames = [teacher.collect([build.readers[n](row) for n, row in chunk]) for chunk in chunks]
    batches = [teacher.process(part) for part in frames]

    def forwards() -> None:
        for batch in batches:
            bare_forward(teacher, batch)

    forwards()  # the first one allocates
    bare, built = [], []
    for repeat in range(repeats):
        bare.append(_timed(forwards))
        whole = replace(build, output=folder / f"cache-{repeat}")
        built.append(_timed(lambda run=whole.run: run(progress=False)))
    ratios = [one[0] / other[0] for one, other in zip(bare, built, strict=True)]
    return {
        "speed_over_bare": statistics.median(ratios),
        "speed_over_bare_each": ratios,
        "bare_seconds": [wall for wall, _ in bare],
        "build_seconds": [wall for wall, _ in built],
        "bare_cpu_seconds": [cpu for _, cpu in bare],
        "build_cpu_seconds": [cpu for _, cpu in built],
        "anchors_per_second": len(build.frames) / statistics.median(wall for wall, _ in built),
    }


def _timed(run: Callable[[], Any]) -> tuple[float, float]:
    """(wall, processor) seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Measure every form and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    parser.add_argument("--anchors", type=int, default=800, help="twice what the quickstart caches")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--teacher", choices=TEACHERS, default="quickstart")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        policy, source = make_world(root, 2 * args.anchors, TEACHERS[args.teacher])
        for number, (form, settings) in enumerate(FORMS.items()):
            settings = {"num_samples": args.anchors, "batch_size": args.batch_size, **settings}
            build = prepare_build(
                root / "unused", policy, [source], policy_overrides=[f"--device={args.device}"], **settings
            )
            found[form] = measure(build, root / str(number), args.repeats)
            ratio = found[form]["speed_over_bare"]
            print(f"{form:<32} {ratio:6.1%} of the bare forwards' speed (wanted: {TARGET:.0%})", flush=True)
    if args.output is not None:
        content = {
            **provenance(),
            "anchors": args.anchors,
            "batch_size": args.batch_size,
            "device": args.device,
            "teacher": args.teacher,
            "forms": found,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
