"""Table and roofline picture of a results file: ``python -m benchmarks.report benchmarks/results/FILE.json``.

Writes FILE.md and FILE.png beside it and prints the table.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.harness import cases, read_results

Row = dict[str, Any]
Group = tuple[str, str, str]
ORDER = ["ours", "baseline", "peer", "ablation", "bound"]
STYLES = {"ours": ("o", "-"), "baseline": ("s", "-"), "peer": ("^", "--"), "ablation": ("d", ":"), "bound": ("v", "-.")}


def by_group(rows: list[Row], test: str) -> dict[Group, dict[str, Row]]:
    """Rows of one test: (device, case, precision) -> contender -> row."""
    groups: dict[Group, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row["test"] == test:
            groups[row["device"], row["case"], row["precision"]][row["contender"]] = row
    order = [*cases(), "network"]
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], order.index(item[0][1]), item[0][2])))


def ratios(rows: list[Row]) -> list[dict[str, Any]]:
    """The comparisons that the project is held to: medians of rounds in which ours and a rival alternate."""
    found, updates = [], by_group(rows, "update")
    for group, by_name in by_group(rows, "side_by_side").items():
        times = {name: row["median_s"] / row["ours_s"] for name, row in by_name.items()}
        # The separate runs have every peer and say which one is the best.
        peers = {name: row["median_s"] for name, row in updates.get(group, {}).items() if row["kind"] == "peer"}
        found.append(
            {
                "group": group,
                "eager": times.get("eager"),
                "torchjd": times.get("torchjd_sum"),
                "best": min(peers, key=lambda name: peers[name], default=None),
                "adamw": 1 / times["adamw_fused"] if "adamw_fused" in times else None,
                "plain": 1 / times["craft_plain"] if "craft_plain" in times else None,
            }
        )
    return found


def _number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


def _ms(row: Row, name: str) -> str:
    return f"{row[name] * 1e3:.3g}" if row[name] < 0.1 else f"{row[name] * 1e3:.0f}"


def markdown(document: dict[str, Any]) -> str:
    """The tables of a results file."""
    rows = document["rows"]
    device = f"{document['gpu']}, CUDA {document['cuda']}; " if "gpu" in document else ""
    lines = [
        f"# Optimizer step, {document['date'][:10]}",
        "",
        f"{device}{document['machine']} ({document['cpu']}), {document['threads']} threads, {document['scheduling']}, "
        f"load before the run {document['load_before'][0]}; torch {document['torch']}, triton {document['triton']}, "
        f"numba {document.get('numba')}, "
        f"Python {document['python']}; commit {document['commit'][:12]}; `{document['command']}`",
        "",
        "Times are medians (20th to 80th percentile), from two gradients in `.grad` to updated parameters. GB/s counts "
        "the bytes that the work cannot do without (surgery + AdamW: 40 a parameter in fp32, 28 in bf16), so it is "
        "comparable between contenders; its share is of the copy bandwidth of the same run. `moved` counts the bytes "
        "that this way of doing it moves, where they were counted. Extra memory is the peak above parameters and "
        "moments, the gradient that plain AdamW needs included. Error: relative norm of two updates against fp64 (of "
        "each contender's own rule).",
        "",
        "## Ratios",
        "",
        "Medians of rounds in which ours and the rival took turns.",
        "",
        "| device | case | precision | eager / ours | torchjd / ours | best peer | ours / AdamW(fused) | "
        "ours / ours without retention |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in ratios(rows):
        cells = [*r["group"], _number(r["eager"]), _number(r["torchjd"]), r["best"] or "–"]
        lines.append("| " + " | ".join([*cells, _number(r["adamw"]), _number(r["plain"])]) + " |")

    landed = by_group(rows, "landed")
    for group, by_name in by_group(rows, "update").items():
        copied = by_name.get("copy")
        lines += ["", f"## {group[1]}, {group[2]}, {group[0]}", "", f"{cases()[group[1]].title}."]
        lines += [
            "",
            "| | ms | GB/s | share of copy | GB/s moved | extra bytes a parameter | error | launches | syncs |",
        ]
        lines.append("|---|---|---|---|---|---|---|---|---|")
        shown = [*by_name.values(), *landed.get(group, {}).values()]
        for row in sorted(shown, key=lambda row: (ORDER.index(row["kind"]), row["median_s"])):
            rate = row["floor_bytes"] / row["median_s"] / 1e9
            top = copied["floor_bytes"] / copied["median_s"] / 1e9 if copied else None
            extra = row.get("extra_peak_bytes")
            cells = [
                row["title"],
                f"{_ms(row, 'median_s')} ({_ms(row, 'p20_s')} to {_ms(row, 'p80_s')})",
                f"{rate:.1f}",
                "–" if top is None else f"{rate / top:.0%}",
                _number(row["moved_bytes"] and row["moved_bytes"] / row["median_s"] / 1e9, ".1f"),
                "–" if extra is None else f"{extra / row['numel']:.1f}",
                _number(row.get("error"), ".0e"),
                str(row.get("launches", "–")),
                str(row.get("syncs", "–")),
            ]
            lines.append("| " + " | ".join(cells) + " |")

    iterations = by_group(rows, "iteration")
    if iterations:
        lines += ["", "## Whole iteration: two backwards and the step"]
    for (device_name, _, precision), by_name in iterations.items():
        base = by_name.get("dropped")
        lines += ["", f"{precision}, {device_name}", "", "| | ms | above dropped gradients, ms |", "|---|---|---|"]
        for row in by_name.values():
            above = "–" if base is None else f"{(row['median_s'] - base['median_s']) * 1e3:.3g}"
            spread = f"{_ms(row, 'median_s')} ({_ms(row, 'p20_s')} to {_ms(row, 'p80_s')})"
            lines.append(f"| {row['title']} | {spread} | {above} |")
    return "\n".join(lines) + "\n"


def draw(document: dict[str, Any], path: Path) -> None:
    """GB/s over the bytes that the work cannot do without, against the size of the model, under the copy bandwidth."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    groups = by_group(document["rows"], "update")
    panels = sorted({(device, "mixed" if p == "mixed" else p) for device, _, p in groups})
    # pi0_fast is mixed, nearly all bf16: it belongs to the bf16 panel.
    panels = [panel for panel in panels if panel[1] != "mixed"] or panels
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 6.5), squeeze=False, sharey="row")
    colors: dict[str, Any] = {}
    for ax, (device, precision) in zip(axes[0], panels, strict=True):
        series: dict[str, list[tuple[int, float]]] = defaultdict(list)
        kinds: dict[str, Row] = {}
        for (d, _, p), by_name in groups.items():
            if d == device and (p == precision or (p == "mixed" and precision == "bf16")):
                for name, row in by_name.items():
                    series[name].append((row["numel"], row["floor_bytes"] / row["median_s"] / 1e9))
                    kinds[name] = row
        for name in sorted(series, key=lambda n: (n != "copy", ORDER.index(kinds[n]["kind"]), -max(series[n])[1])):
            x, y = zip(*sorted(series[name]), strict=True)
            row = kinds[name]
            if name == "copy":
                ax.plot(x, y, color="black", linewidth=2, label="copy bandwidth")
                ax.fill_between(x, y, [2 * max(y)] * len(y), color="0.93", zorder=0)
                continue
            color = colors.setdefault(name, mpl.colormaps["tab20"]((2 * len(colors) + len(colors) // 10) % 20))
            marker, line = STYLES[row["kind"]]
            width = 2.5 if row["kind"] == "ours" else 1.2
            ax.plot(x, y, marker=marker, linestyle=line, color=color, linewidth=width, markersize=5, label=row["title"])
        ax.set(xscale="log", yscale="log", xlabel="parameters", title=f"{device}, {precision}")
        ax.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("GB/s over the bytes that the work needs")
    name = document.get("gpu") or f"{document['machine']} ({document['cpu']})"
    figure.suptitle(f"Optimizer step, {name}, {document['date'][:10]}", fontsize=10)
    labels: dict[str, Any] = {}
    for ax in axes[0]:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    figure.tight_layout(rect=(0, 0.04 + 0.033 * math.ceil(len(labels) / 2), 1, 1))
    figure.legend(list(labels.values()), list(labels), loc="lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": ""})
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="a results file of benchmarks/results")
    path = parser.parse_args(arguments).file
    if not path.is_file():
        parser.error(f"there is no file {path}; make one with `pytest benchmarks/ --benchmark-only`")
    document = read_results(path)
    table = markdown(document)
    path.with_suffix(".md").write_text(table)
    draw(document, path.with_suffix(".png"))
    print(table)
    print(f"wrote {path.with_suffix('.md').name} and {path.with_suffix('.png').name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
