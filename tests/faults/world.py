"""The small world of the campaign: two datasets, a teacher, its cache, and the jobs that are disturbed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from pyarrow import parquet

from tests.faults.judge import Job
from tests.faults.lab import ANCHORS, TRAIN, Lab

STEPS, SAVE_EVERY = 4, 2
RESULT = f"{STEPS:06d}"
BEFORE = f"{SAVE_EVERY:06d}"


def checksum(file: Path) -> str:
    """Of a file's content; the order of metadata in a header, which safetensors and Arrow shuffle, does not count."""
    if file.suffix == ".safetensors":
        content = file.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        # That of the cache's manifest, which names the teacher's folder.
        header.get("__metadata__", {}).pop("cache_digests", None)
        return hashlib.sha256(json.dumps(header, sort_keys=True).encode() + content[8 + size :]).hexdigest()
    if file.name == "config.json":
        config = json.loads(file.read_text())
        del config["pretrained_path"]  # the teacher, or the checkpoint that it went on from
        return json.dumps(config)
    if file.suffix == ".parquet":
        return hashlib.sha256(repr(parquet.read_table(file).to_pylist()).encode()).hexdigest()
    return hashlib.sha256(file.read_bytes()).hexdigest()


def metrics(file: Path) -> str:
    """Every step's numbers but the times, and each step once."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return json.dumps([{k: v for k, v in row.items() if k not in ("update_s", "data_s")} for row in rows])


def run_result(out: Path, step: str = RESULT) -> dict[str, str]:
    """What a training run is: weights, moments, λ, generators, schedule, processors, metrics."""
    folder = out / "checkpoints" / step
    varying = {"train_config.json", "checksums.json"}
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in varying]
    found = {str(path.relative_to(folder)): checksum(path) for path in files}
    found["last"] = os.readlink(folder.parent / "last")
    found["metrics.jsonl"] = metrics(out / "metrics.jsonl") if (out / "metrics.jsonl").is_file() else ""
    return found


def folder_result(folder: Path) -> dict[str, str]:
    """Every file of a folder."""
    # The configuration names the folder that it was made in, and the checksums hold that of the configuration.
    varying = {"train_config.json", "checksums.json", "result.json"}
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in varying]
    return {str(path.relative_to(folder)): checksum(path) for path in files}


class World:
    """Jobs in fresh folders.

    Args:
        root: Folder of the campaign.
        lab: Starts programs.
    """

    def __init__(self, root: Path, lab: Lab) -> None:
        self.root, self.lab = root, lab
        self.base = root / "world"
        self.cases = 0
        self._expected: dict[str, dict[str, str]] = {}

    def folder(self) -> Path:
        self.cases += 1
        folder = self.root / "cases" / f"{self.cases:04d}"
        folder.mkdir(parents=True)
        return folder

    def done_with(self, job: Job) -> None:
        shutil.rmtree(job.root)

    def flags(self, root: Path, *extra: str, base: Path | None = None, workers: bool = False) -> tuple[str, ...]:
        base = base or self.base
        # Random image transforms draw from torch's global generator at every sample: its state must come back, too.
        # (Not with workers, whose generators start anew in a resumed run.)
        forked = ["--num_workers=1", "--dataloader_multiprocessing_context=fork", "--persistent_workers=true"]
        transforms = forked if workers else ["--dataset.image_transforms.enable=true"]
        return (
            f"--policy.path={base / 'teacher'}",
            "--policy.device=cpu",
            "--dataset.repo_id=local/tiny",
            f"--dataset.root={base / 'new'}",
            f"--output_dir={root / 'out'}",
            "--batch_size=4",
            "--log_freq=1",
            f"--steps={STEPS}",
            f"--save_freq={SAVE_EVERY}",
            f"--craft.anchor_cache_dir={base / 'cache-0'}",
            "--craft.anchor_batch_size=4",
            "--craft.retention_freq=2",
            *transforms,
            *extra,
        )

    def _reference(self, name: str, job: Job) -> Job:
        """The job with what an uninterrupted run of it makes."""
        if name not in self._expected:
            ended = self.lab.run(job.target, job.arguments)
            assert ended.code == 0, ended.err[-3000:]
            self._expected[name] = job.result()
            if job.made.is_dir():
                shutil.copytree(job.made, self.root / "references" / name, symlinks=True)
            shutil.rmtree(job.made)
            for place, copy in job.pristine.items():
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(copy, place, symlinks=True)
        return Job(job.target, job.arguments, job.made, job.result, self._expected[name], job.root, job.pristine)

    def training(self, *, copied: bool = False, target: str = TRAIN, **kwargs: bool) -> Job:
        """Four steps with a checkpoint after the second and the fourth.

        Args:
            copied: Whether its inputs are copies of its own, which a fault may damage.
            target: Function under test.
            **kwargs: Of :meth:`flags`.
        """
        root = self.folder()
        base = root / "world" if copied else self.base
        pristine = {}
        if copied:
            shutil.copytree(self.base, base)
            pristine = {base / name.name: name for name in self.base.iterdir()}
        out = root / "out"
        flags = self.flags(root, base=base, **kwargs)
        name = "training" + ("-workers" if kwargs.get("workers") else "")
        if copied:
            self.expect_training()
            expected = self._expected[name]
            rebuild = (ANCHORS, self.build_flags(base / "cache-0", base, 8, 20))
            return Job(target, flags, out, lambda: run_result(out), expected, root, pristine, rebuild)
        return self._reference(name, Job(target, flags, out, lambda: run_result(out), {}, root, pristine))

    def expect_training(self) -> None:
        if "training" not in self._expected:
            self.done_with(self.training())

    def resuming(self) -> Job:
        """A run that was stopped after its first checkpoint, about to be resumed from ``last``."""
        self.expect_training()
        root = self.folder()
        out = root / "out"
        whole = self.root / "references" / "training"
        stopped = self.root / "references" / "stopped"
        if not stopped.is_dir():
            shutil.copytree(whole, stopped, symlinks=True)
            shutil.rmtree(stopped / "checkpoints" / RESULT)
            (stopped / "checkpoints" / "last").unlink()
            (stopped / "checkpoints" / "last").symlink_to(BEFORE)
            lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
            (stopped / "metrics.jsonl").write_text("".join(lines[:SAVE_EVERY]))
        shutil.copytree(stopped, out, symlinks=True)
        config = out / "checkpoints" / "last" / "pretrained_model" / "train_config.json"
        flags = ("--resume=true", f"--config_path={config}", f"--output_dir={out}")
        return Job(TRAIN, flags, out, lambda: run_result(out), self._expected["training"], root, {out: stopped})

    def caching(self) -> Job:
        """A cache of five shards."""
        root = self.folder()
        flags = self.build_flags(root / "cache", self.base, 4, 20)
        made = root / "cache"
        return self._reference("cache", Job(ANCHORS, flags, made, lambda: folder_result(made), {}, root, {}))

    @staticmethod
    def build_flags(cache: Path, base: Path, shard_size: int, samples: int) -> tuple[str, ...]:
        return (
            "build",
            f"--policy.path={base / 'teacher'}",
            "--policy.device=cpu",
            "--dataset.repo_id=local/tiny",
            f"--dataset.root={base / 'old-0'}",
            f"--output={cache}",
            f"--num-samples={samples}",
            f"--shard-size={shard_size}",
            "--batch-size=4",
        )

    def stage(self, function: str, kept: tuple[str, ...] = ()) -> Job:
        """A stage of the quickstart after the ones before it.

        Args:
            function: In :mod:`tests.faults.programs`.
            kept: References of stages before, whose ``kept`` folder it starts with.
        """
        root = self.folder()
        out = root / "quickstart"
        pristine = {}
        for name in kept:
            if name not in self._expected:
                self.done_with(self.stage(name))
            source = self.root / "references" / name / "kept"
            shutil.copytree(source, out / "kept", dirs_exist_ok=True, symlinks=True)
            pristine[out] = self.root / "references" / name

        target = f"tests.faults.programs:{function}"
        job = Job(target, (str(out),), out, lambda: folder_result(out), {}, root, pristine)
        return self._reference(function, job)
