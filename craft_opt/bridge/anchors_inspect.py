"""``craft-anchors inspect``: what a cache holds, in words, in a histogram and in a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from craft_opt.bridge.anchor_cache import AnchorBatch, AnchorCache
from craft_opt.bridge.anchor_manifest import (
    FEATURE_MASK,
    FEATURE_PREFIX,
    TEACHER_CE,
    TOKEN_MASK,
    TOP_LOGPROBS,
    files_of,
    rebuild_hint,
)
from craft_opt.bridge.untrusted import printable

BINS = 12
_BAR = 40


@dataclass(frozen=True)
class Distribution:
    """How one number is spread over a cache.

    Attributes:
        title: What it is, with its unit.
        values: Each of them, fp32.
    """

    title: str
    values: np.ndarray

    @property
    def range(self) -> tuple[float, float]:
        """From the smallest to the largest, and wider where only rounding tells them apart (as after a norm)."""
        low, high = float(self.values.min()), float(self.values.max())
        margin = 0.05 * max(abs(low), abs(high), 1e-30)
        return (low, high) if high - low > margin / 50 else (low - margin, high + margin)

    def lines(self) -> list[str]:
        """A histogram as text."""
        low, middle, high = np.percentile(self.values, (0, 50, 100))
        counts, edges = np.histogram(self.values, bins=BINS, range=self.range)
        bars = ["█" * round(_BAR * count / counts.max()) for count in counts]
        rows = zip(edges[:-1], edges[1:], bars, counts, strict=True)
        return [
            f"{self.title}: {len(self.values)} values, {low:.4g} to {high:.4g}, median {middle:.4g}",
            *(f"  {first:>10.4g} … {last:<10.4g} {bar} {count}" for first, last, bar, count in rows),
        ]


def inspect_cache(folder: str | Path, output: Path | None = None, num_frames: int = 8) -> list[str]:
    """Describe a cache, and draw it where a picture is asked for.

    Args:
        folder: The cache.
        output: The picture, a PNG file.
        num_frames: Sample frames in the picture, spread over the cache.

    Returns:
        Lines to print.

    Raises:
        FileNotFoundError: There is no cache, or what it refers to is gone.
        ValueError: It is damaged, or the picture cannot be made.
    """
    if output is not None and (output.suffix.lower() != ".png" or num_frames < 1):
        raise ValueError(f"--output must name a .png file and --num-frames be at least 1, got {output}, {num_frames}")
    cache = AnchorCache.open(folder)
    spread = list(_distributions(cache))
    for one in spread:
        if not np.isfinite(one.values).all():
            raise ValueError(f"{folder}: {one.title} are not finite; {rebuild_hint(cache.folder)}")
    # Prompts and names are whatever the cache says: they must not steer the terminal.
    lines = [printable(line) for line in (*_description(cache), *(x for one in spread for x in ["", *one.lines()]))]
    if output is not None:
        _draw(cache, spread, output, min(num_frames, len(cache)))
        lines += ["", f"Picture: {output}"]
    return lines


def _description(cache: AnchorCache) -> list[str]:
    manifest = cache.manifest
    size = sum(shard.bytes for shard in manifest.shards)
    sources = [
        f"{source.repo_id}{f' in {source.root}' if source.root else ''} (revision {source.revision}, "
        f"{'all episodes' if source.episodes is None else f'episodes {_ranges(source.episodes)}'}, "
        f"{source.frames} frames{'' if source.prompt is None else f', with {source.prompt!r} for its prompt'})"
        for source in manifest.sources
    ]
    counts = dict.fromkeys(manifest.tasks, 0)
    for task in cache.task_texts():
        counts[task] += 1
    rows = {
        "Anchor cache": str(cache.folder),
        "kind": f"{manifest.kind} ({manifest.content})",
        "storage": manifest.storage.replace("_", "-"),
        "anchors": f"{manifest.samples} in {files_of(manifest)}, {size / 2**20:.1f} MiB",
        "teacher": f"{manifest.teacher} (fingerprint {manifest.teacher_fingerprint}, {manifest.compute_dtype})",
        "preprocessor": f"{manifest.preprocessor_fingerprint}, normalising with the {manifest.normalization_stats}'s "
        f"statistics",
        "action tokens": manifest.token_source,
        "stored in": manifest.feature_dtype,
        "cameras": ", ".join(manifest.cameras) or "none",
        "renamed": ", ".join(f"{old} → {new}" for old, new in manifest.rename_map.items()) or "nothing",
        "selection": f"{manifest.selection}, seed {manifest.seed}",
        "made with": ", ".join(f"{name} {number}" for name, number in manifest.versions.items()),
        "digest": manifest.digest,
    }
    lines = [f"{f'{name}:':<15}{value}" for name, value in rows.items()]
    for name, entries in (
        ("datasets", sources),
        ("tasks", [f"{count:>6}  {task}" for task, count in counts.items()]),
        ("variance", [f"layer {layer}: {value:.6g}" for layer, value in manifest.teacher_variance.items()]),
        ("tensors", [f"{name} {info.dtype} {info.shape}" for name, info in manifest.tensors.items()]),
    ):
        lines += [f"{name}:", *(f"  {entry}" for entry in entries)] if entries else []
    return lines


def _distributions(cache: AnchorCache) -> Iterator[Distribution]:
    """Norms of the features at every layer, or cross-entropies and the mass that the stored tokens hold."""
    masks = [mask.bool() for mask in cache.parts(FEATURE_MASK)] if cache.manifest.kind == "hidden" else []
    for layer in cache.manifest.layers:
        # File by file: the features of a whole cache may not fit in memory.
        parts = zip(cache.parts(f"{FEATURE_PREFIX}{layer}"), masks, strict=True)
        norms = torch.cat([features[mask].float().norm(dim=-1) for features, mask in parts])
        yield Distribution(f"norms of the features at layer {layer}", norms.numpy())
    if cache.manifest.kind == "token_ce":
        whose = "its own" if cache.manifest.token_source == "teacher" else "the demonstrated"
        title = f"the teacher's cross-entropy of {whose} tokens, nats a token"
        yield Distribution(title, cache.column(TEACHER_CE).numpy())
    if cache.manifest.top_k:
        mask = cache.column(TOKEN_MASK).clone()
        mask[:, 0] = False
        mass = cache.column(TOP_LOGPROBS)[mask].exp().sum(dim=-1)
        yield Distribution(f"probability of the {cache.manifest.top_k} stored tokens together", mass.numpy())


def _draw(cache: AnchorCache, spread: list[Distribution], output: Path, num_frames: int) -> None:
    # Without a screen, and without the global state of pyplot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = np.linspace(0, len(cache) - 1, num_frames).round().astype(int).tolist()
    batch = cache.gather(chosen)
    pictures = [(row, camera) for row in range(num_frames) for camera in batch.images]
    columns = min(4, max(len(pictures), 1))
    picture_rows, histogram_rows = -(-len(pictures) // columns), -(-len(spread) // 2)
    figure = Figure(figsize=(11, 2.6 * histogram_rows + 2.9 * picture_rows), layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=(2.6 * histogram_rows, 2.9 * picture_rows or 0.1))
    figure.suptitle(f"{cache.folder.name}: {len(cache)} anchors, {cache.manifest.content}", fontsize=11)
    axes = parts[0].subplots(histogram_rows, min(2, len(spread)), squeeze=False).flat
    for axis, one in zip(axes, spread, strict=False):
        axis.hist(one.values, bins=BINS, range=one.range, color="#4477aa")
        axis.set_title(one.title, fontsize=9)
        axis.set_ylabel("positions" if one.title.startswith(("norms", "prob")) else "anchors", fontsize=8)
        axis.tick_params(labelsize=8)
    for axis in list(axes)[len(spread) :]:
        axis.axis("off")
    if pictures:
        _frames(parts[1].subplots(picture_rows, columns, squeeze=False).flat, batch, pictures, chosen)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)


def _frames(axes: Any, batch: AnchorBatch, pictures: list[tuple[int, str]], chosen: list[int]) -> None:
    grid = list(axes)
    for axis in grid:
        axis.axis("off")
    for axis, (row, camera) in zip(grid, pictures, strict=False):
        image = batch.images[camera][row].permute(1, 2, 0).numpy()
        axis.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray")
        prompt = "\n".join(textwrap.wrap(batch.tasks[row], 34)[:3])
        name = camera.removeprefix("observation.").removeprefix("images.")
        axis.set_title(f"anchor {chosen[row]}, {name}\n{prompt}", fontsize=8)


def _ranges(numbers: list[int]) -> str:
    """Whole numbers with runs drawn together: 0-9,12."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
