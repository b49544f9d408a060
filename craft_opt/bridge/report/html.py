"""The report as one HTML file, pictures inlined, nothing fetched."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from craft_opt.bridge.report.metrics import wilson
from craft_opt.bridge.report.results import (
    METRICS,
    REFERENCE,
    Group,
    at_budget,
    best_and_ties,
    budgets_of,
    compare,
    interval,
    is_new,
    is_old,
    verdict,
)
from craft_opt.bridge.report.suites import SUITES

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1150px; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.7rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; } h3 { margin-top: 1.8rem; }
table { border-collapse: collapse; font-size: 13px; margin: .8rem 0; display: block; overflow-x: auto; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e3e3e3; text-align: right; white-space: nowrap; }
th { background: #f4f4f4; border-bottom: 2px solid #bbb; } th:first-child, td:first-child { text-align: left; }
td.wide { white-space: normal; text-align: left; } small { color: #666; } .best { font-weight: 700; }
.tie { background: #eef6ee; } .better { color: #006d2c; } .worse { color: #a63603; }
img { max-width: 100%; } code { background: #f4f4f4; padding: 0 .25rem; } pre { background: #f4f4f4; padding: .6rem;
overflow-x: auto; }
"""


def report(
    groups: Sequence[Group], pictures: Mapping[str, Sequence[Path]], commands: Sequence[str], tuning: Mapping[str, Any]
) -> str:
    """The whole report.

    Args:
        groups: What was run.
        pictures: Suite → its PNG files.
        commands: What was typed.
        tuning: What the tuning recorded, empty where there was none.
    """
    parts = ["<h1>Retention benchmark</h1>", _what_was_run(groups, commands)]
    for suite in dict.fromkeys(group.suite for group in groups):
        chosen = [group for group in groups if group.suite == suite]
        parts.append(f"<h2>Suite {escape(suite)}: {escape(SUITES[suite].title)}</h2>")
        parts.append(_stages(chosen[0]))
        for budget in budgets_of(chosen):
            parts.append(f"<h3>{budget} anchors of each old skill</h3>" if budget else "<h3>No anchors</h3>")
            shown = at_budget(chosen, budget)
            parts += [_metrics(shown), _against_reference(shown)]
        parts.append("<h3>Cost</h3>" + _costs(chosen))
        parts += [_picture(file) for file in pictures.get(suite, ())]
    parts += ["<h2>Methods and their tuning</h2>", _methods(groups, tuning), "<h2>Definitions</h2>", _definitions()]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Retention benchmark</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML; one that begins with ``<td`` brings its own tag."""

    def cell(text: str) -> str:
        return text if text.startswith("<td") else f"<td>{text}</td>"

    top = "".join(f"<th>{text}</th>" for text in head)
    body = "".join("<tr>" + "".join(map(cell, row)) + "</tr>\n" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table>"


def _what_was_run(groups: Sequence[Group], commands: Sequence[str]) -> str:
    cells = [cell for group in groups for cell in group.cells]
    machines = {json.dumps(cell["machine"], sort_keys=True): cell["machine"] for cell in cells}
    lines = []
    for about in machines.values():
        versions = ", ".join(
            f"{k} {about[k]}" for k in ("python", "torch", "lerobot", "metaworld", "mujoco") if about.get(k)
        )
        device = f"{about['gpu']}, " if about.get("gpu") else ""
        lines.append(f"{device}{about['machine']} ({about['cpu']}), {about['threads']} threads a cell; {versions}")
    dates = sorted({cell["date"] for cell in cells})
    commits = sorted({cell["commit"] for cell in cells})
    rows = [
        ("command", "<br>".join(f"<code>{escape(command)}</code>" for command in commands)),
        ("cells", f"{len(cells)} finished"),
        ("commit", ", ".join(f"<code>{escape(commit)}</code>" for commit in commits)),
        ("date", " to ".join(dict.fromkeys((dates[0], dates[-1])))),
        ("machine", "<br>".join(map(escape, lines))),
    ]
    return _table(("", ""), [(name, f'<td class="wide">{value}</td>') for name, value in rows])


def _stages(group: Group) -> str:
    names = []
    for stage in range(max(group.learned) + 1):
        skills = ", ".join(k for k, learned in zip(group.skills, group.learned, strict=True) if learned == stage)
        names.append(f"{'pre-training' if stage == 0 else f'stage {stage}'}: {escape(skills)}")
    hits, rollouts = group.counts(is_old, stage=0)
    sizes = group.cells[0]["sizes"]
    return (
        f"<p>{'; '.join(names)}. {sizes['steps']} steps a stage with batches of {sizes['batch_size']}; "
        f"{sizes['rollouts']} rollouts of each skill and seed. Old skills before fine-tuning: {hits / rollouts:.2f} "
        f"({hits}/{rollouts}).</p>"
    )


def _metrics(groups: Sequence[Group]) -> str:
    marks = {metric.name: best_and_ties(groups, metric) for metric in METRICS}
    rows = []
    for group in groups:
        row = [escape(group.method)]
        for metric in METRICS:
            best, ties = marks[metric.name]
            low, high = _interval(group, metric.name)
            kind = "best" if group is best else "tie" if group.label in ties else ""
            sign = "≈ " if kind == "tie" else ""
            row.append(
                f'<td class="{kind}">{sign}{metric.value(group):.2f} <small>{low:.2f} to {high:.2f}</small></td>'
            )
        row += [f"{group.mean_score('action_ce', wanted):.2f}" for wanted in (is_old, is_new)]
        row += [f"{group.mean_score('action_mae', wanted):.3f}" for wanted in (is_old, is_new)]
        rows.append([*row, str(len(group.seeds))])
    head = [
        "method",
        *(f'<span title="{escape(m.what)}">{m.title} {"↓" if m.lower_is_better else "↑"}</span>' for m in METRICS),
        "CE old",
        "CE new",
        "MAE old",
        "MAE new",
        "seeds",
    ]
    return _table(head, rows) + (
        "<p><small>Bold: the best. ≈ on green: a tie with it, the paired bootstrap interval of the difference holds 0. "
        "Small figures: 95 % intervals, Wilson's for old and new success, the bootstrap's for the rest.</small></p>"
    )


def _interval(group: Group, name: str) -> tuple[float, float]:
    if name in ("old", "new"):
        return wilson(*group.counts(is_old if name == "old" else is_new))
    return interval(group, next(metric for metric in METRICS if metric.name == name))


def _against_reference(groups: Sequence[Group]) -> str:
    reference = next((group for group in groups if group.method == REFERENCE), None)
    if reference is None or len(groups) < 2:
        return ""
    shown = [metric for metric in METRICS if metric.name in ("old", "new", "average", "nbt", "auc")]
    rows = []
    for group in groups:
        if group is reference:
            continue
        row = [escape(group.method)]
        for metric in shown:
            difference = compare(group, reference, metric)
            if difference is None:
                row.append("–")
                continue
            word = verdict(difference, metric)
            row.append(
                f'<td class="{word}">{difference.value:+.2f} <small>{difference.low:+.2f} to {difference.high:+.2f}'
                f"</small> {word}</td>"
            )
        rows.append(row)
    return f"<h4>Against {REFERENCE}</h4>" + _table(["difference", *(metric.title for metric in shown)], rows)


def _costs(groups: Sequence[Group]) -> str:
    rows = [
        (
            escape(group.label),
            f"{1000 * group.cost('step_seconds'):.0f}",
            f"{group.cost('setup_seconds'):.1f}",
            f"{group.cost('train_seconds'):.0f}",
            f"{group.cost('measure_seconds'):.0f}",
            f"{group.cost('peak_memory_gib'):.2f}",
            f"{group.stored_bytes / 1e6:.2f}",
        )
        for group in groups
    ]
    head = (
        "method, budget", "ms a step", "s before the first step", "s of training a stage", "s of measuring",
        "peak GiB", "stored MB at the end",
    )  # fmt: skip
    return _table(head, rows)


def _methods(groups: Sequence[Group], tuning: Mapping[str, Any]) -> str:
    rows = []
    for group in groups:
        result = group.cells[0]
        trials = [t for t in tuning.get("trials", ()) if (t["suite"], t["method"], t["budget"]) == _key(group)]
        told = "<br>".join(f"{_settings(t['settings'])}: {t['score']:.3f}" for t in trials)
        rows.append(
            (
                f"{escape(group.suite)} {escape(group.label)}",
                f'<td class="wide">{escape(result["what"])}</td>',
                f'<td class="wide"><code>{escape(json.dumps(result["settings"]))}</code></td>',
                _how_chosen(group, result["cell"]["settings"], tuning),
                f'<td class="wide">{told or "–"}</td>',
            )
        )
    about = ""
    if tuning:
        about = (
            f"<p>Tuned on seeds {', '.join(map(str, tuning['seeds']))} (demonstrations, teacher and rollouts are "
            f"others than those reported), {tuning['rollouts']} rollouts a skill; the score is the mean of old and of "
            f"new success at the end. Every method tried {tuning['tries']} settings.</p>"
        )
    head = ("suite, method, budget", "what it does", "run with", "tuned", "tried: score")
    return about + _table(head, rows)


def _how_chosen(group: Group, settings: Mapping[str, Any], tuning: Mapping[str, Any]) -> str:
    """A method's settings and where they come from."""
    told = _settings(settings)
    same = [entry for entry in tuning.get("chosen", ()) if entry["settings"] == settings]
    places = [(e["suite"], e["budget"]) for e in same if e["method"] == group.method]
    if (group.suite, group.budget) in places:
        return told
    if not places:
        return f"{told}, not tuned"
    suite, budget = places[0]
    return f"{told}, as on suite {escape(suite)}{f' with {budget} anchors' if budget else ''}"


def _key(group: Group) -> tuple[str, str, int]:
    return (group.suite, group.method, group.budget)


def _settings(settings: Mapping[str, Any]) -> str:
    return escape(", ".join(f"{name}={value}" for name, value in settings.items()) or "defaults")


def _definitions() -> str:
    rows = [(escape(metric.title), f'<td class="wide">{escape(metric.what)}</td>') for metric in METRICS]
    return _table(("metric", "what it is"), rows) + (
        "<p>Formulas, conventions and sources: <code>docs/report.md</code> and "
        "<code>craft_opt/bridge/report/metrics.py</code>.</p>"
    )


def _picture(file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<p><img alt="{escape(file.stem)}" src="data:image/png;base64,{data}"></p>'
