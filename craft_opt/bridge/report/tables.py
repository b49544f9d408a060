"""The report's main table as markdown, for a terminal and for the docs."""

from __future__ import annotations

from collections.abc import Sequence

from craft_opt.bridge.report.metrics import wilson
from craft_opt.bridge.report.results import (
    METRICS,
    Group,
    at_budget,
    best_and_ties,
    budgets_of,
    compare,
    is_new,
    is_old,
    verdict,
)


def markdown(groups: Sequence[Group]) -> str:
    """A table for every suite and budget: success with Wilson's intervals, the metrics, ties with the best marked ≈."""
    tables = []
    for suite in dict.fromkeys(group.suite for group in groups):
        chosen = [group for group in groups if group.suite == suite]
        for budget in budgets_of(chosen):
            title = f"Suite {suite}, {budget} anchors of each old skill" if budget else f"Suite {suite}"
            tables.append(f"{title}\n\n{_table(at_budget(chosen, budget))}")
    return "\n\n".join(tables)


def differences(first: Group, second: Group) -> str:
    """Every metric of two methods, and the first's less the second's with its paired bootstrap interval.

    Raises:
        ValueError: They have no seed in common, or not as many rollouts.
    """
    lines = [f"| metric | {first.label} | {second.label} | difference | |", "|---|---|---|---|---|"]
    for metric in METRICS:
        difference = compare(first, second, metric)
        if difference is None:
            raise ValueError(
                f"{first.label} and {second.label} have no seed in common with as many rollouts: {first.seeds} with "
                f"{first.outcomes.shape[-1]}, {second.seeds} with {second.outcomes.shape[-1]}"
            )
        seeds = sorted(set(first.seeds) & set(second.seeds))
        values = " | ".join(f"{metric.value(group.only(seeds)):.2f}" for group in (first, second))
        gap = f"{difference.value:+.2f} ({difference.low:+.2f} to {difference.high:+.2f})"
        arrow = "↓" if metric.lower_is_better else "↑"
        lines.append(f"| {metric.title} {arrow} | {values} | {gap} | {verdict(difference, metric)} |")
    stored = " | ".join(f"{group.stored_bytes / 1e6:.2f}" for group in (first, second))
    return "\n".join([*lines, f"| stored MB | {stored} | | |"])


def _table(groups: Sequence[Group]) -> str:
    shown = [metric for metric in METRICS if metric.name not in ("old", "new")]
    head = ["method", "old ↑", "new ↑", *(f"{m.title} {'↓' if m.lower_is_better else '↑'}" for m in shown), "stored MB"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    marks = {metric.name: best_and_ties(groups, metric) for metric in METRICS}

    def marked(group: Group, name: str, text: str) -> str:
        best, ties = marks[name]
        return f"**{text}**" if group is best else f"≈ {text}" if group.label in ties else text

    for group in groups:
        row = [group.method]
        for name, wanted in (("old", is_old), ("new", is_new)):
            hits, rollouts = group.counts(wanted)
            low, high = wilson(hits, rollouts)
            row.append(marked(group, name, f"{hits / rollouts:.2f} ({low:.2f} to {high:.2f})"))
        row += [marked(group, metric.name, f"{metric.value(group):.2f}") for metric in shown]
        lines.append(f"| {' | '.join([*row, f'{group.stored_bytes / 1e6:.2f}'])} |")
    return "\n".join(lines)
