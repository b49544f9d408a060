"""Where a cell goes on: at its first stage without a record. On folders laid by hand, so that nothing is trained."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from craft_opt.bridge.quickstart.measure import SkillScore
from craft_opt.bridge.report import cell as cell_module
from craft_opt.bridge.report.cell import Bench, Cell, anchors_a_step, run_cell
from craft_opt.bridge.report.memory import PeakMemory
from craft_opt.bridge.report.methods import METHODS
from craft_opt.bridge.report.suites import SUITES
from craft_opt.bridge.retention_term import cache_weights, shares
from tests.report.support import ROLLOUTS, result

CELL = Cell("D", "naive", 0, 0, {}, {"rollouts": ROLLOUTS})
HITS = ((10, 10, 0, 0), (3, 10, 9, 0), (2, 4, 5, 8))


@pytest.fixture
def output(tmp_path):
    """Folders of what the cells share, finished as far as their names tell, and the teacher's scores."""
    bench = Bench(SUITES["D"], 0, tmp_path, CELL.sizes)

    def stand_in(make):
        """Lay a folder where the program would make the thing."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cell_module, "collect", lambda root, *rest: root.mkdir(parents=True))
            patch.setattr(cell_module, "make_teacher", lambda s, r, d, out: out.mkdir(parents=True) or out)
            return make()

    for stage in range(3):
        stand_in(lambda stage=stage: bench.demonstrations(stage))
    stand_in(bench.held_out)
    stand_in(bench.teacher)
    scores = [SkillScore(**{**s, "outcomes": tuple(s["outcomes"])}) for s in result("D", hits=HITS)["before"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bench, "measure", lambda self, policy: scores)
        bench.before()
    return tmp_path


def lay_records(output, *numbers):
    for number in numbers:
        home = CELL.folder(output) / f"stage-{number}"
        (home / "policy").mkdir(parents=True)
        (home / "record.json").write_text(json.dumps(result("D", hits=HITS)["stages"][number - 1]))


def test_a_cell_whose_stages_are_done_is_put_together(output):
    lay_records(output, 1, 2)
    told = []
    found = run_cell(output, CELL, told.append)
    assert told == [1.0]
    assert found["cell"] == json.loads(json.dumps(asdict(CELL)))
    assert [[s["successes"] for s in stage["scores"]] for stage in found["stages"]] == [list(row) for row in HITS[1:]]
    assert [s["successes"] for s in found["before"]] == list(HITS[0])
    folder = CELL.folder(output)
    assert json.loads((folder / "result.json").read_text()) == found
    assert sorted(p.name for p in folder.iterdir()) == ["result.json", "stage-2"], "of the policies the last is kept"


def test_a_cell_goes_on_with_the_first_stage_that_is_not_done(output):
    """What a kill left of stage 2 goes; the demonstrations are empty folders, so that its training fails at once."""
    lay_records(output, 1)
    left = CELL.folder(output) / "stage-2" / "training" / "half a file"
    left.parent.mkdir(parents=True)
    left.write_text("")
    before = (CELL.folder(output) / "stage-1" / "record.json").stat().st_mtime_ns
    with pytest.raises(FileNotFoundError, match=str(Path("stage-1") / "policy")):
        run_cell(output, CELL)
    assert not left.exists()
    assert (CELL.folder(output) / "stage-1" / "record.json").stat().st_mtime_ns == before
    assert not (CELL.folder(output) / "result.json").exists()


def test_other_sizes_share_what_they_do_not_change(output):
    first, more = (Bench(SUITES["D"], 0, output, {"rollouts": n, "steps": n}) for n in (ROLLOUTS, 50))
    assert first.demonstrations(1) == more.demonstrations(1)
    assert first.teacher() == more.teacher()
    assert first.settings.rollouts == 10 and more.settings.steps == 50
    tuning = Bench(SUITES["D"], 1000, output, {})
    assert tuning.rollout_seed - first.rollout_seed == 1000 * 10_000, "rollouts of a tuning seed are nobody else's"


def test_peak_memory_begins_anew():
    with PeakMemory("cpu") as small:
        pass
    with PeakMemory("cpu") as large:
        held = torch.ones(2**26)  # 256 MiB
    del held
    with PeakMemory("cpu") as after:
        pass
    assert large.gib > small.gib + 0.2
    if Path("/proc/self/clear_refs").exists():
        assert after.gib < large.gib - 0.2, "what is freed does not count for what comes after"


def test_a_new_version_makes_cells_anew(monkeypatch, tmp_path):
    before = CELL.folder(tmp_path)
    assert replace(CELL).folder(tmp_path) == before
    monkeypatch.setattr(cell_module, "CELL_VERSION", -1)
    assert CELL.folder(tmp_path) != before


@pytest.mark.parametrize("sizes", [(), (5,), (400,), (16, 12), (40, 200), (3, 2)])
@pytest.mark.parametrize("weight", [1.0, 3.0, 0.05])
def test_every_cache_has_its_share_of_a_step(tmp_path, sizes, weight):
    method = METHODS["hidden"].with_settings({"prompted": 8, "prompted_weight": weight})
    craft = method.craft_config([tmp_path / str(k) for k in range(len(sizes))], max(1, len(sizes)))
    batch = anchors_a_step(craft, sizes)
    if not sizes:
        assert batch == 1
        return

    def fits(batch):
        return batch <= 32 and all(np.array(shares(batch, cache_weights(craft))) <= sizes)

    assert fits(batch) and not any(fits(more) for more in range(batch + 1, 33))
