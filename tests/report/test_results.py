"""From finished cells to tables, files, pictures and the report."""

import base64
import csv
import io
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from craft_opt.bridge.report import cli, matrix, results, tables
from craft_opt.bridge.report.cell import STEPS, Cell
from craft_opt.bridge.report.figures import success_bars, success_by_storage, success_matrices
from craft_opt.bridge.report.html import report
from craft_opt.bridge.report.matrix import (
    CellsFailedError,
    cells_of,
    finished,
    preparation_folder,
    read_matrix,
    remember,
    run_matrix,
)
from craft_opt.bridge.report.metrics import wilson
from craft_opt.bridge.report.results import METRICS, best_and_ties, compare, groups_of, is_new, is_old
from tests.report.support import ROLLOUTS, put, result

GOOD = ((10, 10, 0), (10, 9, 10))
POOR = ((10, 10, 0), (1, 2, 10))
METRIC = {metric.name: metric for metric in METRICS}


def some_results():
    return [
        *(result("S", "naive", 0, seed, hits=POOR) for seed in (1, 0, 2)),
        *(result("S", "replay", 20, seed, hits=((10, 10, 0), (6, 5, 10))) for seed in (0, 1, 2)),
        *(result("S", "hidden", 20, seed, hits=GOOD) for seed in (0, 1, 2)),
        *(result("S", "hidden", 200, seed, hits=GOOD) for seed in (0, 1)),
    ]


def test_groups_are_methods_and_budgets_over_seeds():
    groups = groups_of(some_results())
    assert [(g.label, g.seeds) for g in groups] == [
        ("naive", (0, 1, 2)),
        ("replay, 20", (0, 1, 2)),
        ("hidden, 20", (0, 1, 2)),
        ("hidden, 200", (0, 1)),
    ]
    naive = groups[0]
    assert naive.outcomes.shape == (3, 2, 3, ROLLOUTS)
    np.testing.assert_allclose(naive.success[0], [[1, 1, 0], [0.1, 0.2, 1]])
    assert naive.counts(is_old) == (9, 60)
    assert naive.counts(is_new) == (30, 30)
    assert naive.counts(is_old, stage=0) == (60, 60)
    assert naive.curves(0) == {2: [0.0, 0.5, 1.0]}
    assert naive.mean_score("action_ce", is_new) == 0.5
    assert naive.cost("step_seconds") == pytest.approx(0.11)
    assert groups[2].stored_bytes == 20_000
    assert [g.label for g in results.at_budget(groups, 200)] == ["naive", "hidden, 200"]
    assert results.budgets_of(groups) == [20, 200]


def test_the_metrics_of_a_group_are_means_over_its_seeds():
    naive = groups_of([result("S", "naive", 0, 0, hits=POOR), result("S", "naive", 0, 1, hits=GOOD)])[0]
    expected = {
        "old": (0.15 + 0.95) / 2,
        "kept": (0.15 + 0.95) / 2,
        "new": 1.0,
        "average": (1.3 + 2.9) / 6,
        "forgetting": (0.85 + 0.05) / 2,
        "nbt": (0.85 + 0.05) / 2,
        "fwt": 0.5,
        # Old: (1 + R)/2; the new skill's is its FWT.
        "auc": ((0.55 + 0.6 + 0.5) / 3 + (1.0 + 0.95 + 0.5) / 3) / 2,
    }
    assert {metric.name: metric.value(naive) for metric in METRICS} == pytest.approx(expected)


def test_the_best_and_its_ties():
    almost = [result("S", "replay", 20, seed, hits=((10, 10, 0), (10, 8, 10))) for seed in range(3)]
    groups = groups_of([*some_results(), *almost])
    groups = [g for g in groups if g.label in ("naive", "hidden, 20")] + groups_of(almost)
    best, ties = best_and_ties(groups, METRIC["old"])
    assert best.label == "hidden, 20"
    assert ties == {"replay, 20"}, "one rollout in sixty is no difference; naive's fifty-one are"
    best, ties = best_and_ties(groups, METRIC["nbt"])
    assert best.label == "hidden, 20", "less is better"
    difference = compare(groups[0], groups[1], METRIC["old"])
    assert difference.value == pytest.approx(0.15 - 0.95)
    assert difference.low <= difference.value <= difference.high < 0


