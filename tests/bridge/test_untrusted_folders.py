"""Folders from a stranger: what LeRobot, PEFT or numpy would run, follow or read beyond is refused before it does.

Where LeRobot itself runs the canary, the test shows that first: it would fail without the check.
"""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.random_utils import load_rng_state
from safetensors.torch import load_file, save_file

from benchmarks.full_size import write_tokenizers
from craft_opt.bridge import cli
from craft_opt.bridge.anchor_cache import AnchorCache
from craft_opt.bridge.anchors import AnchorSource
from craft_opt.bridge.anchors_inspect import inspect_cache
from craft_opt.bridge.checkpoint import CraftState, check_training_state
from craft_opt.bridge.config import parse_config, resume_config
from craft_opt.bridge.policies import load_policy, make_processors, read_policy_config
from craft_opt.bridge.seals import check_prefix, check_seal, seal
from craft_opt.bridge.untrusted import read_json
from craft_opt.bridge.untrusted_policy import check_processor
from tests.bridge.fuzz import bounded_memory
from tests.bridge.test_anchors_bad_input import content_of, reseal, with_first_shard
from tests.quickstart.support import TASKS


class Canary:
    """A pickle that makes a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture
def canary(tmp_path):
    """The file that must not appear."""
    file = tmp_path / "canary"
    yield file
    assert not file.exists(), "something from the folder ran"


def pickled(canary: Path, how: str) -> bytes:
    if how == "pickle":
        return pickle.dumps(Canary(canary))
    file = canary.with_name("archive")
    torch.save({"lam": Canary(canary)}, file)
    return file.read_bytes()


@pytest.fixture(scope="module")
def meta(world):
    return LeRobotDatasetMetadata("local/tiny", root=world.old)


@pytest.fixture
def teacher(world, tmp_path):
    """A copy of the teacher that a test may make hostile."""
    return Path(shutil.copytree(world.teacher, tmp_path / "teacher"))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "out"
    assert cli.main([*world.flags(output), "--steps=2", "--save_freq=1"]) == 0
    return output


@pytest.fixture
def checkpoint(finished, tmp_path):
    """A checkpoint without a seal, as a stranger may send it: a seal is made by whoever changes it."""
    folder = Path(shutil.copytree(finished, tmp_path / "run", symlinks=True)) / "checkpoints" / "000001"
    (folder / "checksums.json").unlink()
    return folder


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def load(folder, meta, **settings):
    return load_policy(read_policy_config(folder, ("--device=cpu",)), meta, **settings)


def processors(folder, **settings):
    return make_processors(read_policy_config(folder, ("--device=cpu",)), stats=None, **settings)


# -- pickles -----------------------------------------------------------------------------------------------------


def test_the_canary_sings(tmp_path):
    for how in ("pickle", "torch"):
        file = tmp_path / how / "canary"
        file.parent.mkdir()
        content = file.parent / "content"
        content.write_bytes(pickled(file, how))
        with content.open("rb") as stream:
            pickle.load(stream) if how == "pickle" else torch.load(content, weights_only=False)
        assert file.exists()


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_in_the_place_of_any_file_of_a_cache_is_not_read(cache_copy, canary, how):
    for file in sorted(cache_copy.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(pickled(canary, how))
        with pytest.raises(ValueError, match=file.name):
            AnchorCache.open(cache_copy)
        file.write_bytes(whole)
    first = cache_copy / "shard-00000.safetensors"
    first.write_bytes(pickled(canary, how))
    changes = {"bytes": first.stat().st_size}
    reseal(cache_copy, shards=with_first_shard(cache_copy, **changes))
    with pytest.raises(ValueError, match=first.name):
        AnchorCache.open(cache_copy)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_in_the_place_of_any_file_of_a_checkpoint_is_not_read(checkpoint, canary, capsys, how):
    config = checkpoint / "pretrained_model" / "train_config.json"
    # The policy's settings are those of train_config.json.
    unread = ("README.md", "config.json")
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name not in unread):
        whole = file.read_bytes()
        file.write_bytes(pickled(canary, how))
        assert cli.main(["--resume=true", f"--config_path={config}"]) == 2, file.name
        assert "error: " in capsys.readouterr().err
        file.write_bytes(whole)


def test_a_pickle_in_the_place_of_a_policys_settings_is_not_read(teacher, canary, meta):
    for name in ("config.json", "policy_preprocessor.json", "policy_postprocessor.json"):
        whole = (teacher / name).read_bytes()
        (teacher / name).write_bytes(pickled(canary, "pickle"))
        with pytest.raises(ValueError, match=name):
            load(teacher, meta)
            processors(teacher)
        (teacher / name).write_bytes(whole)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "adapter_model.bin", "model.pt"])
def test_weights_in_a_pickle_are_not_read(teacher, canary, meta, name):
    (teacher / name).write_bytes(pickled(canary, "torch"))
    assert load(teacher, meta) is not None, "beside whole weights it is nothing"
    (teacher / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model.safetensors, so no weight would be loaded"):
        load(teacher, meta)


def test_an_adapter_in_a_pickle_is_not_read(teacher, canary, meta):
    (teacher / "adapter_model.bin").write_bytes(pickled(canary, "torch"))
    (teacher / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    edit(teacher / "config.json", lambda content: content.update(use_peft=True))
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_model.safetensors"):
        load(teacher, meta)


def test_a_pickle_in_a_kept_dataset_is_not_read(world, canary, tmp_path):
    data = Path(shutil.copytree(world.old, tmp_path / "data"))
    for file in sorted(path for path in data.rglob("*") if path.is_file()):
        whole = file.read_bytes()
        file.write_bytes(pickled(canary, "pickle"))
        # LeRobot's and pyarrow's own errors: what counts is the canary. Some files it can do without.
        try:
            dataset = AnchorSource("local/tiny", data).open()
            dataset[0]
        except Exception as error:
            assert not isinstance(error, AssertionError)
        file.write_bytes(whole)


# -- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 2**40}, "the settings beside it ask for"),
        ({"mlp_dim": 2**30, "vision_mlp_dim": 2**30}, "the settings beside it ask for"),
        ({"depth": 2**40}, "more layers than it has"),
        ({"fast_scale": 1e12}, "are no vocabulary"),
        ({"width": -1}, ".*"),
    ],
)
def test_settings_that_dwarf_their_weights_make_no_room(teacher, meta, changes, message):
    edit(teacher / "config.json", lambda content: content.update(changes))
    with bounded_memory(), pytest.raises((ValueError, RuntimeError), match=message) as refused:
        load(teacher, meta)
    assert "memory" not in str(refused.value)


def test_a_processor_that_asks_for_a_huge_vocabulary_is_refused(teacher):
    def change(content):
        [step] = [step for step in content["steps"] if step.get("registry_name") == "pi0_fast_tiny_tokenizer"]
        step["config"]["n_action_tokens"] = 2**40

    edit(teacher / "policy_preprocessor.json", change)
    with bounded_memory(), pytest.raises(ValueError, match="1099511627776 action tokens are no vocabulary"):
        processors(teacher)


# -- processors --------------------------------------------------------------------------------------------------


def with_step(folder: Path, **step) -> Path:
    file = folder / "policy_preprocessor.json"
    edit(file, lambda content: content["steps"].insert(0, step))
    return file


@pytest.mark.parametrize(
    ("call", "settings"),
    [("os.mkdir", {"path": "CANARY"}), ("subprocess.Popen", {"args": ["mkdir", "CANARY"]})],
)
def test_a_processor_that_names_a_function_is_refused(teacher, canary, call, settings):
    settings = json.loads(json.dumps(settings).replace("CANARY", str(canary)))
    with_step(teacher, **{"class": call, "config": settings})
    with pytest.raises(ValueError, match=f"names '{call}' as a step, which is no class of processor steps"):
        processors(teacher)


def test_lerobot_calls_what_a_processor_names(teacher, tmp_path):
    """Why it is checked: LeRobot 0.6 imports and calls any function."""
    with_step(teacher, **{"class": "os.mkdir", "config": {"path": str(tmp_path / "made")}})
    with pytest.raises(Exception, match=r".*"):
        PolicyProcessorPipeline.from_pretrained(teacher, config_filename="policy_preprocessor.json")
    assert (tmp_path / "made").is_dir()


@pytest.mark.parametrize(
    "step",
    [
        {"class": "os.system"},
        {"class": "lerobot.configs.parser.load_plugin", "config": {"plugin_path": "antigravity"}},
        {"class": "antigravity.Step"},
        {"class": "craft_opt.bridge.cli.main"},
        {"class": ""},
        {"class": 3},
        {},
        "os.system",
        {"registry_name": "device_processor", "state_file": "../../secret.safetensors"},
        {"registry_name": "device_processor", "state_file": "/etc/passwd"},
        {"registry_name": "device_processor", "state_file": 1},
    ],
)
def test_a_processors_step_that_is_none_is_refused(tmp_path, step):
    file = tmp_path / "policy_preprocessor.json"
    file.write_text(json.dumps({"name": "x", "steps": [step]}))
    with pytest.raises(ValueError, match=r"policy_preprocessor.json (names|has the state of a step)"):
        check_processor(file)


def test_steps_of_lerobot_and_of_this_package_are_accepted(world, tmp_path):
    check_processor(world.teacher / "policy_preprocessor.json")
    file = tmp_path / "policy_preprocessor.json"
    steps = [{"class": "lerobot.processor.DeviceProcessorStep", "config": {"device": "cpu"}}]
    file.write_text(json.dumps({"name": "x", "steps": steps}))
    check_processor(file)


def test_a_processor_of_an_unknown_step_is_one_sentence(teacher):
    with_step(teacher, registry_name="no_such_step")
    with pytest.raises(ValueError, match=r"do not load: .*no_such_step"):
        processors(teacher)


# -- tokenizers --------------------------------------------------------------------------------------------------


@pytest.fixture
def pi0_fast(tmp_path, meta, monkeypatch):
    """A saved pi0_fast whose action tokenizer brings code that would make the canary."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text, action = write_tokenizers(tmp_path / "tokenizers", TASKS)
    config = PI0FastConfig(
        text_tokenizer_name=str(text), action_tokenizer_name=str(action), fast_skip_tokens=5, device="cpu"
    )
    config.input_features, config.output_features = {}, {}
    folder = tmp_path / "policy"
    for part in (config, *make_pre_post_processors(config, dataset_stats=meta.stats)):
        part.save_pretrained(folder)
    save_file({"odd": torch.zeros(1)}, folder / "model.safetensors")
    code = action / "processing_local_fast.py"
    code.write_text(f"{code.read_text()}\nimport pathlib\npathlib.Path({str(tmp_path / 'canary')!r}).touch()\n")
    return folder


