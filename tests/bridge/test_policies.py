"""Loading a policy: every weight checked, dataset and statistics matched, fingerprints that see what matters."""

import shutil
from pathlib import Path

import pytest
import torch
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from safetensors.torch import load_file, save_file

from benchmarks.full_size import TASKS, write_tokenizers
from craft_opt.bridge.features import language_model_of
from craft_opt.bridge.fingerprints import preprocessor_fingerprint, teacher_fingerprint
from craft_opt.bridge.policies import (
    check_cameras,
    check_widths,
    load_policy,
    make_processors,
    read_policy_config,
    verify_weights,
)
from craft_opt.bridge.quickstart.modeling_pi0_fast_tiny import PI0FastTinyPolicy
from tests.quickstart.support import make_tiny_dataset


@pytest.fixture
def teacher_copy(world, tmp_path):
    return Path(shutil.copytree(world.teacher, tmp_path / "teacher"))


@pytest.fixture
def meta(world):
    return LeRobotDatasetMetadata("local/tiny", root=world.old)


def load(folder, meta):
    return load_policy(read_policy_config(folder, ("--device=cpu",)), meta)


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_a_whole_policy_loads(world, meta):
    policy = load(world.teacher, meta)
    stored = load_file(world.teacher / "model.safetensors")
    assert policy.state_dict().keys() == stored.keys()


def test_a_path_without_weights_is_refused(teacher_copy, meta):
    (teacher_copy / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"holds no model.safetensors, so no weight would be loaded; point it at"
    ):
        load(teacher_copy, meta)


def test_a_hub_name_that_cannot_be_reached_is_refused(world, meta):
    config = read_policy_config(world.teacher, ("--device=cpu",))
    config.pretrained_path = Path("nobody/nothing")
    with pytest.raises(FileNotFoundError, match=r"is no local folder, and model.safetensors could not be fetched"):
        load_policy(config, meta)


NAME = "model.paligemma_with_expert.paligemma.model.language_model.layers.1.mlp.down_proj.weight"


def test_verification_sees_a_missing_a_misshapen_and_a_different_weight(teacher_copy, meta):
    """What LeRobot's own pi0_fast loader prints a warning for, and goes on."""
    policy = load(teacher_copy, meta)
    weights = teacher_copy / "model.safetensors"
    verify_weights(policy, weights)
    edit_weights(teacher_copy, lambda tensors: tensors.pop(NAME))
    with pytest.raises(ValueError, match=r"did not load every weight: of \d+ tensors 1 are missing and 0 differ"):
        verify_weights(policy, weights)
    edit_weights(teacher_copy, lambda tensors: tensors.update({NAME: torch.zeros(3, 3)}))
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.down_proj.weight: \(3, 3\) in the file, \(32, 32\) in the policy"
    ):
        verify_weights(policy, weights)
    right = policy.state_dict()[NAME].clone()
    right[0, 0] += 1e-3
    edit_weights(teacher_copy, lambda tensors: tensors.update({NAME: right}))
    with pytest.raises(ValueError, match=r"down_proj.weight: other values"):
        verify_weights(policy, weights)
    edit_weights(teacher_copy, lambda tensors: tensors.update({NAME: policy.state_dict()[NAME], "model.odd": right}))
    with pytest.raises(ValueError, match=r"0 differ, and 1 in the file have no place \(model.odd: unexpected\)"):
        verify_weights(policy, weights)


@pytest.mark.parametrize("damage", ["missing", "misshapen"])
def test_lerobots_own_loader_which_never_raises_is_caught(teacher_copy, meta, monkeypatch, damage):
    """pi0_fast's from_pretrained prints a warning and returns random weights for these."""
    monkeypatch.setattr(PI0FastTinyPolicy, "from_pretrained", classmethod(PI0FastPolicy.from_pretrained.__func__))
    assert load(teacher_copy, meta) is not None
    change = {"missing": lambda t: t.pop(NAME), "misshapen": lambda t: t.update({NAME: torch.zeros(3, 3)})}[damage]
    edit_weights(teacher_copy, change)
    with pytest.raises(ValueError, match="did not load every weight"):
        load(teacher_copy, meta)


def test_verification_knows_checkpoints_without_the_model_prefix(teacher_copy, meta):
    policy = load(teacher_copy, meta)
    file = teacher_copy / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file)
    verify_weights(policy, file)


def test_a_dataset_without_the_policys_cameras_is_refused(world, tmp_path):
    make_tiny_dataset(tmp_path / "data", cameras=("observation.top",), episodes=1, frames=5)
    meta = LeRobotDatasetMetadata("local/tiny", root=tmp_path / "data")
    config = read_policy_config(world.teacher, ("--device=cpu",))
    with pytest.raises(
        ValueError, match=r"has observation.top, and the policy needs observation.image; name the matching"
    ):
        check_cameras(config, meta, {})
    check_cameras(config, meta, {"observation.top": "observation.image"})


def test_statistics_of_another_width_are_refused(world, meta, tmp_path):
    preprocessor, _ = make_processors(read_policy_config(world.teacher, ("--device=cpu",)), stats=None)
    check_widths(preprocessor, meta, {})
    meta.info.features["action"]["shape"] = (7,)
    with pytest.raises(ValueError, match=r"has 'action' of shape \(7,\), and the teacher's statistics have 4 values"):
        check_widths(preprocessor, meta, {})
    del meta.info.features["action"]
    with pytest.raises(ValueError, match=r"has no 'action', which the policy's preprocessor normalises"):
        check_widths(preprocessor, meta, {})


