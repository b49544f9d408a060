"""What finished cells say: metrics with intervals, comparisons, and the files of results."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from craft_opt.bridge.report import metrics
from craft_opt.bridge.report.metrics import Array, Difference, PairedBootstrap, Statistic

Result = Mapping[str, Any]
REFERENCE = "replay"  # what a sceptic would do instead


@dataclass(frozen=True)
class Group:
    """A method with a budget on a suite, over its seeds.

    Attributes:
        cells: Results of the cells, by seed.
    """

    cells: tuple[Result, ...]

    @property
    def suite(self) -> str:
        """Name of the suite."""
        return str(self.cells[0]["cell"]["suite"])

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.cells[0]["cell"]["method"])

    @property
    def budget(self) -> int:
        """Anchors of each old skill; 0 where the method uses none."""
        return int(self.cells[0]["cell"]["budget"])

    @property
    def label(self) -> str:
        """Method, and budget where it has one."""
        return f"{self.method}, {self.budget}" if self.budget else self.method

    @property
    def seeds(self) -> tuple[int, ...]:
        """Its seeds, ascending."""
        return tuple(int(cell["cell"]["seed"]) for cell in self.cells)

    @property
    def skills(self) -> list[str]:
        """Names of the skills: the columns of R."""
        return list(self.cells[0]["skills"])

    @property
    def learned(self) -> list[int]:
        """The stage in which each skill is learned."""
        return list(self.cells[0]["learned"])

    @cached_property
    def outcomes(self) -> NDArray[np.bool_]:
        """[seeds, stages, skills, rollouts]."""
        return np.array(
            [
                [[score["outcomes"] for score in scores] for scores in (cell["before"], *_stage_scores(cell))]
                for cell in self.cells
            ],
            dtype=bool,
        )

    @cached_property
    def success(self) -> Array:
        """R for each seed, [seeds, stages, skills]."""
        return np.asarray(self.outcomes.mean(axis=-1))

    def curves(self, seed: int) -> dict[int, list[float]]:
        """Skill → its learning curve, of a seed by its place in ``seeds``."""
        return {int(k): curve for stage in self.cells[seed]["stages"] for k, curve in stage["curves"].items()}

    @property
    def bootstrap(self) -> PairedBootstrap:
        """The resamples, the same ones for all groups of a shape."""
        seeds, _, skills, rollouts = self.outcomes.shape
        return _bootstrap(seeds, skills, rollouts)

    @cached_property
    def resampled(self) -> Array:
        """R in every resample of the rollouts, [resamples, seeds, stages, skills]."""
        return self.bootstrap.resample(self.outcomes)

    def drawn(self, metric: Metric) -> Array:
        """A metric in every resample."""
        return self.bootstrap.values(self.resampled, metric.statistic(self))

    def only(self, seeds: Sequence[int]) -> Group:
        """The same with these seeds alone."""
        if tuple(seeds) == self.seeds:
            return self
        return Group(tuple(cell for cell in self.cells if cell["cell"]["seed"] in seeds))

    def counts(self, wanted: Callable[[int], bool], stage: int = -1) -> tuple[int, int]:
        """Successes and rollouts after a stage, over the skills whose stage of learning is wanted."""
        chosen = [k for k, learned in enumerate(self.learned) if wanted(learned)]
        outcomes = self.outcomes[:, stage, chosen]
        return int(outcomes.sum()), outcomes.size

    def mean_score(self, name: str, wanted: Callable[[int], bool]) -> float:
        """Mean of a score (``action_ce``, ``action_mae``) after the last stage over wanted skills and the seeds."""
        chosen = [k for k, learned in enumerate(self.learned) if wanted(learned)]
        return float(np.mean([cell["stages"][-1]["scores"][k][name] for cell in self.cells for k in chosen]))

    def cost(self, name: str) -> float:
        """Median over seeds and stages of something that a stage records."""
        return float(np.median([stage[name] for cell in self.cells for stage in cell["stages"]]))

    @property
    def stored_bytes(self) -> int:
        """Bytes stored in the last stage, when most is stored; the largest of the seeds."""
        return max(int(cell["stages"][-1]["stored_bytes"]) for cell in self.cells)


_bootstrap = cache(PairedBootstrap)


def is_old(learned: int) -> bool:
    """Whether a skill learned in this stage is one of the starting policy's."""
    return learned == 0


def is_new(learned: int) -> bool:
    """Whether it is one of the fine-tuning's."""
    return learned > 0


def _stage_scores(cell: Result) -> list[Any]:
    return [stage["scores"] for stage in cell["stages"]]


@dataclass(frozen=True)
class Metric:
    """A column of the tables.

    Attributes:
        name: Its key in the files.
        title: For headings.
        what: What it is, in a line.
        statistic: Group → function of R [..., seeds, stages, skills] that gives [..., seeds].
        lower_is_better: Whether less is better.
    """

    name: str
    title: str
    what: str
    statistic: Callable[[Group], Statistic]
    lower_is_better: bool = False

    def value(self, group: Group) -> float:
        """Mean over the seeds."""
        return float(self.statistic(group)(group.success).mean())


def _auc(group: Group) -> Statistic:
    def of(success: Array) -> Array:
        seeds = range(len(group.seeds))
        return np.stack([metrics.auc(success[..., s, :, :], group.learned, group.curves(s)) for s in seeds], axis=-1)

    return of


def _fwt(group: Group) -> Statistic:
    values = np.array([metrics.fwt(group.curves(s)) for s in range(len(group.seeds))])
    return lambda success: np.broadcast_to(values, success.shape[:-2])


