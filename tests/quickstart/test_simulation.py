import os
from itertools import pairwise

import numpy as np
import pytest

from craft_opt.bridge.quickstart.env import LightMetaworldEnv
from craft_opt.bridge.quickstart.renderer import RayRenderer
from craft_opt.bridge.quickstart.simulation import (
    DRAWER_CLOSE,
    MAX_EPISODE_STEPS,
    NEW_SKILLS,
    OLD_SKILLS,
    World,
    demonstrate,
    expert_action,
)

# isort: split
import metaworld.policies
import mujoco
from lerobot.envs.metaworld import TASK_DESCRIPTIONS

SCENE = """
<mujoco>
  <worldbody>
    <camera name="eye" pos="0 0 5" fovy="90"/>
    <geom name="floor" type="plane" size="10 10 0.1" rgba="0 0 1 1"/>
    <geom name="box" type="box" size="1 1 1" pos="0 0 1" rgba="1 0 0 1"/>
    <geom name="ghost" type="box" size="3 3 3" pos="0 0 4" rgba="0 1 0 1" group="4"/>
  </worldbody>
</mujoco>
"""


@pytest.fixture(scope="module")
def scene():
    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


def test_the_camera_sees_the_geometry_that_is_there(scene):
    model, data = scene
    renderer = RayRenderer(model, "eye", 60)
    image = renderer.render(data)
    # The eye is 5 above the floor and 3 above the top of a box of width 2; at 90 degrees half the image spans 3 on the
    # box's top, so the box takes the middle third.
    red = image[..., 0] > image[..., 2]
    assert red[30, 30]
    assert red.sum() == pytest.approx(20 * 20, abs=40)
    assert not red[5, 5]
    depth = renderer.depth()
    assert depth[30, 30] == pytest.approx(3.0, rel=1e-3)
    corner = 5 * np.sqrt(1 + 2 * (59 / 60) ** 2)
    assert depth[0, 0] == pytest.approx(corner, rel=1e-6)


def test_unknown_camera_and_size_are_refused(scene):
    with pytest.raises(ValueError, match="'eye'"):
        RayRenderer(scene[0], "nose", 8)
    with pytest.raises(ValueError, match="at least 1 pixel"):
        RayRenderer(scene[0], "eye", 0)


def test_prompts_are_those_of_lerobots_environment():
    for skill in OLD_SKILLS + NEW_SKILLS:
        assert TASK_DESCRIPTIONS[skill.env_name] == skill.prompt


@pytest.mark.parametrize("skill", OLD_SKILLS + NEW_SKILLS, ids=lambda s: s.name)
def test_experts_solve_their_task_and_a_seed_decides_the_episode(skill):
    first = demonstrate(skill, 7, 0.3, side=8)
    again = demonstrate(skill, 7, 0.3, side=8)
    other = demonstrate(skill, 8, 0.3, side=8)
    assert len(first.images) == len(first.states) == len(first.actions) < MAX_EPISODE_STEPS
    assert np.array_equal(first.states, again.states)
    assert np.array_equal(first.images, again.images)
    assert not np.array_equal(first.states[0:1], other.states[0:1]) or len(first.states) != len(other.states)
    assert np.abs(first.actions).max() <= 1.0


def test_labels_are_the_clean_actions():
    quiet = demonstrate(DRAWER_CLOSE, 3, 0.0, side=8)
    noisy = demonstrate(DRAWER_CLOSE, 3, 0.6, side=8)
    assert np.array_equal(quiet.actions[0], noisy.actions[0])
    assert not np.array_equal(quiet.states[1], noisy.states[1])


def test_the_environment_gives_what_a_demonstration_recorded():
    demo = demonstrate(DRAWER_CLOSE, 5, 0.0)
    env = LightMetaworldEnv(DRAWER_CLOSE)
    observation, _ = env.reset(seed=5)
    for step in range(3):
        assert np.array_equal(observation["pixels"], demo.images[step])
        assert np.array_equal(observation["agent_pos"].astype(np.float32), demo.states[step])
        observation, *_ = env.step(demo.actions[step])


def test_images_between_two_looks_are_the_last_one():
    env = LightMetaworldEnv(DRAWER_CLOSE, render_every=3, side=16)
    action = np.ones(4, dtype=np.float32)
    frames = [env.reset(seed=1)[0]["pixels"], *(env.step(action)[0]["pixels"] for _ in range(6))]
    same = [np.array_equal(a, b) for a, b in pairwise(frames)]
    assert same == [True, True, False, True, True, False]


def test_the_environment_reports_the_experts_success():
    env = LightMetaworldEnv(DRAWER_CLOSE, side=8)
    expert = getattr(metaworld.policies, DRAWER_CLOSE.expert)()
    _, info = env.reset(seed=11)
    observation = env._env._get_obs()
    for _ in range(env._max_episode_steps):
        _, _, terminated, _, info = env.step(expert_action(expert, observation))
        observation = env._env._get_obs()
        if terminated:
            break
    assert info["final_info"]["is_success"]


def test_no_display_is_asked_for():
    assert os.environ["MUJOCO_GL"] == "disable"
    assert World(DRAWER_CLOSE, 8).image().shape == (8, 8, 3)