def test_a_preprocessor_without_statistics_is_refused(teacher_copy):
    for file in teacher_copy.glob("policy_preprocessor*.safetensors"):
        save_file({"timestamp.mean": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"has no normalisation statistics for action, observation.state; take the"):
        make_processors(read_policy_config(teacher_copy, ("--device=cpu",)), stats=None)


# -- processors of old checkpoints -----------------------------------------------------------------------------------


@pytest.fixture
def old_pi0_fast(world, meta, tmp_path, monkeypatch):
    """Configuration and processors of a real pi0_fast whose action tokenizer cannot be loaded any more."""
    # Without it the hub is tried again and again, for two minutes.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text, action = write_tokenizers(tmp_path, TASKS)
    config = PI0FastConfig(
        text_tokenizer_name=str(text), action_tokenizer_name=str(action), fast_skip_tokens=5, device="cpu"
    )
    folder = tmp_path / "old"
    config.input_features, config.output_features = {}, {}
    for part in (config, *make_pre_post_processors(config, dataset_stats=meta.stats)):
        part.save_pretrained(folder)
    for file in (folder / "config.json", folder / "policy_preprocessor.json"):
        file.write_text(file.read_text().replace(str(action), "physical-intelligence/fast"))
    return folder, text, action


def test_a_tokenizer_that_does_not_load_is_named_with_the_flag_that_replaces_it(old_pi0_fast, meta):
    folder, text, action = old_pi0_fast
    wanted = r"(?s)do not load: .*--policy.action_tokenizer_name=physical-intelligence/fast"
    with pytest.raises(ValueError, match=wanted):
        make_processors(read_policy_config(folder, ("--device=cpu",)), stats=meta.stats)
    config = read_policy_config(folder, ("--device=cpu", f"--action_tokenizer_name={action}"))
    step = make_processors(config, stats=meta.stats, trust_remote_code=True)[0].steps[-2]
    assert step.action_tokenizer.min_token < 0
    assert (step.fast_skip_tokens, step.paligemma_tokenizer_name) == (5, str(text)), "LeRobot forgets both"


def test_a_policy_whose_tokenizer_does_not_load_says_so_too(old_pi0_fast, meta):
    folder, *_ = old_pi0_fast
    save_file({"odd": torch.zeros(1)}, folder / "model.safetensors")
    config = read_policy_config(folder, ("--device=cpu",))
    with pytest.raises(ValueError, match=r"lerobot/fast-action-tokenizer does; the text tokenizer is gated"):
        load_policy(config, meta)


def test_a_checkpoint_from_before_there_were_processors_is_told_how_to_convert(teacher_copy):
    for file in teacher_copy.glob("policy_*processor*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"convert it once with: python -m lerobot.processor.migrate_policy_norm"):
        make_processors(read_policy_config(teacher_copy, ("--device=cpu",)), stats=None)


# -- fingerprints ----------------------------------------------------------------------------------------------------


def test_the_teachers_fingerprint_sees_every_bit_and_dtype(world, meta):
    policy = load(world.teacher, meta)
    first = teacher_fingerprint(policy)
    assert first == teacher_fingerprint(load(world.teacher, meta))
    weight = language_model_of(policy).layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.view(torch.int32)[3, 4] ^= 1
    assert teacher_fingerprint(policy) != first
    with torch.no_grad():
        weight.view(torch.int32)[3, 4] ^= 1
    assert teacher_fingerprint(policy) == first
    assert teacher_fingerprint(policy.bfloat16()) != first


def fingerprint(folder, **settings):
    config = read_policy_config(folder, ("--device=cpu",))
    return preprocessor_fingerprint(make_processors(config, **({"stats": None} | settings))[0])


def test_the_preprocessors_fingerprint_sees_statistics_and_settings_but_no_renaming(world, teacher_copy, meta):
    first = fingerprint(world.teacher)
    assert fingerprint(teacher_copy) == first, "where it lies does not matter"
    assert fingerprint(world.teacher, rename_map={"observation.top": "observation.image"}) == first
    assert fingerprint(world.teacher, stats=meta.stats) == first, "the same statistics, given or saved"
    other = LeRobotDatasetMetadata("local/tiny", root=world.new).stats
    assert fingerprint(world.teacher, stats=other) != first
    file = teacher_copy / "policy_preprocessor.json"
    file.write_text(file.read_text().replace('"max_length": 20', '"max_length": 21'))
    assert fingerprint(teacher_copy) != first


def test_the_preprocessors_fingerprint_does_not_change_with_use(world):
    """Tokenizers keep the settings of their last call."""
    preprocessor, _ = make_processors(read_policy_config(world.teacher, ("--device=cpu",)), stats=None)
    first = preprocessor_fingerprint(preprocessor)
    batch = {"observation.image": torch.zeros(1, 3, 32, 32), "observation.state": torch.zeros(1, 4), "task": ["close"]}
    preprocessor(batch)
    assert preprocessor_fingerprint(preprocessor) == first