def test_methods_are_compared_on_the_seeds_that_both_have():
    groups = {g.label: g for g in groups_of(some_results())}
    difference = compare(groups["hidden, 200"], groups["hidden, 20"], METRIC["average"])
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)
    other = groups_of([result("S", "naive", 0, 7)])[0]
    assert compare(other, groups["naive"], METRIC["average"]) is None


def test_the_files_hold_every_cell_stage_and_skill():
    found = some_results()
    lines = [json.loads(line) for line in results.jsonl(found).splitlines()]
    assert len(lines) == len(found)
    assert lines[0]["method"] == "naive" and lines[0]["seed"] == 1
    assert lines[0]["success"] == [[1, 1, 0], [0.1, 0.2, 1]]
    assert lines[0]["old"] == pytest.approx(0.15)
    assert sum(lines[0]["outcomes"][1][1]) == 2
    rows = list(csv.DictReader(io.StringIO(results.csv_text(found))))
    assert len(rows) == len(found) * 2 * 3
    row = next(
        r for r in rows if (r["method"], r["seed"], r["stage"], r["skill"]) == ("naive", "0", "1", "button-press")
    )
    assert (row["successes"], row["rollouts"], row["success"], row["learned_in_stage"]) == ("2", "10", "0.2", "0")
    assert (float(row["wilson_low"]), float(row["wilson_high"])) == pytest.approx(wilson(2, 10), abs=1e-6)


def test_the_markdown_marks_best_and_ties():
    text = tables.markdown(groups_of(some_results()))
    lines = text.splitlines()
    assert lines[0] == "Suite S, 20 anchors of each old skill"
    row = next(line for line in lines if line.startswith("| hidden |"))
    assert "**0.95 (0.86 to 0.98)**" in row
    assert "| ≈ 1.00 (0.89 to 1.00) |" in row, "all three learn the new skill"
    assert next(line for line in lines if line.startswith("| naive |")).startswith(
        "| naive | 0.15 (0.08 to 0.26) | **1.00"
    )