CODE = r"brings code of its own \('processing_local_fast.py'\), which would run .* --trust_remote_code=true"


def test_a_tokenizers_code_runs_for_nobody_who_did_not_ask(pi0_fast, canary, meta):
    config = read_policy_config(pi0_fast, ("--device=cpu",))
    with pytest.raises(ValueError, match=CODE):
        make_processors(config, stats=meta.stats)
    with pytest.raises(ValueError, match=CODE):
        load_policy(config, meta)


def test_a_processors_own_word_for_trust_counts_for_nothing(pi0_fast, canary, meta):
    """LeRobot saves ``trust_remote_code`` in the processor's file, where the author of the code can set it."""
    file = pi0_fast / "policy_preprocessor.json"
    assert json.loads(file.read_text())["steps"][-2]["config"]["trust_remote_code"] is True
    with pytest.raises(ValueError, match=CODE):
        make_processors(read_policy_config(pi0_fast, ("--device=cpu",)), stats=meta.stats)


def test_a_tokenizers_code_runs_for_who_asks(pi0_fast, meta, tmp_path):
    config = read_policy_config(pi0_fast, ("--device=cpu",))
    make_processors(config, stats=meta.stats, trust_remote_code=True)
    assert (tmp_path / "canary").exists(), "the tests above would see it"


