"""Which frames become anchors: shared out over the tasks, and within a task at random or spread over its motions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from craft_opt.bridge.anchor_frames import FrameReader

# Frames that each anchor is chosen from: among all of a task's the farthest ones would be its accidents.
CANDIDATES = 20
Frame = tuple[int, int]


def select_frames(
    readers: Sequence[FrameReader],
    count: int | None,
    fraction: float | None,
    balance: bool,
    seed: int,
    selection: str = "random",
) -> list[Frame]:
    """(dataset, row) of every anchor, in random order.

    Args:
        readers: Of the datasets.
        count: Anchors in all; this or ``fraction``.
        fraction: Share of the frames.
        balance: Whether the tasks' numbers are as equal as their frames allow; otherwise all frames are one group.
        seed: Of everything random here.
        selection: Within a group, ``random`` or ``coverage`` (:func:`spread` over states and actions).

    Raises:
        ValueError: More anchors were asked for than there are frames, or the datasets' states or actions differ in
            width where they are to be compared.
    """
    generator = np.random.default_rng(seed)
    groups = [
        [(number, int(frame)) for frame in generator.permutation(frames)]
        for number, reader in enumerate(readers)
        for frames in reader.by_task()
    ]
    available = sum(len(group) for group in groups)
    count = max(1, round(available * fraction)) if fraction is not None else count
    assert count is not None
    if available < count:
        raise ValueError(
            f"--num-samples={count} anchors were asked for, and the chosen episodes have {available} frames; "
            f"lower --num-samples or add episodes"
        )
    if not balance:
        together = [frame for group in groups for frame in group]
        shuffled = [together[k] for k in generator.permutation(available)]
        return _chosen(readers, shuffled, count, selection)
    chosen: list[Frame] = []
    # Smallest group first: what it cannot give is shared out among the rest.
    for position, group in enumerate(sorted(groups, key=len)):
        share = -(-(count - len(chosen)) // (len(groups) - position))
        chosen += _chosen(readers, group, min(share, len(group), count - len(chosen)), selection)
    return [chosen[k] for k in generator.permutation(len(chosen))]


def _chosen(readers: Sequence[FrameReader], shuffled: Sequence[Frame], count: int, selection: str) -> list[Frame]:
    if selection == "random" or count in (0, len(shuffled)):
        return list(shuffled[:count])
    candidates = shuffled[: CANDIDATES * count]
    states, actions = zip(*(readers[number].motion(row) for number, row in candidates), strict=True)
    parts = []
    for name, rows in (("state", states), ("actions", actions)):
        if len(widths := sorted({len(row) for row in rows})) > 1:
            raise ValueError(f"the datasets differ in the width of {name} ({widths}); build a cache for each")
        values = np.stack(rows).astype(np.float64)
        deviation = values.std(axis=0)
        # Where you are and what you do next count alike, whatever their widths.
        parts.append((values - values.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0) / values.shape[1] ** 0.5)
    return [candidates[k] for k in spread(np.concatenate(parts, axis=1), count)]


def spread(points: Float[np.ndarray, "points dimensions"], count: int) -> list[int]:
    """Points of which none of all is far: farthest-first traversal.

    The first is the one nearest the mean, each further one that farthest from those chosen; the largest distance of
    any point to the nearest chosen one is then at most twice the smallest possible.

    Source: Gonzalez (Theoretical Computer Science 38, 1985); as a selection of samples Sener and Savarese
    (arXiv 1708.00489), Algorithm 1, there in a network's features.

    Args:
        points: fp64 rows.
        count: How many to choose, at most as many as there are.

    Returns:
        Their rows, in the order in which they were chosen; of equals the first.
    """
    first = int(np.linalg.norm(points - points.mean(axis=0), axis=1).argmin())
    chosen, distance = [first], np.linalg.norm(points - points[first], axis=1)
    while len(chosen) < count:
        distance[chosen[-1]] = -1.0  # equal points are different frames: none is taken twice
        farthest = int(distance.argmax())
        chosen.append(farthest)
        distance = np.minimum(distance, np.linalg.norm(points - points[farthest], axis=1))
    return chosen
