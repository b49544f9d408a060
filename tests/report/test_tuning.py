"""Tuning: equal effort, other seeds, the best of what was tried; on results that lie there already."""

import json

import pytest

from craft_opt.bridge.report import cli
from craft_opt.bridge.report.cell import STEPS
from craft_opt.bridge.report.methods import METHODS
from craft_opt.bridge.report.results import Group
from craft_opt.bridge.report.tuning import TUNING_FILE, chosen_settings, read_tuning, score, trial_cells, tune
from tests.report.support import ROLLOUTS, put, result

SIZES = {"rollouts": ROLLOUTS, "steps": STEPS}
# Old and new success of each of retain's settings, the defaults first.
RETAIN = {0: ((4, 4), 10), 1: ((10, 10), 1), 2: ((8, 8), 9), 3: ((8, 8), 9)}


def lay(output, method, hits_of_knob, seed=1000, budget=0):
    for number, (old, new) in hits_of_knob.items():
        settings = METHODS[method].knobs[number]
        found = result("S", method, budget, seed, hits=((10, 10, 0), (*old, new)), settings=settings, sizes=SIZES)
        if number == 3:  # the same success as another, and surer of its actions
            for skill in found["stages"][0]["scores"]:
                skill["action_ce"] /= 2
        put(output, found)


def cells(methods, tries=4, seeds=(1000,)):
    return trial_cells("S", methods, [20], list(seeds), tries, sizes=SIZES, curve=1)


def test_every_method_tries_as_many_settings():
    found = cells(list(METHODS), tries=4)
    counts = {name: sum(cell.method == name for cell in found) for name in METHODS}
    assert set(counts.values()) == {4}
    assert {cell.seed for cell in found} == {1000}
    with pytest.raises(ValueError, match="naive has 4 settings to try, and 5 are asked for; pass --tries 4"):
        cells(["naive"], tries=5)


def test_reported_seeds_are_not_for_tuning():
    with pytest.raises(ValueError, match=r"seeds \[2\] are kept for what is reported"):
        cells(["naive"], seeds=(2, 1000))


def test_neither_old_nor_new_can_pay_for_the_other():
    found = result("S", "retain", 0, 1000, hits=((10, 10, 0), (10, 10, 1)))
    assert score(Group((found,))) == pytest.approx((1.0 + 0.1) / 2), "two old skills weigh as much as the new one"


def test_the_best_is_chosen_and_everything_recorded(tmp_path):
    lay(tmp_path, "retain", RETAIN)
    document = tune(tmp_path, cells(["retain"]), 0, 4, "craft-report tune", show=False)
    assert [trial["score"] for trial in document["trials"]] == pytest.approx([0.7, 0.55, 0.85, 0.85])
    (chosen,) = document["chosen"]
    assert chosen["settings"] == METHODS["retain"].knobs[3], "of two equal ones the surer"
    assert (chosen["old"], chosen["new"]) == ((16, 20), (9, 10))
    assert read_tuning(tmp_path / TUNING_FILE) == json.loads(json.dumps(document))
    pick = chosen_settings(document, "S")
    assert pick("retain", 0) == METHODS["retain"].knobs[3]
    assert pick("naive", 0) == {} and chosen_settings(document, "D")("retain", 0) == {}


def test_methods_are_added_and_tuned_again_but_not_with_another_effort(tmp_path):
    lay(tmp_path, "retain", RETAIN)
    lay(tmp_path, "naive", {number: ((5, 5), 10 - number) for number in range(4)})
    tune(tmp_path, cells(["retain"]), 0, 4, "first", show=False)
    document = tune(tmp_path, cells(["naive"]), 0, 4, "second", show=False)
    assert [(entry["method"], entry["settings"]) for entry in document["chosen"]] == [
        ("retain", METHODS["retain"].knobs[3]),
        ("naive", {}),
    ]
    assert document["commands"] == ["first", "second"]
    again = tune(tmp_path, cells(["naive"]), 0, 4, "second", show=False)
    assert len(again["trials"]) == 8 and again["commands"] == ["first", "second"]
    with pytest.raises(ValueError, match="methods are compared with equal effort only"):
        tune(tmp_path, cells(["naive"], tries=2), 0, 2, "third", show=False)


