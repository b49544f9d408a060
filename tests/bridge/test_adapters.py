"""LoRA on the policy: only the adapters train, and the base under them is the teacher."""

import json
import shutil

import pytest
import torch
from lerobot.configs.default import PeftConfig
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from safetensors.torch import load_file, save_file

from craft_opt import CraftConfig
from craft_opt.bridge.adapters import (
    OnTheFlyTeacher,
    adapters_off,
    teacher_features,
)
from craft_opt.bridge.anchor_cache import AnchorCache
from craft_opt.bridge.anchors import build_cache
from craft_opt.bridge.config import resume_config
from craft_opt.bridge.features import FeatureSpec, hidden_features
from craft_opt.bridge.fingerprints import teacher_fingerprint
from craft_opt.bridge.loop import prepare, run_steps, train
from craft_opt.bridge.policies import has_adapters, load_policy, make_processors, merged_fingerprint, read_policy_config
from craft_opt.bridge.quickstart.modeling_pi0_fast_tiny import PI0FastTinyPolicy
from craft_opt.bridge.retention_term import HiddenRetention
from tests.support.asserts import assert_same_bits

TARGETS = r".*language_model.*\.(q_proj|v_proj|down_proj)"


def lora(**settings):
    return PeftConfig(**({"target_modules": TARGETS, "r": 4, "lora_alpha": 8} | settings))


def config(world, output_dir, **settings):
    """A learning rate at which ten steps of an adapter that starts at zero move the features."""
    craft = {"retention_freq": 1, "initial_lambda": 10.0, "lambda_lr": 0.0} | settings.pop("craft", {})
    cfg = world.config(output_dir, craft=craft, **({"steps": 10, "peft": lora()} | settings))
    cfg._arguments.append("--policy.optimizer_lr=0.01")
    return cfg


def load(folder):
    return read_policy_config(folder, ("--device=cpu",))


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A LoRA run of ten steps: its checkpoint's policy folder."""
    output = tmp_path_factory.mktemp("lora") / "out"
    checkpoint = train(config(world, output, save_checkpoint=True, save_freq=5), progress=False).checkpoint
    return checkpoint / "pretrained_model"


@pytest.fixture(scope="module")
def meta(world):
    return LeRobotDatasetMetadata("local/tiny", root=world.old)


# -- what trains -----------------------------------------------------------------------------------------------------


