"""The tiny pi0_fast is LeRobot's pi0_fast: it loads, trains and acts through LeRobot's own doors, offline."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.policies.factory import make_policy, make_pre_post_processors
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy, PI0FastPytorch
from lerobot.utils.constants import ACTION, ACTION_TOKEN_MASK, ACTION_TOKENS
from torch.utils.data import default_collate

from craft_opt.bridge.quickstart.configuration_pi0_fast_tiny import PI0FastTinyConfig
from craft_opt.bridge.quickstart.modeling_pi0_fast_tiny import PI0FastTinyPolicy
from tests.quickstart.support import (
    IMAGE_KEY,
    make_tiny_dataset,
    make_tiny_policy,
    save_tiny_policy,
    tiny_config,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_tiny_dataset(tmp_path_factory.mktemp("dataset") / "data")


@pytest.fixture
def built(dataset):
    torch.manual_seed(7)
    return make_tiny_policy(dataset)


@pytest.fixture
def batch(dataset):
    return default_collate([dataset[i] for i in (0, 5, 13, 30)])


def test_only_constructors_and_loader_differ_from_lerobot(built):
    policy, _, _ = built
    assert isinstance(policy, PI0FastPolicy)
    assert isinstance(policy.model, PI0FastPytorch)
    ours = {name for name in vars(PI0FastTinyPolicy) if callable(getattr(PI0FastTinyPolicy, name))}
    assert ours - {"config_class"} == {"__init__", "from_pretrained"}
    assert set(vars(type(policy.model))) & set(vars(PI0FastPytorch)) <= {"__init__", "__module__", "__doc__"}


def test_round_trip_through_lerobots_factories(built, dataset, batch, tmp_path):
    policy, pre, post = built
    folder = save_tiny_policy(tmp_path / "first", policy, pre, post)
    moved = tmp_path / "elsewhere" / "moved"
    shutil.move(folder, moved)  # nothing in the folder may know where it was saved

    config = PreTrainedConfig.from_pretrained(moved)
    assert isinstance(config, PI0FastTinyConfig)
    config.pretrained_path = moved
    loaded = make_policy(config, ds_meta=dataset.meta)
    loaded_pre, loaded_post = make_pre_post_processors(config, pretrained_path=str(moved))

    state, loaded_state = policy.state_dict(), loaded.state_dict()
    assert state.keys() == loaded_state.keys()
    assert all(torch.equal(state[key], loaded_state[key]) for key in state)
    processed, reprocessed = pre(batch), loaded_pre(batch)
    tensors = [key for key, value in processed.items() if torch.is_tensor(value)]
    assert {ACTION_TOKENS, ACTION_TOKEN_MASK, IMAGE_KEY} <= set(tensors)
    assert all(torch.equal(processed[key], reprocessed[key]) for key in tensors)
    policy.eval()
    assert torch.equal(policy(processed)[0], loaded(reprocessed)[0])
    action = torch.rand(2, 4) * 2 - 1
    assert torch.equal(post(action), loaded_post(action))


def test_loads_offline_in_a_fresh_process(built, tmp_path):
    folder = save_tiny_policy(tmp_path / "policy", *built)
    program = (
        "import sys, craft_opt.bridge.quickstart.configuration_pi0_fast_tiny\n"
        "from lerobot.configs import PreTrainedConfig\n"
        "from lerobot.policies.factory import get_policy_class, make_pre_post_processors\n"
        "config = PreTrainedConfig.from_pretrained(sys.argv[1])\n"
        "policy = get_policy_class(config.type).from_pretrained(sys.argv[1], config=config)\n"
        "make_pre_post_processors(config, pretrained_path=sys.argv[1])\n"
        "print('loaded', type(policy).__name__)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "loaded PI0FastTinyPolicy" in done.stdout


def test_training_pipeline_accepts_policy_type(dataset):
    config = tiny_config(dataset)
    pipeline = TrainPipelineConfig(dataset=DatasetConfig(repo_id="local/tiny"), policy=config)
    pipeline.validate()
    policy = make_policy(pipeline.policy, ds_meta=dataset.meta)
    assert isinstance(policy, PI0FastTinyPolicy)
    assert pipeline.optimizer.lr == config.optimizer_lr


def test_overfits_one_batch_and_acts_as_it_was_shown(built, batch):
    policy, pre, post = built
    processed = pre(batch)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    first = policy(processed)[0].item()
    for _ in range(150):
        loss, _ = policy(processed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02 * first
    observed = {key: value for key, value in batch.items() if key.startswith("observation")}
    chunk = policy.predict_action_chunk(pre({**observed, "task": batch["task"]}))
    # The demonstration after dropping two of four frequencies and rounding to quarters, <bos> left out.
    shown = policy.detokenize_actions(processed[ACTION_TOKENS][:, 1:], action_horizon=4, action_dim=4)
    assert torch.equal(chunk, shown)
    raw = post(chunk[:, 0])
    assert (raw - batch[ACTION][:, 0]).abs().max() < 0.5


def test_an_untrained_policy_still_acts(built, batch):
    policy, pre, post = built
    observed = {key: value for key, value in batch.items() if key.startswith("observation")}
    action = post(policy.select_action(pre({**observed, "task": batch["task"]})))
    assert action.shape == (4, 4)
    assert torch.isfinite(action).all()


def test_missing_and_mismatched_weights_raise(built, tmp_path):
    folder = save_tiny_policy(tmp_path / "policy", *built)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "width": 48}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PI0FastTinyPolicy.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        PI0FastTinyPolicy.from_pretrained(folder)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ({"n_action_steps": 2}, "n_action_steps is 2"),
        ({"image_resolution": (32, 48)}, "image_resolution"),
        ({"image_resolution": (40, 40)}, "image_resolution"),
        ({"fast_frequencies": 9}, "fast_frequencies is 9"),
    ],
)
def test_settings_that_cannot_work_are_refused(dataset, override, named):
    with pytest.raises(ValueError, match=named):
        tiny_config(dataset, **override)


def test_a_chunk_that_does_not_fit_is_refused(dataset):
    config = tiny_config(dataset, max_action_tokens=11)
    with pytest.raises(ValueError, match=r"max_action_tokens is 11.*take 12"):
        PI0FastTinyPolicy(config)