def test_a_run_takes_what_the_tuning_chose(tmp_path, capsys):
    lay(tmp_path, "retain", RETAIN)
    flags = ["--suite", "S", "--methods", "retain", "--jobs", "0", "--rollouts", str(ROLLOUTS)]
    assert cli.main(["tune", *flags, "--output", str(tmp_path)]) == 0
    assert "S retain b0: {'alpha': 0.8} (0.850)" in capsys.readouterr().out
    put(tmp_path, result("S", "retain", 0, 2, settings={"alpha": 0.8}, sizes=SIZES))
    assert cli.main(["run", *flags, "--seeds", "2", "--output", str(tmp_path)]) == 0
    html = (tmp_path / "report.html").read_text()
    assert "alpha=0.65: 0.850" in html and "Every method tried 4 settings" in html


def test_settings_of_one_suite_serve_another(tmp_path, capsys):
    lay(tmp_path, "hidden", {number: ((4 + number, 4), 10) for number in range(4)}, budget=20)
    methods = ["--methods", "hidden", "--jobs", "0", "--rollouts", str(ROLLOUTS), "--output", str(tmp_path)]
    assert cli.main(["tune", "--suite", "S", "--budgets", "20", *methods]) == 0
    chosen = METHODS["hidden"].knobs[3]
    for suite, budget, settings in (("D", 200, chosen), ("S", 20, chosen), ("D", 50, {})):
        hits = ((10, 10, 0, 0), (3, 10, 9, 0), (2, 4, 5, 8)) if suite == "D" else ((10, 10, 0), (5, 5, 9))
        put(tmp_path, result(suite, "hidden", budget, 1, hits=hits, settings=settings, sizes=SIZES))
    flags = ["--seeds", "1", *methods, "--tuned-on", "S", "20"]
    for suite, budget in (("D", "200"), ("S", "20")):
        assert cli.main(["run", "--suite", suite, "--budgets", budget, *flags]) == 0
    assert cli.main(["run", "--suite", "D", "--budgets", "50", *flags[:-3]]) == 0, "without the flag: the defaults"
    html = (tmp_path / "report.html").read_text()
    told = "epsilon_start=0.02, epsilon_end=0.01"
    assert f"<td>{told}, as on suite S with 20 anchors</td>" in html
    assert f"<td>{told}</td>" in html and "<td>defaults, not tuned</td>" in html


def test_settings_of_another_suite_must_be_there(tmp_path, capsys):
    flags = ["--methods", "retain", "--jobs", "0", "--output", str(tmp_path)]
    assert cli.main(["run", "--suite", "D", *flags, "--tuned-on", "S", "20"]) == 2
    told = capsys.readouterr().err
    assert "retain was not tuned on suite S with 20 anchors" in told
    assert "craft-report tune --suite S --methods retain --budgets 20" in told
    assert cli.main(["run", "--suite", "D", *flags, "--tuned-on", "Q", "20"]) == 2
    assert "--tuned-on takes a suite (S, L, D) and a number of anchors, got Q 20" in capsys.readouterr().err


def test_settings_given_by_hand_go_over_what_the_tuning_chose(tmp_path, capsys):
    lay(tmp_path, "hidden", {number: ((4 + number, 4), 10) for number in range(4)}, budget=20)
    methods = ["--methods", "hidden", "--jobs", "0", "--rollouts", str(ROLLOUTS), "--output", str(tmp_path)]
    assert cli.main(["tune", "--suite", "S", "--budgets", "20", *methods]) == 0
    settings = {**METHODS["hidden"].knobs[3], "selection": "coverage", "use_grad_projection": False}
    put(tmp_path, result("S", "hidden", 20, 1, settings=settings, sizes=SIZES))
    flags = ["run", "--suite", "S", "--budgets", "20", "--seeds", "1", *methods, "--set"]
    assert cli.main([*flags, "selection=coverage", "use_grad_projection=false"]) == 0
    assert "selection=coverage, use_grad_projection=False, not tuned" in (tmp_path / "report.html").read_text()
    for given, told in (
        ("selection", "--set takes name=value"),
        ("alpha=0.5", "hidden has no setting alpha"),
        ("selection=herding", "selection must be one of random, coverage, got 'herding'"),
    ):
        assert cli.main([*flags, given]) == 2
        assert told in capsys.readouterr().err