def test_only_adapters_have_gradients_and_optimizer_state(world, tmp_path):
    run = prepare(config(world, tmp_path / "out", steps=3))
    policy, optimizer = run.parts.policy, run.parts.optimizer
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    run_steps(run, progress=False)
    adapters = {name for name, p in policy.named_parameters() if "lora_" in name}
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == adapters
    assert len([p for p in optimizer.state if optimizer.state[p]]) == len(adapters)
    changed = {name for name, tensor in policy.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == adapters
    assert not any(p.grad is not None for name, p in policy.named_parameters() if name not in adapters)


def test_with_the_adapters_off_the_features_are_the_bases_bit_for_bit(world, meta, trained):
    base, adapted = load_policy(load(world.teacher), meta), load_policy(load(trained), meta)
    assert has_adapters(adapted)
    assert not has_adapters(base)
    batch = processed_anchors(world, adapted)
    for pooling in ("action_tokens", "mean_image_tokens", "none"):
        spec = FeatureSpec((1, 2), pooling)
        expected = hidden_features(base.eval(), batch, spec)
        off, on = teacher_features(adapted.eval(), batch, spec), hidden_features(adapted, batch, spec)
        for layer, value in expected.by_layer.items():
            assert_same_bits(off.by_layer[layer], value.detach(), f"{pooling} {layer}")
            assert not torch.equal(on.by_layer[layer], value), "and with them on they are not"
            assert not off.by_layer[layer].requires_grad


def processed_anchors(world, policy):
    processor, _ = make_processors(load(world.teacher), stats=None)
    term = HiddenRetention(AnchorCache.open(world.cache), processor, CraftConfig(), 0)
    return term._batch(policy, term.cache.gather([0, 1, 2, 3]))


def test_a_base_that_trains_too_is_no_teacher(world, tmp_path, meta):
    run = prepare(config(world, tmp_path / "out", steps=1))
    policy = run.parts.policy
    next(p for n, p in policy.named_parameters() if n.endswith("lm_head.weight")).requires_grad_(True)
    message = r"1 weights of the base are trained beside the adapters \(.*lm_head.weight\)"
    with pytest.raises(ValueError, match=message), adapters_off(policy):
        pass
    with pytest.raises(ValueError, match="the policy has no adapters, so there is no teacher in it"):
        teacher_features(load_policy(load(world.teacher), meta), {}, FeatureSpec((1,), "none"))


# -- retention -------------------------------------------------------------------------------------------------------


def drift_of(run):
    return run.term.drift(run.parts.policy)


def test_an_adapter_run_with_retention_drifts_less_than_without(world, tmp_path):
    """Twenty steps; the cached teacher and the one on the fly."""
    held = prepare(config(world, tmp_path / "held", steps=20))
    run_steps(held, progress=False)
    free = prepare(config(world, tmp_path / "free", steps=20, craft=FREE))
    run_steps(free, progress=False)
    flying = prepare(config(world, tmp_path / "flying", steps=20, craft={"teacher": "adapters_off"}))
    run_steps(flying, progress=False)
    naive = drift_of(free)
    assert naive > 1e-3
    assert drift_of(held) < 0.5 * naive
    assert drift_of(flying) < 0.5 * naive


# L_ret is measured and has no say: the naive run.
FREE = {"initial_lambda": 0.0, "use_grad_projection": False}


def test_the_teacher_on_the_fly_is_the_cached_teacher(world, tmp_path):
    """The same anchors, the same losses; the variance is of the first 64 anchors, here all of them."""
    runs = {}
    for name, teacher in (("cached", "cache"), ("flying", "adapters_off")):
        seen = []
        run = prepare(config(world, tmp_path / name, craft={"teacher": teacher}))
        run_steps(run, on_step=seen.append, progress=False)
        runs[name] = [record.retention_loss for record in seen]
    # The start differs: on the fly it is 0 to the last bit, cached it is the rounding of another batch size.
    assert runs["flying"][0] == 0.0
    assert runs["cached"][0] < 1e-10
    assert runs["flying"][1:] == pytest.approx(runs["cached"][1:], rel=1e-3)


def test_the_teacher_on_the_fly_serves_layers_that_the_cache_has_not(world, tmp_path):
    chosen = {"anchor_layers": [1], "anchor_pooling": "mean_image_tokens", "craft": {"teacher": "adapters_off"}}
    run = prepare(config(world, tmp_path / "out", **chosen))
    assert [term.spec for term in run.term.terms] == [FeatureSpec((1,), "mean_image_tokens")]
    seen = []
    run_steps(run, on_step=seen.append, progress=False)
    assert seen[0].retention_loss == 0.0
    assert seen[-1].retention_loss > 1e-8


@pytest.mark.parametrize("settings", [{"kind": "token_ce"}, {"storage": "reference"}], ids=["tokens", "by reference"])
def test_the_teacher_on_the_fly_needs_samples_only(world, tmp_path, settings):
    """A cache of tokens holds no features, one by reference no images: both know the samples."""
    cache = tmp_path / "cache"
    given = {"num_samples": 8, "batch_size": 4, "policy_overrides": ["--device=cpu"], "progress": False}
    build_cache(cache, world.teacher, [world.source()], **given, **settings)
    craft = {"teacher": "adapters_off", "anchor_cache_dir": str(cache), "anchor_batch_size": 4}
    run = prepare(config(world, tmp_path / "out", steps=4, craft=craft))
    (term,), policy = run.term.terms, run.parts.policy
    assert isinstance(term, OnTheFlyTeacher)
    assert term.loss(policy, 4).item() == 0.0
    assert term.spec == FeatureSpec((1, 2), "action_tokens")
    run_steps(run, progress=False)
    assert term.loss(policy, 4).item() > 1e-6
    assert term.mean_loss(policy) == pytest.approx(term.drift(policy), rel=1e-6), "the run's loss is nmse"


def test_a_policy_without_adapters_has_no_teacher_within(world, tmp_path):
    with pytest.raises(ValueError, match=r"no adapters.*--peft\.method_type=LORA"):
        prepare(config(world, tmp_path / "out", peft=None, craft={"teacher": "adapters_off"}))


# -- saved and loaded ------------------------------------------------------------------------------------------------


def test_resumed_is_uninterrupted(world, trained):
    output = trained.parents[2]
    whole = {file.name: load_file(file) for file in trained.glob("adapter_model.safetensors")}
    lines = (output / "metrics.jsonl").read_text().splitlines()
    copy = output.parent / "resumed"
    shutil.copytree(output, copy, symlinks=True)
    cfg = resume_config(copy / "checkpoints" / "000005")
    cfg.output_dir = copy
    resumed = train(cfg, progress=False).checkpoint / "pretrained_model"
    found = load_file(resumed / "adapter_model.safetensors")
    for name, tensor in whole["adapter_model.safetensors"].items():
        assert_same_bits(found[name], tensor, name)
    kept = (copy / "metrics.jsonl").read_text().splitlines()
    values = [[json.loads(line).get("retention_loss") for line in these] for these in (kept, lines)]
    assert values[0] == values[1]


def adapter_copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "adapter")


def edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_an_adapter_with_a_weight_missing_is_refused(trained, meta, tmp_path):
    """PEFT warns, and leaves the adapter as it was initialised."""
    folder = adapter_copy(trained, tmp_path)
    load_policy(load(folder), meta)
    edit(folder / "adapter_model.safetensors", lambda tensors: tensors.pop(min(tensors)))
    message = r"did not load every weight: of \d+ tensors 1 are missing and 0 differ"
    with pytest.warns(UserWarning, match="missing adapter keys"), pytest.raises(ValueError, match=message):
        load_policy(load(folder), meta)


def test_an_adapter_whose_base_is_gone_is_refused(world, trained, meta, tmp_path):
    folder = adapter_copy(trained, tmp_path)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "moved")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(FileNotFoundError, match=r"was trained on .*moved, which is not there"):
        load_policy(load(folder), meta)


def test_a_base_that_was_not_loaded_whole_is_refused_under_an_adapter(world, trained, meta, tmp_path, monkeypatch):
    """pi0_fast's own from_pretrained prints a line where a weight is missing."""
    monkeypatch.setattr(PI0FastTinyPolicy, "from_pretrained", classmethod(PI0FastPolicy.from_pretrained.__func__))
    base, folder = shutil.copytree(world.teacher, tmp_path / "base"), adapter_copy(trained, tmp_path)
    settings = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert load_policy(load(folder), meta) is not None
    edit(base / "model.safetensors", lambda tensors: tensors.pop(next(n for n in tensors if "layers.1.mlp" in n)))
    with pytest.raises(ValueError, match=r"base/model.safetensors did not load every weight: of \d+ tensors 1 are"):
        load_policy(load(folder), meta)


def test_a_cache_can_be_built_from_an_adapter_and_only_it_fits(world, trained, tmp_path):
    """An adapter checkpoint is a teacher of its own; its merged form has other bits and is told apart by name."""
    build_cache(
        tmp_path / "cache",
        trained,
        [world.source()],
        num_samples=8,
        batch_size=4,
        policy_overrides=["--device=cpu"],
        progress=False,
    )
    run = prepare(start_at(world, trained, tmp_path / "out", tmp_path / "cache"))
    assert drift_of(run) < 1e-10
    with pytest.raises(ValueError, match="was made by teacher"):
        prepare(start_at(world, world.teacher, tmp_path / "other", tmp_path / "cache"))


def start_at(world, policy, output_dir, cache):
    cfg = world.config(output_dir, cache=cache)
    cfg._arguments = [flag.replace(str(world.teacher), str(policy)) for flag in cfg._arguments]
    return cfg


def test_adapters_on_a_cache_of_the_merged_model_are_told_so(world, trained, meta, tmp_path):
    merged = load_policy(load(trained), meta).merge_and_unload()
    merged.config.use_peft = False
    merged.config.pretrained_path = None
    folder = shutil.copytree(world.teacher, tmp_path / "merged")
    merged.save_pretrained(folder)
    assert merged_fingerprint(load_policy(load(trained), meta)) == teacher_fingerprint(load_policy(load(folder), meta))
    build_cache(
        tmp_path / "cache",
        folder,
        [world.source()],
        num_samples=8,
        batch_size=4,
        policy_overrides=["--device=cpu"],
        progress=False,
    )
    message = r"made by this policy with its adapters merged.*--policy.path=.*merged"
    with pytest.raises(ValueError, match=message):
        prepare(start_at(world, trained, tmp_path / "out", tmp_path / "cache"))
