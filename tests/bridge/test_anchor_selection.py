"""Which frames become anchors when they are to be spread over a task's motions."""

import json
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from lerobot.datasets import LeRobotDataset

from craft_opt.bridge.anchor_cache import AnchorCache
from craft_opt.bridge.anchor_frames import AnchorSource
from craft_opt.bridge.anchor_manifest import AnchorManifest
from craft_opt.bridge.anchor_selection import CANDIDATES, select_frames, spread
from craft_opt.bridge.anchors import build_cache, prepare_build
from tests.quickstart.support import TASKS, make_tiny_dataset

CPU = {"policy_overrides": ["--device=cpu"]}


@pytest.fixture(scope="module")
def readers(world, tmp_path_factory):
    """Those of 48 frames of two tasks."""
    output = tmp_path_factory.mktemp("prepared") / "out"
    return prepare_build(output, world.teacher, [world.source()], num_samples=4, **CPU).readers


def radius(points, chosen):
    """The largest distance of a point to the nearest chosen one."""
    return np.linalg.norm(points[:, None] - points[None, list(chosen)], axis=2).min(axis=1).max()


# -- farthest-first traversal ----------------------------------------------------------------------------------------


def test_spread_starts_in_the_middle_and_goes_to_the_ends():
    points = np.array([[0.0], [1.0], [4.9], [9.0], [10.0]])  # mean 4.98
    assert spread(points, 3) == [2, 4, 0]
    assert spread(points, 5) == [2, 4, 0, 1, 3], "of equally far ones the first"


@pytest.mark.parametrize("seed", range(20))
def test_spread_leaves_no_point_farther_than_twice_what_is_possible(seed):
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(9, 2)) * generator.uniform(0.1, 10, size=2)
    for count in (1, 2, 3, 4):
        best = min(radius(points, chosen) for chosen in combinations(range(9), count))
        found = spread(points, count)
        assert len(set(found)) == count
        assert radius(points, found) <= 2 * best + 1e-12


def test_spread_takes_no_point_twice_even_where_all_are_equal():
    assert sorted(spread(np.ones((6, 3)), 6)) == list(range(6))


# -- frames ----------------------------------------------------------------------------------------------------------


def test_coverage_is_balanced_repeats_nothing_and_is_the_same_every_time(readers):
    frames = select_frames(readers, 10, None, True, 0, "coverage")
    assert len(set(frames)) == 10
    assert Counter(readers[0].task(row) for _, row in frames) == dict.fromkeys(TASKS, 5)
    assert select_frames(readers, 10, None, True, 0, "coverage") == frames
    assert set(select_frames(readers, 10, None, True, 0, "random")) != set(frames)


@pytest.mark.parametrize("balance", [True, False])
def test_coverage_leaves_the_frames_nearer_to_an_anchor(readers, balance):
    """In standardised states and actions, over all tasks, on the mean of some seeds."""
    rows = range(48)
    parts = [np.stack(part) for part in zip(*(readers[0].motion(row) for row in rows), strict=True)]
    parts = [(part - part.mean(axis=0)) / (part.std(axis=0) + 1e-9) / part.shape[1] ** 0.5 for part in parts]
    points = np.concatenate(parts, axis=1)

    def mean_radius(selection):
        picked = (select_frames(readers, 12, None, balance, seed, selection) for seed in range(10))
        return np.mean([radius(points, [row for _, row in frames]) for frames in picked])

    assert mean_radius("coverage") < 0.95 * mean_radius("random")


def test_all_frames_of_a_task_are_all_of_them_either_way(readers):
    assert set(select_frames(readers, 48, None, True, 0, "coverage")) == {(0, row) for row in range(48)}
    assert set(select_frames(readers, None, 1.0, False, 0, "coverage")) == {(0, row) for row in range(48)}


def test_only_some_candidates_are_looked_at(readers, monkeypatch):
    seen = []
    real = type(readers[0]).motion
    monkeypatch.setattr(type(readers[0]), "motion", lambda self, row: seen.append(row) or real(self, row))
    select_frames(readers, 2, None, True, 0, "coverage")
    assert len(seen) == 2 * min(CANDIDATES, 24)


def test_a_store_that_grows_keeps_what_it_had(world, readers, tmp_path):
    """The anchors of a task do not depend on the tasks that come later."""
    make_tiny_dataset(tmp_path / "third", tasks=("lift the lid",), episodes=4, frames=12, seed=9)
    sources = [world.source(), AnchorSource("local/third", tmp_path / "third")]
    both = prepare_build(tmp_path / "out", world.teacher, sources, num_samples=15, selection="coverage", **CPU)
    old = {frame for frame in both.frames if frame[0] == 0}
    assert old == set(select_frames(readers, 10, None, True, 0, "coverage"))


# -- caches ----------------------------------------------------------------------------------------------------------


def test_a_cache_says_how_it_was_chosen_and_is_not_mistaken_for_another(world, tmp_path):
    settings = {"num_samples": 6, "progress": False, **CPU}
    folder = tmp_path / "spread"
    manifest = build_cache(folder, world.teacher, [world.source()], selection="coverage", **settings)
    assert manifest.selection == AnchorManifest.read(folder).selection == "coverage"
    assert len(AnchorCache.open(folder)) == 6
    assert build_cache(folder, world.teacher, [world.source()], selection="coverage", **settings) == manifest
    with pytest.raises(FileExistsError, match="selection: 'coverage' there, 'random' asked for"):
        build_cache(folder, world.teacher, [world.source()], **settings)
    plain = build_cache(tmp_path / "random", world.teacher, [world.source()], **settings)
    content = json.loads((tmp_path / "random" / "manifest.json").read_text())
    assert plain.selection == "random" and "selection" not in content, "as caches were before there was a choice"


def test_a_manifest_that_names_another_selection_is_refused(world, tmp_path):
    replace(AnchorManifest.read(world.cache), selection="herding").write(tmp_path)
    with pytest.raises(ValueError, match="selection is 'herding' instead of one of random, coverage"):
        AnchorManifest.read(tmp_path)


def test_an_unknown_selection_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match="--selection must be one of random, coverage, got 'herding'"):
        prepare_build(tmp_path / "out", world.teacher, [world.source()], num_samples=4, selection="herding", **CPU)


def test_datasets_whose_actions_differ_in_width_are_not_compared(readers, monkeypatch):
    real = type(readers[0]).motion

    def motion(self, row):
        state, actions = real(self, row)
        return state, actions[: len(actions) - row % 2]

    monkeypatch.setattr(type(readers[0]), "motion", motion)
    with pytest.raises(ValueError, match="the datasets differ in the width of actions"):
        select_frames(readers, 8, None, False, 0, "coverage")


def test_motion_is_the_datasets_own_state_and_actions(world, readers):
    dataset = LeRobotDataset("local/tiny", root=world.old)
    state, actions = readers[0].motion(5)
    item = dataset[5]
    np.testing.assert_array_equal(state, item["observation.state"].numpy())
    width = len(item["action"])
    np.testing.assert_array_equal(actions[:width], item["action"].numpy())