def test_a_name_of_lerobots_own_tokenizer_is_trusted_on_the_hub_only(pi0_fast, canary, meta, tmp_path, monkeypatch):
    """A folder of that name in the working folder comes before the hub."""
    config = read_policy_config(pi0_fast, ("--device=cpu",))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(config.action_tokenizer_name, tmp_path / "lerobot" / "fast-action-tokenizer")
    config.action_tokenizer_name = "lerobot/fast-action-tokenizer"
    with pytest.raises(ValueError, match=CODE):
        make_processors(config, stats=meta.stats)


def test_only_the_command_line_says_trust(finished, checkpoint):
    config = checkpoint / "pretrained_model" / "train_config.json"
    edit(config, lambda content: content.update(trust_remote_code=True))
    args = [f"--config_path={config}", "--resume=true"]
    assert parse_config(args).trust_remote_code is False
    assert parse_config([*args, "--trust_remote_code=true"]).trust_remote_code is True


# -- adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"megatron_config": {"x": 1}, "megatron_core": "antigravity"}, "has PEFT import 'antigravity'"),
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, "has PEFT load a tokenizer"),
        ({"r": 2**40}, "asks for rank 1099511627776, and no tensor"),
        ({"r": "4"}, "asks for rank '4'"),
        ({"rank_pattern": {".*": 2**40}}, "asks for rank 1099511627776"),
    ],
)
def test_an_adapter_that_asks_for_too_much_is_refused(teacher, meta, settings, message):
    save_file({"lora_A.weight": torch.zeros(4, 8)}, teacher / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": str(teacher)}
    (teacher / "adapter_config.json").write_text(json.dumps(plain | settings))
    edit(teacher / "config.json", lambda content: content.update(use_peft=True))
    with pytest.raises(ValueError, match=message):
        load(teacher, meta)


# -- checkpoints -------------------------------------------------------------------------------------------------


def test_a_resumed_run_writes_into_its_own_folder(checkpoint, tmp_path):
    outside = tmp_path / "outside"
    config = checkpoint / "pretrained_model" / "train_config.json"
    edit(config, lambda content: content.update(output_dir=str(outside)))
    assert resume_config(checkpoint).output_dir == checkpoint.parents[1]
    assert cli.main(["--resume=true", f"--config_path={config}"]) == 0
    assert (checkpoint.parent / "000002").is_dir()
    assert not outside.exists()


def test_a_checkpoint_in_no_run_asks_where_to_write(checkpoint, tmp_path):
    alone = Path(shutil.copytree(checkpoint, tmp_path / "alone"))
    config = alone / "pretrained_model" / "train_config.json"
    with pytest.raises(ValueError, match=r"does not lie in it; say where to write with --output_dir=<folder>"):
        resume_config(alone)
    args = ["--resume=true", f"--config_path={config}", f"--output_dir={tmp_path / 'new'}"]
    assert parse_config(args).output_dir == tmp_path / "new"


def test_numpy_would_read_beyond_its_state(checkpoint):
    """Why the generator's state is checked: numpy takes any place in it."""
    file = checkpoint / "training_state" / "rng_state.safetensors"
    states = load_file(file)
    before = np.random.get_state()
    try:
        save_file(states | {"np_rng_state_index": torch.tensor([700])}, file)
        load_rng_state(file.parent)
        assert np.random.get_state()[2] == 700
    finally:
        np.random.set_state(before)
    with pytest.raises(ValueError, match="has no state of numpy's generator"):
        check_training_state(checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {"np_rng_state_index": torch.tensor([-1])},
        {"np_rng_state_index": torch.tensor([1, 2])},
        {"np_rng_state_values": torch.zeros(3, dtype=torch.int64)},
    ],
)
def test_a_generator_state_that_is_none_is_refused(checkpoint, changes):
    file = checkpoint / "training_state" / "rng_state.safetensors"
    save_file(load_file(file) | changes, file)
    with pytest.raises(ValueError, match="has no state of numpy's generator"):
        check_training_state(checkpoint)