class _Tags(HTMLParser):
    """Counts tags that open and close, and collects what would be fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.sources = [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_file_with_everything_in_it(tmp_path):
    groups = groups_of(some_results())
    pictures = []
    for draw in (success_bars, success_matrices, success_by_storage):
        file = tmp_path / f"{draw.__name__}.png"
        draw(file, groups, "a <title>")
        assert file.read_bytes().startswith(b"\x89PNG")
        pictures.append(file)
    trial = {"suite": "S", "method": "hidden", "budget": 20, "settings": {"lambda_lr": 0.0}, "score": 0.875}
    tuning = {"seeds": [1000], "rollouts": 20, "tries": 4, "trials": [trial], "chosen": [trial]}
    html = report(groups, {"S": pictures}, ["craft-report run --suite S --output <folder>"], tuning)
    tags = _Tags()
    tags.feed(html)
    assert tags.open == []
    assert len(tags.sources) == 3
    for source, file in zip(tags.sources, pictures, strict=True):
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == file.read_bytes()
    assert not re.search(r"https?://", html), "nothing is fetched"
    for wanted in (
        "craft-report run --suite S --output &lt;folder&gt;",
        "0123456789abcdef",
        "A CPU",
        "lambda_lr=0.0: 0.875",
        "not tuned",
        "1:1 with the new skill&#x27;s",
        '<td class="best">0.95 <small>0.86 to 0.98</small></td>',
        '<td class="worse">-0.40',
        "Against replay",
        "20 anchors of each old skill",
        "200 anchors of each old skill",
    ):
        assert wanted in html, wanted


# -- the matrix and the commands -------------------------------------------------------------------------------------


def test_a_method_without_anchors_runs_once():
    cells = cells_of("S", ["naive", "hidden"], [20, 200], [0, 1])
    assert [cell.key[1:] for cell in cells] == [
        ("naive", 0, 0), ("hidden", 20, 0), ("hidden", 200, 0), ("naive", 0, 1), ("hidden", 20, 1), ("hidden", 200, 1),
    ]  # fmt: skip


def test_cells_that_differ_have_other_folders(tmp_path):
    first = Cell("S", "hidden", 20, 0)
    others = [
        Cell("D", "hidden", 20, 0),
        Cell("S", "hidden", 200, 0),
        Cell("S", "hidden", 20, 1),
        Cell("S", "hidden", 20, 0, {"lambda_lr": 0.0}),
        Cell("S", "hidden", 20, 0, {}, {"steps": 3}),
        Cell("S", "hidden", 20, 0, curve=2),
    ]
    assert len({cell.folder(tmp_path) for cell in (first, *others)}) == 7
    assert Cell("S", "hidden", 20, 0).folder(tmp_path) == first.folder(tmp_path)


def test_the_list_of_cells_grows_and_the_latest_of_a_kind_counts(tmp_path):
    with pytest.raises(FileNotFoundError, match="craft-report run --suite S"):
        read_matrix(tmp_path)
    remember(tmp_path, cells_of("S", ["naive"], [20], [0]), "first")
    tuned = {"settings": lambda method, budget: {"lr": 1e-4}}
    remember(tmp_path, cells_of("S", ["naive", "hidden"], [20], [0], **tuned), "second")
    remember(tmp_path, cells_of("S", ["hidden"], [20], [0], **tuned), "second")
    found = read_matrix(tmp_path)
    assert found["commands"] == ["first", "second"]
    assert [entry["key"] for entry in found["cells"]] == [["S", "naive", 0, 0], ["S", "hidden", 20, 0]]
    assert all(entry["cell"]["settings"] == {"lr": 1e-4} for entry in found["cells"])
    assert finished(tmp_path) == []


def test_cells_of_other_sizes_are_not_compared(tmp_path):
    remember(tmp_path, cells_of("S", ["naive"], [20], [0], sizes={"steps": 400}), "first")
    before = read_matrix(tmp_path)
    with pytest.raises(
        ValueError, match=r"suite S with \{'steps': 400, 'curve': 1\}, and this run has \{'steps': 1000"
    ):
        remember(tmp_path, cells_of("S", ["hidden"], [20], [0], sizes={"steps": 1000}), "second")
    with pytest.raises(ValueError, match="take another --output, or the same sizes"):
        remember(tmp_path, cells_of("S", ["hidden"], [20], [0], sizes={"steps": 400}, curve=3), "second")
    assert read_matrix(tmp_path) == before
    remember(tmp_path, cells_of("D", ["hidden"], [20], [0], sizes={"steps": 1000}), "another suite")


SIZE_FLAGS = ["--rollouts", str(ROLLOUTS)]


def test_show_makes_everything_again_from_the_results(tmp_path, capsys):
    cells = [put(tmp_path, found) for found in some_results()]
    remember(tmp_path, [Cell(**found["cell"]) for found in some_results()], "craft-report run --suite S")
    assert cli.main(["show", str(tmp_path)]) == 0
    assert "| hidden | **0.95" in capsys.readouterr().out
    made = {name: (tmp_path / name).read_bytes() for name in ("results.jsonl", "results.csv", "report.html")}
    assert {"success-S.png", "matrix-S.png", "storage-S.png"} < {file.name for file in tmp_path.iterdir()}
    for name in made:
        (tmp_path / name).unlink()
    assert cli.main(["show", str(tmp_path)]) == 0
    assert {name: (tmp_path / name).read_bytes() for name in made} == made
    (cells[-1] / "result.json").unlink()
    assert cli.main(["show", str(tmp_path)]) == 0
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(cells) - 1, "what is finished"


def test_finished_cells_are_taken_as_they_are(tmp_path, capsys):
    """All are, so that the command has nothing to run and no data to make."""
    for method, budget in (("naive", 0), ("hidden", 20)):
        put(tmp_path, result("S", method, budget, 4))
    flags = ["--methods", "naive", "hidden", "--seeds", "4", "--budgets", "20", "--jobs", "0", *SIZE_FLAGS]
    assert cli.main(["run", "--suite", "S", *flags, "--output", str(tmp_path)]) == 0
    assert "| naive |" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"cells"}
    (command,) = read_matrix(tmp_path)["commands"]
    assert command.startswith("craft-report run --suite S --methods naive hidden --seeds 4")


def test_a_part_that_fails_is_named_and_the_rest_is_kept(tmp_path, monkeypatch):
    put(tmp_path, result("S", "naive", 0, 4))
    cells = cells_of("S", ["naive"], [20], [4, 5], sizes={"rollouts": ROLLOUTS, "steps": STEPS})
    # A file where the demonstrations of seed 5 should go: their folder cannot be made.
    (tmp_path / "kept").write_text("")
    with pytest.raises(CellsFailedError, match="1 parts of the benchmark failed, the rest is done") as caught:
        run_matrix(tmp_path, cells, 0, show=False)
    log = preparation_folder(tmp_path, "S", 5) / "log.txt"
    assert "S seed 5: data, teacher, anchors: " in str(caught.value) and str(log) in str(caught.value)
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "hiden"], "there is no method hiden; there are naive, "),
        (["--seeds", "1000"], r"seeds \[1000\] are for tuning"),
        (["--budgets", "0"], r"--budgets must be at least 1, got \[0\]"),
        (["--rollouts", "0"], "--rollouts must be at least 1, got 0"),
        (["--steps", "2", "--curve", "2"], "--curve 2 measurements do not fit within --steps 2"),
        (["--jobs", "-1"], "--jobs must be at least 0"),
        (["--tuning", "nowhere.json"], "nowhere.json does not exist"),
    ],
)
def test_what_does_not_fit_is_refused(flags, message, tmp_path, capsys):
    assert cli.main(["run", "--suite", "S", *flags, "--output", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_shortened_flag_is_no_flag(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", "--suite", "S", "--method", "naive", "--output", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --method naive" in capsys.readouterr().err


def test_list_names_suites_and_methods(capsys):
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    assert "drawer-close + button-press → window-close → handle-press → faucet-open" in out
    assert "replay: cross-entropy of stored samples" in out


@pytest.mark.parametrize("terminal", [True, False])
def test_a_file_keeps_few_states_of_the_bar(tmp_path, monkeypatch, terminal):
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", shown)
    first, second = result("S", "naive", 0, 0), result("S", "naive", 0, 1)
    cells = [Cell(**found["cell"]) for found in (first, second)]
    with matrix._Display(tmp_path, cells, {("S", 0): cells}, show=True) as display:
        for _ in range(20):
            display.update()
        states = shown.getvalue().count("0 of 2 cells")
        assert states >= 20 if terminal else 1 <= states <= 3
        put(tmp_path, first)
        display.update()
        assert "1 of 2 cells" in shown.getvalue(), "a finished cell is told at once"


def test_two_methods_are_compared_across_budgets(tmp_path, capsys):
    better, worse = result("S", "hidden", 20, 0, hits=GOOD), result("S", "replay", 45, 0, hits=POOR)
    cells = [Cell(**found["cell"]) for found in (better, worse)]
    remember(tmp_path, cells, "craft-report run")
    for found in (better, worse):
        put(tmp_path, found)
    flags = ["compare", str(tmp_path), "--suite", "S", "--methods"]
    assert cli.main([*flags, "hidden,20", "replay,45"]) == 0
    lines = {line.split(" | ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["| old ↑"].startswith("| old ↑ | 0.95 | 0.15 | +0.80 (")
    assert lines["| old ↑"].endswith("| better |") and lines["| NBT ↓"].endswith("| better |")
    assert lines["| new ↑"].endswith("| 1.00 | 1.00 | +0.00 (+0.00 to +0.00) | tie |")
    assert cli.main([*flags, "replay,45", "hidden,20"]) == 0
    assert "| worse |" in capsys.readouterr().out
    assert cli.main([*flags, "replay,20", "hidden,20"]) == 2
    told = capsys.readouterr().err
    assert "no finished cell of replay,20 on suite S; it has hidden,20 replay,45" in told


def test_methods_without_a_seed_in_common_are_not_compared():
    first, second = (groups_of([result("S", "hidden", 20, seed)])[0] for seed in (0, 1))
    with pytest.raises(ValueError, match="have no seed in common"):
        tables.differences(first, second)
