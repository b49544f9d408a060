"""Suite D: nothing but the prompt tells its skills of one scene apart. And every suite's skills can be done."""

import metaworld.policies
import numpy as np
import pytest

from craft_opt.bridge.quickstart import simulation
from craft_opt.bridge.quickstart.simulation import STATE_DIM, Skill, World, demonstrate
from craft_opt.bridge.report.scenes import SceneSkill
from craft_opt.bridge.report.suites import SUITES

BY_NAME = {skill.name: skill for skill in SUITES["D"].skills}
PAIRS = [("window-open", "window-close"), ("faucet-open", "faucet-close")]
SEEDS = (1, 77, 4_000)


def first_look(skill, seed):
    world = World(skill)
    observation = world.reset(seed)
    return world.image(), observation[:STATE_DIM]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
def test_both_goals_begin_alike(pair):
    skills = [BY_NAME[name] for name in pair]
    worlds = [World(skill) for skill in skills]
    for seed in SEEDS:
        (image, state), (other, other_state) = (
            (world.image(), found[:STATE_DIM]) for world, found in ((w, w.reset(seed)) for w in worlds)
        )
        assert image.tobytes() == other.tobytes()
        np.testing.assert_array_equal(state, other_state)
    assert skills[0].prompt != skills[1].prompt
    assert SUITES["D"].learned[SUITES["D"].skills.index(skills[0])] == 0, "one goal is old"
    assert SUITES["D"].learned[SUITES["D"].skills.index(skills[1])] > 0, "and the other new"


def test_metaworlds_own_windows_do_not_begin_alike():
    """So that the test above can fail: the tasks as MetaWorld has them."""
    plain = [Skill(s.name, s.env_name, s.prompt, s.expert) for s in (BY_NAME["window-open"], BY_NAME["window-close"])]
    images = [first_look(skill, SEEDS[0])[0] for skill in plain]
    assert images[0].tobytes() != images[1].tobytes()


def test_the_goal_is_not_reached_at_the_start_and_seeds_place_the_object_elsewhere():
    for skill in SUITES["D"].skills:
        world = World(skill)
        looks = []
        for seed in SEEDS:
            world.reset(seed)
            looks.append(world.image().tobytes())
            _, _, _, _, info = world.env.step(np.zeros(4))
            assert not info["success"], f"{skill.name} is done before anything was"
        assert len(set(looks)) == len(SEEDS)


@pytest.mark.parametrize("skill", [*SUITES["D"].skills, *SUITES["L"].skills[3:]], ids=lambda skill: skill.name)
def test_the_experts_do_it(skill):
    demo = demonstrate(skill, seed=9, noise=0.6, side=8)
    assert len(demo.actions) < simulation.MAX_EPISODE_STEPS


def test_two_skills_of_one_task_have_a_world_each():
    """A scene's world must not serve MetaWorld's own task of the same name."""
    scene = BY_NAME["window-close"]
    plain = Skill(scene.name, scene.env_name, scene.prompt, scene.expert)
    first = [demonstrate(skill, seed=3, noise=0.0, side=16).images[0].tobytes() for skill in (scene, plain)]
    assert first[0] != first[1]
    assert isinstance(scene, SceneSkill)


def test_suites_name_what_exists():
    for suite in SUITES.values():
        assert len(suite.skills) == len(suite.learned) == len({skill.name for skill in suite.skills})
        assert len({skill.prompt for skill in suite.skills}) == len(suite.skills)
        assert list(suite.learned) == sorted(suite.learned)
        assert suite.learned[0] == 0 and max(suite.learned) == len(suite.stages) - 1 > 0
        for skill in suite.skills:
            assert hasattr(metaworld.policies, skill.expert)
    assert len(SUITES["L"].skills) == 5