@pytest.mark.parametrize("step", [1.0, True, -1, "1", None, [1], 10**400, float("nan")])
def test_a_step_that_is_none_is_refused(checkpoint, step, capsys):
    edit(checkpoint / "training_state" / "training_step.json", lambda content: content.update(step=step))
    config = checkpoint / "pretrained_model" / "train_config.json"
    assert cli.main(["--resume=true", f"--config_path={config}"]) == 2
    assert "training_step.json" in capsys.readouterr().err or step == 10**400


@pytest.mark.parametrize(
    "groups", ["[]", "3", "[{}]", "LR", "[[[[", "EXTRA"], ids=["none", "number", "empty", "text", "cut", "extra"]
)
def test_param_groups_of_other_types_are_refused(checkpoint, groups, capsys):
    file = checkpoint / "training_state" / "optimizer_param_groups.json"
    content = json.loads(file.read_text())
    content[0] |= {"lr": "1e-3"} if groups == "LR" else {"extra": 1} if groups == "EXTRA" else {}
    file.write_text(json.dumps(content) if groups in ("LR", "EXTRA") else groups)
    config = checkpoint / "pretrained_model" / "train_config.json"
    assert cli.main(["--resume=true", f"--config_path={config}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "resume from another checkpoint" in error and "training_state" in error


def test_moments_of_another_shape_are_refused(checkpoint, capsys):
    file = checkpoint / "training_state" / "optimizer_state.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("exp_avg"))
    save_file(tensors | {name: torch.zeros(3)}, file)
    config = checkpoint / "pretrained_model" / "train_config.json"
    assert cli.main(["--resume=true", f"--config_path={config}"]) == 2
    assert "does not fit this run" in capsys.readouterr().err


STATE = CraftState(0.5, 3, 0, (4,), ("a" * 64,), "teacher", 1)
INT = torch.int64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lam": torch.tensor([1.0, 2.0])}, "lam is"),
        ({"lam": torch.tensor(float("nan"))}, "λ is nan"),
        ({"lam": torch.tensor(-1.0)}, "λ is -1"),
        ({"lam": torch.tensor(1)}, "lam is 1, which is no real number"),
        ({"t": torch.tensor(3.0)}, "t is 3.0, which is no whole number"),
        ({"t": torch.tensor(True)}, "t is True, which is no whole number"),
        ({"t": torch.tensor(-1)}, "is negative"),
        ({"accumulated": torch.tensor(0)}, "is negative"),
        ({"anchor_positions": torch.tensor([-4])}, "is negative"),
        ({"anchor_positions": torch.tensor([4, 4])}, "are not as many"),
        ({"anchor_positions": torch.tensor([[4]])}, "which is no whole number"),
        ({"anchor_positions": torch.tensor(4)}, "anchor_positions is 4"),
        ({"more": torch.tensor(4)}, "it has 'more' where"),
    ],
)
def test_a_state_that_says_nonsense_is_refused(tmp_path, changes, message):
    file = tmp_path / "craft_state.safetensors"
    STATE.write(file)
    metadata = {"format": "craft-state-2", "cache_digests": "a" * 64, "normalization_stats": "teacher"}
    save_file(load_file(file) | changes, file, metadata=metadata)
    with pytest.raises(ValueError, match=message):
        CraftState.read(file)