def _of_learned(statistic: Callable[[Array, Sequence[int]], Array]) -> Callable[[Group], Statistic]:
    return lambda group: lambda success: statistic(success, group.learned)


METRICS = (
    Metric("old", "old", "success on the starting policy's skills at the end", _of_learned(metrics.old_success)),
    Metric("kept", "kept", "that over the same before fine-tuning", _of_learned(metrics.kept_of_before)),
    Metric("new", "new", "success on the skills learned since, at the end", _of_learned(metrics.new_success)),
    Metric("average", "average", "success on all skills at the end", lambda group: metrics.average_success),
    Metric(
        "forgetting",
        "forgetting",
        "best success before the last stage less that after it (Chaudhry et al. 2018)",
        _of_learned(metrics.forgetting),
        lower_is_better=True,
    ),
    Metric("nbt", "NBT", "negative backward transfer (LIBERO)", _of_learned(metrics.nbt), lower_is_better=True),
    Metric("fwt", "FWT", "forward transfer (LIBERO)", _fwt),
    Metric("auc", "AUC", "area under the success curve (LIBERO)", _auc),
)


def groups_of(results: Sequence[Result]) -> list[Group]:
    """Results by suite, budget and method, in the order in which they came, each by seed."""
    found: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        cell = result["cell"]
        found.setdefault((cell["suite"], cell["budget"], cell["method"]), []).append(result)
    return [Group(tuple(sorted(cells, key=lambda r: r["cell"]["seed"]))) for cells in found.values()]


def at_budget(groups: Sequence[Group], budget: int) -> list[Group]:
    """Groups that compete at a budget: those with it, and those that use no anchors."""
    return [group for group in groups if group.budget in (0, budget)]


def budgets_of(groups: Sequence[Group]) -> list[int]:
    """Budgets, ascending; [0] where no method uses anchors."""
    return sorted({group.budget for group in groups} - {0}) or [0]


def compare(first: Group, second: Group, metric: Metric) -> Difference | None:
    """A metric of one method less that of another, on the seeds and rollouts that both have; None without any."""
    seeds = sorted(set(first.seeds) & set(second.seeds))
    if not seeds or first.outcomes.shape[1:] != second.outcomes.shape[1:]:
        return None
    first, second = first.only(seeds), second.only(seeds)
    drawn = first.drawn(metric) - second.drawn(metric)
    return Difference(metric.value(first) - metric.value(second), *metrics.percentile_interval(drawn))


def verdict(difference: Difference, metric: Metric) -> str:
    """What a difference says of the first of the two: ``tie``, ``better`` or ``worse``."""
    gains = difference.value < 0 if metric.lower_is_better else difference.value > 0
    return "tie" if difference.is_tie else "better" if gains else "worse"


def interval(group: Group, metric: Metric) -> tuple[float, float]:
    """Bootstrap interval of a metric, over seeds and rollouts."""
    return metrics.percentile_interval(group.drawn(metric))


def best_and_ties(groups: Sequence[Group], metric: Metric) -> tuple[Group, set[str]]:
    """The best group by a metric, and the labels of those whose difference from it is within the interval."""
    sign = -1 if metric.lower_is_better else 1
    best = max(groups, key=lambda group: sign * metric.value(group))
    ties = set()
    for group in groups:
        difference = compare(group, best, metric) if group is not best else None
        if difference is not None and difference.is_tie:
            ties.add(group.label)
    return best, ties


def summary_row(result: Result) -> dict[str, Any]:
    """A cell as a line of ``results.jsonl``: what it is, its metrics, R and what it cost."""
    group = Group((result,))
    rows = (result["before"], *_stage_scores(result))
    return {
        **result["cell"],
        "skills": group.skills,
        "learned": group.learned,
        **{metric.name: metric.value(group) for metric in METRICS},
        "success": group.success[0].tolist(),
        "outcomes": group.outcomes[0].astype(int).tolist(),
        "curves": {str(k): curve for k, curve in group.curves(0).items()},
        **{name: [[score[name] for score in row] for row in rows] for name in ("action_ce", "action_mae")},
        "stages": [{k: v for k, v in stage.items() if k not in ("scores", "curves")} for stage in result["stages"]],
        "resolved": {"settings": result["settings"], "sizes": result["sizes"]},
        **{name: result[name] for name in ("date", "commit", "machine")},
    }


def jsonl(results: Sequence[Result]) -> str:
    """``results.jsonl``: one JSON object a cell."""
    return "".join(json.dumps(summary_row(result)) + "\n" for result in results)


CSV_COLUMNS = (
    "suite", "method", "budget", "seed", "stage", "skill", "learned_in_stage", "successes", "rollouts", "success",
    "wilson_low", "wilson_high", "action_ce", "action_mae",
)  # fmt: skip


def csv_text(results: Sequence[Result]) -> str:
    """``results.csv``: a row for every cell, stage and skill."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for result in results:
        cell = result["cell"]
        for stage, scores in enumerate((result["before"], *_stage_scores(result))):
            for score, learned in zip(scores, result["learned"], strict=True):
                hits, rollouts = score["successes"], score["rollouts"]
                low, high = metrics.wilson(hits, rollouts)
                writer.writerow(
                    [cell["suite"], cell["method"], cell["budget"], cell["seed"], stage, score["skill"], learned, hits,
                     rollouts, hits / rollouts, round(low, 6), round(high, 6), score["action_ce"], score["action_mae"]]
                )  # fmt: skip
    return stream.getvalue()
