"""Caches and adapters: the base in PEFT is the base, a trained adapter is another teacher."""

import pytest
import torch
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from peft import LoraConfig, get_peft_model

from craft_opt.bridge.anchors import build_cache
from craft_opt.bridge.anchors_cli import main
from craft_opt.bridge.fingerprints import teacher_fingerprint
from craft_opt.bridge.policies import load_policy, read_policy_config

TARGETS = r".*language_model.*\.(q_proj|down_proj)"


@pytest.fixture
def base(world):
    meta = LeRobotDatasetMetadata("local/tiny", root=world.old)
    return load_policy(read_policy_config(world.teacher, ("--device=cpu",)), meta)


def wrapped(policy, **settings):
    return get_peft_model(policy, LoraConfig(target_modules=TARGETS, r=2, **settings))


def seconds_of(policy):
    return [p for name, p in policy.named_parameters() if "lora_B" in name]


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_that_changes_nothing_leaves_the_bases_fingerprint(base, settings):
    first = teacher_fingerprint(base)
    policy = wrapped(base, **settings)
    assert teacher_fingerprint(policy) == first
    with torch.no_grad():
        seconds_of(policy)[0][0, 0] = 1e-3
    changed = teacher_fingerprint(policy)
    assert changed != first
    with policy.disable_adapter():
        assert teacher_fingerprint(policy) == first
    assert teacher_fingerprint(policy) == changed


def test_a_module_that_was_saved_changed_is_seen(base):
    first = teacher_fingerprint(base)
    policy = wrapped(base, modules_to_save=["lm_head"])
    head = next(p for name, p in policy.named_parameters() if "modules_to_save" in name)
    with torch.no_grad():
        head[0, 0] += 1.0
    assert teacher_fingerprint(policy) != first
    with policy.disable_adapter():
        assert teacher_fingerprint(policy) == first


def test_a_change_of_the_base_under_an_idle_adapter_is_seen(base):
    policy = wrapped(base)
    first = teacher_fingerprint(policy)
    weight = next(p for name, p in policy.named_parameters() if name.endswith("q_proj.base_layer.weight"))
    with torch.no_grad():
        weight[0, 0] += 1.0
    assert teacher_fingerprint(policy) != first


def test_merging_makes_another_teacher(base):
    policy = wrapped(base)
    with torch.no_grad():
        seconds_of(policy)[0].normal_()
    before = teacher_fingerprint(policy)
    assert teacher_fingerprint(policy.merge_and_unload()) != before


def test_verify_loads_an_adapter_on_its_base(world, base, tmp_path, capsys):
    """A saved adapter verifies the cache that it made, and the base's only while it changes nothing."""
    base.config.use_peft = True
    policy = wrapped(base)
    policy.peft_config["default"].base_model_name_or_path = str(world.teacher)
    for folder, scale in (("idle", 0.0), ("trained", 0.3)):
        with torch.no_grad():
            for parameter in seconds_of(policy):
                parameter.fill_(scale)
        policy.save_pretrained(tmp_path / folder, save_embedding_layers=False)
        base.config.save_pretrained(tmp_path / folder)
        for file in world.teacher.glob("policy_*"):
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    build_cache(
        tmp_path / "cache",
        tmp_path / "trained",
        [world.source()],
        num_samples=4,
        policy_overrides=["--device=cpu"],
        progress=False,
    )

    def verify(cache, path):
        return main(["verify", str(cache), f"--policy.path={path}", "--policy.device=cpu"])

    assert verify(tmp_path / "cache", tmp_path / "trained") == 0
    assert verify(world.cache, tmp_path / "idle") == 0
    capsys.readouterr()
    assert verify(world.cache, tmp_path / "trained") == 1
    assert "was made by teacher" in capsys.readouterr().err
    assert verify(tmp_path / "cache", world.teacher) == 1