def test_seals_look_at_nothing_outside(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / "inside").write_text("x")
    seal(folder, metrics={})
    edit(folder / "checksums.json", lambda content: content["files"].update({"../secret": "0" * 64}))
    with pytest.raises(ValueError, match="damaged"):
        check_seal(folder, "no")
    with pytest.raises(ValueError, match="is damaged, or of another run"):
        check_prefix({"bytes": 2**62, "sha256": "0"}, folder / "inside")


# -- caches ------------------------------------------------------------------------------------------------------


def test_a_link_out_of_a_cache_is_not_followed(cache_copy, tmp_path):
    for name in ("shard-00001.safetensors", "manifest.json"):
        moved = shutil.move(cache_copy / name, tmp_path / name)
        (cache_copy / name).symlink_to(moved)
        with pytest.raises(ValueError, match=rf"{name} is a link to .*, outside of its folder"):
            AnchorCache.open(cache_copy)
        (cache_copy / name).unlink()
        shutil.move(moved, cache_copy / name)
    (tmp_path / "link").symlink_to(cache_copy)
    assert len(AnchorCache.open(tmp_path / "link")) == 20, "the folder itself may be one"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": 1, "a": 2}', "a key is there twice"),
        ('{"a": NaN}', "NaN is no finite number"),
        ('{"a": -Infinity}', "-Infinity is no finite number"),
        ('{"a": 1e999}', "1e999 is no finite number"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        (" " * (2**24 + 1), "is larger than 16 MiB"),
        ("\ufeff{}", "BOM"),
        ("", "Expecting value"),
    ],
    ids=["deep", "twice", "nan", "inf", "overflow", "digits", "surrogate", "large", "bom", "empty"],
)
def test_json_with_no_or_two_meanings_is_refused(tmp_path, text, message):
    file = tmp_path / "manifest.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"manifest.json .*{message}.*; do this"):
        read_json(file, "do this")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 2**60}, "its shards hold 20"),
        ({"samples": 20.0}, "samples is 20.0, which is no whole number"),
        ({"seed": "0"}, "seed is '0', which is no whole number"),
        ({"seed": True}, "seed is True"),
        ({"teacher": None}, "teacher is None, which is no text"),
        ({"tasks": []}, "names no task"),
        ({"layers": [1, 1, 2]}, "each once"),
        ({"depth": 1}, "are not layers of 1"),
        ({"teacher_variance": {"1": 1.0, "2": -1.0}}, "a variance is not above 0"),
        ({"teacher_variance": {"1": 1.0}}, "variances are not those of its layers"),
        ({"cameras": ["x"]}, "needs image/x"),
        ({"top_k": 1}, "top_k is 1"),
        ({"feature_dtype": "int32"}, "feature_dtype is 'int32'"),
        ({"feature_dtype": "bfloat16"}, "has features/1 as float32|has features/2 as float32"),
        ({"tasks": ["only one"]}, "task_index 0 to 1 of 1"),
    ],
)
def test_a_manifest_whose_fields_contradict_each_other_is_refused(cache_copy, changes, message):
    reseal(cache_copy, **changes)
    with pytest.raises(ValueError, match=message):
        AnchorCache.open(cache_copy)


@pytest.mark.parametrize("name", ["../../outside", "/outside", "a/b/c", "..", "a..b", ".hidden", "x\ny"])
def test_a_cache_makes_no_folder_of_a_dataset_outside_of_lerobots(cache_copy, name):
    [source] = content_of(cache_copy)["sources"]
    reseal(cache_copy, sources=[source | {"repo_id": name, "root": None}])
    with pytest.raises(ValueError, match="which is no name on the hub"):
        AnchorCache.open(cache_copy)


def test_more_shards_than_can_be_mapped_are_refused_before_any_is_looked_for(cache_copy, monkeypatch):
    monkeypatch.setattr("craft_opt.bridge.anchor_manifest.MAX_SHARDS", 99)
    shard = content_of(cache_copy)["shards"][0]
    shards = [shard | {"file": f"s{k}", "samples": 1} for k in range(100)]
    reseal(cache_copy, shards=shards, samples=100)
    with pytest.raises(ValueError, match="it names 100 files, and 99 can be mapped"):
        AnchorCache.open(cache_copy)


def test_a_file_with_holes_is_not_summed_up(cache_copy):
    file = cache_copy / "shard-00000.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(2**42)  # four TiB that take no room
    reseal(cache_copy, shards=with_first_shard(cache_copy, bytes=2**42))
    with pytest.raises(ValueError, match=r"has 4398046511104 bytes, and its anchors take \d+"):
        AnchorCache.open(cache_copy)


def test_a_command_in_an_error_has_no_strangers_words(cache_copy):
    file = cache_copy / "manifest.json"
    evil = {"version": 9, "teacher": "$(touch x)", "sources": [{"repo_id": "x; rm -rf ~"}], "samples": "`id`"}
    file.write_text(json.dumps(json.loads(file.read_text()) | evil))
    with pytest.raises(ValueError, match="has format version 9") as refused:
        AnchorCache.open(cache_copy)
    assert "--policy.path=<teacher> --dataset.repo_id=<old skills> --num-samples=<n>" in str(refused.value)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sources": 5}))
    with pytest.raises(ValueError, match="has format version 9"):
        AnchorCache.open(cache_copy)


def test_what_inspect_prints_steers_no_terminal(cache_copy):
    first, second = content_of(cache_copy)["tasks"]
    reseal(cache_copy, tasks=[f"{first}\x1b[2J\x07", second], teacher="a\x1b]0;title\x07")
    text = "".join(inspect_cache(cache_copy))
    assert text.isprintable() and "\\x1b[2J" in text
