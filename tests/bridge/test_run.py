"""A run: the log's contract, retention where it is due, and refusal of whatever does not belong together."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.configs.default import DatasetConfig
from safetensors.torch import load_file, save_file

from craft_opt import CraftConfig
from craft_opt.bridge import cli
from craft_opt.bridge.anchor_manifest import AnchorManifest, sha256_of_file
from craft_opt.bridge.anchors import AnchorSource, build_cache
from craft_opt.bridge.config import CraftTrainConfig
from craft_opt.bridge.loop import prepare, run_steps, train
from craft_opt.bridge.retention_term import check_drift
from tests.quickstart.support import make_tiny_dataset, tiny_config

NUMBER = r"-?\d[\d.e+-]*"
TASK_PART = rf"loss={NUMBER} \| grdn={NUMBER} \| lr=\d\.\de[-+]\d\d \| updt_s=\d+\.\d{{3}} \| data_s=\d+\.\d{{3}}"
RETENTION_PART = (
    rf" \| L_ret={NUMBER} \| λ=\d+\.\d{{3}} \| ε=(?P<epsilon>\d+\.\d{{3}})(?P<conflict> \| conflict=✓)?"
    rf" \| dot={NUMBER} \| cos={NUMBER}"
)
STEP_LINE = re.compile(
    rf"Step (?P<step>\d+)/(?P<steps>\d+) \| {TASK_PART} \| mode=(?P<mode>\w+)"
    rf"(?P<retention>{RETENTION_PART})?(?P<stale> \| stale=\d+)?"
)


def metrics_of(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


# -- the log ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_from_the_command_line(world, tmp_path, capsys):
    """Banner, step lines, metrics file: what a monitor greps."""
    output = tmp_path / "out"
    settings = ["craft.lambda_lr=0.01", "craft.epsilon_start=1.0", "craft.epsilon_end=0.5"]
    argv = [*world.flags(output), "--retention-mode", "hidden", "--steps=500", "--dry-run", *settings]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out.splitlines()
    banner = [
        f"AnchorCache directory: {world.cache}",
        "AnchorCache batch size: 4",
        "AnchorCache K: 2 (retention at steps 0, K, 2K, ...)",
        "AnchorCache samples: 20",
        "AnchorCache features: action_tokens, layers 1, 2 of 2",
        "CRaFT enabled: True",
        "Retention Mode: hidden",
        "initial λ: 1.0",
        "λ learning rate: 0.01",
        "λ max: 10.0",
        "ε start: 1.0",
        "ε end: 0.5",
        "gradient projection: True",
        "conflict threshold: -0.1",
        "merge mode: weighted",
        f"Normalisation statistics: teacher ({world.teacher})",
    ]
    start = shown.index(banner[0])
    assert shown[start : start + len(banner)] == banner

    lines = [STEP_LINE.fullmatch(line) for line in shown if line.startswith("Step ")]
    assert all(lines), shown
    assert [(m["step"], m["steps"], m["mode"]) for m in lines] == [(str(k), "3", "hidden") for k in (1, 2, 3)]
    assert [bool(m["retention"]) for m in lines] == [True, False, True], "retention at steps 0 and K = 2 only"
    assert [m["epsilon"] for m in lines] == ["1.000", None, "0.667"]
    assert [m["stale"] for m in lines] == [None] * 3

    records = metrics_of(output)
    assert [record["step"] for record in records] == [1, 2, 3]
    common = {"step", "loss", "grad_norm", "lr", "update_s", "data_s", "mode", "skipped", "skipped_steps"}
    common |= {"lambda_before", "lambda", "epsilon"}  # the history of λ has no gaps
    retention = {"retention_loss", "conflict", "dot", "cos"}
    assert [set(record) for record in records] == [common | retention, common, common | retention]
    assert [record["lambda_before"] for record in records[1:]] == [record["lambda"] for record in records[:-1]]
    assert [record["epsilon"] for record in records] == pytest.approx([1.0, 5 / 6, 4 / 6])
    assert not (output / "checkpoints").exists()


def test_values_between_log_lines_reach_the_file_and_are_marked_stale_in_the_log(world, tmp_path, capsys):
    seen = []
    cfg = world.config(tmp_path / "out", steps=7, log_freq=4, craft={"retention_freq": 3})
    summary = train(cfg, on_step=seen.append, progress=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Step ")]
    assert [line.split(" |")[0] for line in lines] == ["Step 4/7"]
    assert STEP_LINE.fullmatch(lines[0])["stale"] is None, "step 4 is step index 3 = K and has its own values"
    assert [record["step"] for record in metrics_of(tmp_path / "out")] == list(range(1, 8))
    assert [record.step for record in seen] == list(range(1, 8))
    assert summary.last == seen[-1]
    stale = STEP_LINE.fullmatch(replace(seen[5], step=6).line(seen[3]))
    assert stale["stale"] == " | stale=2"
    assert stale["retention"] == STEP_LINE.fullmatch(lines[0])["retention"]


def test_conflict_is_marked_only_where_it_projected(world, tmp_path):
    cfg = world.config(tmp_path / "out", craft={"conflict_threshold": 1.0, "retention_freq": 1})
    seen = []
    train(cfg, on_step=seen.append, progress=False)
    # At step 0 the student is the teacher: no retention gradient to conflict with. Then every cosine is below 1.
    assert [record.conflict for record in seen] == [False, True, True]
    assert "conflict" not in seen[0].line()
    assert " | conflict=✓ | " in seen[1].line()


# -- the method in the loop ------------------------------------------------------------------------------------------


def test_the_student_is_the_teacher_before_step_zero(world, tmp_path):
    run = prepare(world.config(tmp_path / "out"))
    # The same batch of fp32 features through the same code: rounding of another batch size at most.
    assert check_drift(run.term, run.parts.policy, run.cfg.policy) < 1e-10
    seen = []
    run_steps(run, on_step=seen.append, progress=False)
    assert seen[0].retention_loss < 1e-10
    assert seen[2].retention_loss > 1e-6, "and no longer after training"


def test_retention_none_is_the_same_loop_without_the_term(world, tmp_path, capsys):
    cfg = world.config(tmp_path / "out", craft={"enabled": False, "anchor_cache_dir": ""})
    seen = []
    train(cfg, on_step=seen.append, progress=False)
    shown = capsys.readouterr().out.splitlines()
    assert "CRaFT enabled: False" in shown
    assert "Retention Mode: none" in shown
    assert all(record.mode == "none" and record.retention_loss is None for record in seen)
    assert all(record.lam is None and record.epsilon is None for record in seen)
    # λ = 0 with the projection off is the same training: L_ret is measured and has no say.
    free = {"initial_lambda": 0.0, "lambda_lr": 0.0, "use_grad_projection": False}
    other = []
    train(world.config(tmp_path / "other", craft=free), on_step=other.append, progress=False)
    assert [r.loss for r in other] == pytest.approx([r.loss for r in seen], rel=1e-6)


def test_retention_holds_the_student_nearer_to_the_teacher(world, tmp_path):
    drifts = {}
    for name, lam in (("without", 0.0), ("with", 10.0)):
        craft = {"initial_lambda": lam, "lambda_lr": 0.0, "retention_freq": 1, "use_grad_projection": False}
        run = prepare(world.config(tmp_path / name, steps=30, log_freq=0, craft=craft))
        run_steps(run, progress=False)
        run.parts.policy.eval()
        drifts[name] = run.term.drift(run.parts.policy)
    assert drifts["with"] < 0.2 * drifts["without"]


def test_a_batch_that_is_not_finite_is_skipped_counted_and_reported(world, tmp_path, capsys):
    run = prepare(world.config(tmp_path / "out", craft={"retention_freq": 1}))
    processed, calls = run.preprocessor, []

    class Poisoned:
        """The preprocessor, with one image full of NaN in the second batch."""

        def __call__(self, batch):
            calls.append(None)
            if len(calls) == 2:
                batch["observation.image"] = torch.full_like(batch["observation.image"], math.nan)
            return processed(batch)

    before = [p.clone() for p in run.parts.policy.parameters()]
    seen = []
    summary = run_steps(replace(run, preprocessor=Poisoned()), on_step=seen.append, progress=False)
    assert [record.skipped for record in seen] == [False, True, False]
    assert seen[1].lam == seen[0].lam
    assert summary.skipped_steps == 1
    assert any(not torch.equal(p, q) for p, q in zip(before, run.parts.policy.parameters(), strict=True))
    assert all(p.isfinite().all() for p in run.parts.policy.parameters())
    shown = capsys.readouterr().out
    assert "Step 2/3 skipped: a loss or gradient was not finite" in shown
    assert "skipped=✓" in shown
    assert metrics_of(tmp_path / "out")[1]["loss"] is None, "JSON has no NaN"


def test_ctrl_c_leaves_the_numbers_of_every_finished_step(world, tmp_path):
    run = prepare(world.config(tmp_path / "out", log_freq=0))
    processed, calls = run.preprocessor, []

    def interrupted(batch):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return processed(batch)

    with pytest.raises(KeyboardInterrupt):
        run_steps(replace(run, preprocessor=interrupted), progress=False)
    assert [record["step"] for record in metrics_of(tmp_path / "out")] == [1, 2]


def test_a_run_goes_on_where_its_steps_in_this_process_ended(world, tmp_path):
    whole, parts = [], []
    run_steps(prepare(world.config(tmp_path / "whole", steps=4)), on_step=whole.append, progress=False)
    run = prepare(world.config(tmp_path / "parts", steps=4))
    run.cfg.steps = 2
    run_steps(run, on_step=parts.append, progress=False)
    run.cfg.steps = 4
    run_steps(replace(run, start=2), on_step=parts.append, progress=False)
    assert [record.loss for record in parts] == [record.loss for record in whole]
    assert [record["step"] for record in metrics_of(tmp_path / "parts")] == [1, 2, 3, 4]


def test_a_policy_from_scratch_trains_with_the_datasets_statistics(world, tmp_path, capsys):
    """How the quickstart makes its teacher."""
    dataset = make_tiny_dataset(tmp_path / "data", episodes=2, frames=6)
    cfg = CraftTrainConfig(
        dataset=DatasetConfig(repo_id="local/tiny", root=str(tmp_path / "data")),
        policy=tiny_config(dataset),
        output_dir=tmp_path / "out",
        steps=2,
        batch_size=4,
        log_freq=1,
        craft=CraftConfig(enabled=False),
    )
    summary = train(cfg, progress=False)
    assert "Normalisation statistics: dataset (local/tiny)" in capsys.readouterr().out
    saved = PreTrainedConfig.from_pretrained(summary.checkpoint / "pretrained_model")
    assert saved.type == "pi0_fast_tiny"


def test_held_out_episodes_are_evaluated_without_touching_the_training(world, tmp_path, capsys):
    plain, evaluated = [], []
    cfg = world.config(tmp_path / "a", eval_steps=2, steps=4)
    cfg.dataset.eval_split = 0.25
    train(cfg, on_step=evaluated.append, progress=False)
    assert len(re.findall(r"^Step \d/4 eval_loss=\d+\.\d{4}$", capsys.readouterr().out, re.MULTILINE)) == 2
    cfg = world.config(tmp_path / "b", steps=4)
    cfg.dataset.eval_split = 0.25
    train(cfg, on_step=plain.append, progress=False)
    assert [record.loss for record in plain] == [record.loss for record in evaluated]


# -- refusals before the first step ----------------------------------------------------------------------------------


def refused(capsys, argv):
    assert cli.main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def replaced(argv, name, value):
    return [f"--{name}={value}" if arg.startswith(f"--{name}=") else arg for arg in argv]


def test_craft_without_a_cache_is_refused(world, tmp_path, capsys):
    argv = [arg for arg in world.flags(tmp_path / "out") if "anchor_cache_dir" not in arg]
    assert "craft.anchor_cache_dir is empty; name a cache with" in refused(capsys, argv)
    argv = replaced(world.flags(tmp_path / "out"), "craft.anchor_cache_dir", tmp_path / "nothing")
    assert "nothing does not exist; build it with: craft-anchors build" in refused(capsys, argv)
    assert not (tmp_path / "out").exists()


def test_a_damaged_cache_is_refused(world, cache_copy, tmp_path, capsys):
    file = cache_copy / "shard-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[1000] ^= 4
    file.write_bytes(content)
    argv = replaced(world.flags(tmp_path / "out"), "craft.anchor_cache_dir", cache_copy)
    assert "shard-00001.safetensors is damaged" in refused(capsys, argv)


def test_fewer_anchors_than_a_batch_are_refused(world, tmp_path, capsys):
    argv = replaced(world.flags(tmp_path / "out"), "craft.anchor_batch_size", 21)
    error = refused(capsys, argv)
    assert "has 20 anchors, and craft.anchor_batch_size is 21; set --craft.anchor_batch_size=20 or less" in error


def test_another_teacher_is_refused(world, tmp_path, capsys):
    other = Path(shutil.copytree(world.teacher, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight"))
    tensors[name] += 1e-6
    save_file(tensors, other / "model.safetensors")
    error = refused(capsys, replaced(world.flags(tmp_path / "out"), "policy.path", other))
    assert "was made by teacher" in error
    assert f"pass --policy.path={world.teacher}" in error


def test_the_teacher_in_another_dtype_is_refused_and_a_cache_of_that_dtype_taken(world, tmp_path, capsys):
    flags = [*world.flags(tmp_path / "out"), "--policy.dtype=bfloat16"]
    assert "pass --policy.dtype=float32, or" in refused(capsys, flags)
    overrides = ["--device=cpu", "--dtype=bfloat16"]
    build_cache(
        tmp_path / "cache", world.teacher, [world.source()], num_samples=8, policy_overrides=overrides, progress=False
    )
    assert cli.main([*replaced(flags, "craft.anchor_cache_dir", tmp_path / "cache"), "--dry-run"]) == 0
    # bf16 rounds at 2^-9: the tolerance of the check before step 0 leaves room for that.
    drift = re.search(r"Drift before step 0: (\S+)", capsys.readouterr().out)
    assert float(drift[1]) < 1e-2


def test_an_adapter_trains_against_the_same_teacher(world, tmp_path):
    """LeRobot's --peft: the adapter starts at zero, so the student is the teacher; only the adapter moves."""
    peft = [
        "--peft.method_type=LORA",
        "--peft.r=4",
        r"--peft.target_modules=.*self_attn\.(q|v)_proj",
        "--steps=4",
        "--save_freq=2",
    ]
    assert cli.main([*world.flags(tmp_path / "out"), *peft]) == 0
    checkpoints = tmp_path / "out" / "checkpoints"
    whole = load_file(checkpoints / "000004/pretrained_model/adapter_model.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in whole.items() if "lora_B" in name)
    shutil.rmtree(checkpoints / "000004")
    config = checkpoints / "000002/pretrained_model/train_config.json"
    assert cli.main(["--resume=true", f"--config_path={config}"]) == 0
    again = load_file(checkpoints / "000004/pretrained_model/adapter_model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_other_layers_or_pooling_than_the_run_demands_are_refused(world, tmp_path, capsys):
    flags = world.flags(tmp_path / "out")
    error = refused(capsys, [*flags, "--anchor_layers=[-1]"])
    assert "holds action_tokens features of layers [1, 2], and this run asks for action_tokens of layers [2]" in error
    error = refused(capsys, [*flags, "--anchor_pooling=last_token"])
    assert "asks for last_token of layers [1, 2]" in error
    assert cli.main([*flags, "--anchor_layers=[-2,-1]", "--anchor_pooling=action_tokens", "--dry-run"]) == 0


def test_layers_of_a_deeper_teacher_are_refused(world, cache_copy, tmp_path, capsys):
    replace(AnchorManifest.read(cache_copy), depth=18).write(cache_copy)
    argv = replaced(world.flags(tmp_path / "out"), "craft.anchor_cache_dir", cache_copy)
    assert "holds layers [1, 2] of a decoder with 18, and this policy has 2" in refused(capsys, argv)


def test_another_preprocessor_is_refused(world, tmp_path, capsys):
    other = Path(shutil.copytree(world.teacher, tmp_path / "other"))
    for file in other.glob("policy_preprocessor*normalizer*.safetensors"):
        tensors = load_file(file)
        tensors["observation.state.max"] += 0.5
        save_file(tensors, file)
    error = refused(capsys, replaced(world.flags(tmp_path / "out"), "policy.path", other))
    assert "was made with preprocessor" in error
    assert "statistics, tokenizers or their settings differ" in error


def test_the_datasets_statistics_need_a_cache_built_with_them(world, tmp_path, capsys):
    flags = [*world.flags(tmp_path / "out"), "--normalization_stats=dataset"]
    assert "was built with the teacher's normalisation statistics, and this run takes the dataset's" in refused(
        capsys, flags
    )
    build_cache(
        tmp_path / "cache",
        world.teacher,
        [world.source()],
        num_samples=8,
        normalization_stats="dataset",
        stats_source=AnchorSource("local/tiny", world.new),
        policy_overrides=["--device=cpu"],
        progress=False,
    )
    flags = replaced(flags, "craft.anchor_cache_dir", tmp_path / "cache")
    assert cli.main([*flags, "--dry-run"]) == 0
    assert "Normalisation statistics: dataset (local/tiny)" in capsys.readouterr().out


def test_drift_before_step_zero_is_refused(world, cache_copy, tmp_path, capsys):
    """Features that are not this teacher's, under checksums and fingerprints that fit."""
    manifest = AnchorManifest.read(cache_copy)
    shards = []
    for shard in manifest.shards:
        file = cache_copy / shard.file
        tensors = load_file(file)
        tensors["features/2"] += 0.05
        save_file(tensors, file)
        shards.append(replace(shard, sha256=sha256_of_file(file), bytes=file.stat().st_size))
    replace(manifest, shards=shards).write(cache_copy)
    argv = replaced(world.flags(tmp_path / "out"), "craft.anchor_cache_dir", cache_copy)
    error = refused(capsys, argv)
    assert "before step 0 the policy's features are" in error
    assert "cache and policy do not belong together" in error


def test_a_policy_path_without_weights_is_refused(world, tmp_path, capsys):
    other = Path(shutil.copytree(world.teacher, tmp_path / "other"))
    (other / "model.safetensors").unlink()
    error = refused(capsys, replaced(world.flags(tmp_path / "out"), "policy.path", other))
    assert "holds no model.safetensors, so no weight would be loaded" in error


def test_a_policy_path_that_is_not_there_is_refused(world, tmp_path, capsys):
    error = refused(capsys, replaced(world.flags(tmp_path / "out"), "policy.path", tmp_path / "nothing"))
    assert "nothing does not exist; give the folder of a saved policy" in error
    error = refused(capsys, replaced(world.flags(tmp_path / "out"), "policy.path", "nobody/nothing"))
    assert "--policy.path=nobody/nothing is no local folder and could not be fetched from the hub" in error


def test_a_dataset_that_is_not_there_is_refused(world, tmp_path, capsys):
    argv = replaced(world.flags(tmp_path / "out"), "dataset.root", tmp_path / "nothing")
    error = refused(capsys, argv)
    assert f"dataset local/tiny is not in {tmp_path / 'nothing'} and could not be fetched from the hub" in error


def test_a_dataset_without_the_policys_cameras_is_refused(world, tmp_path, capsys):
    make_tiny_dataset(tmp_path / "data", cameras=("observation.top",), episodes=1, frames=5)
    argv = replaced(world.flags(tmp_path / "out"), "dataset.root", tmp_path / "data")
    assert "has observation.top, and the policy needs observation.image" in refused(capsys, argv)
    rename = '--rename_map={"observation.top": "observation.image"}'
    assert cli.main([*argv, rename, "--dry-run"]) == 0


def test_an_output_folder_that_exists_is_refused(world, tmp_path, capsys):
    error = refused(capsys, world.flags(tmp_path))
    assert "is there already" in error and f"delete {tmp_path} and give the same command again" in error


def test_retention_needs_a_teacher(world, tmp_path, capsys):
    argv = [arg for arg in world.flags(tmp_path / "out") if "policy.path" not in arg]
    error = refused(capsys, [*argv, "--policy.type=pi0_fast_tiny", '--policy.text_words=["close"]'])
    assert "there is no starting policy to keep the skills of; pass --policy.path=<teacher>" in error


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--steps=0", "steps must be at least 1, got 0"),
        ("--batch_size=0", "batch_size must be at least 1, got 0"),
        ("--normalization_stats=mine", "normalization_stats must be one of teacher, dataset, got 'mine'"),
        ("--job.target=a10g", "--job.target=a10g is not supported"),
        ("--optimizer.type=sgd", "CRaFT's optimizer is AdamW, got --optimizer.type=sgd"),
    ],
)
def test_settings_that_this_trainer_cannot_carry_out_are_refused(world, tmp_path, capsys, flag, message):
    assert message in refused(capsys, replaced([*world.flags(tmp_path / "out"), flag], *flag[2:].split("=")))


def test_optimizer_flags_reach_the_optimizer_over_the_policys_preset(world, tmp_path):
    from craft_opt.bridge.config import parse_config

    extra = ["--optimizer.type=craft_adamw", "--optimizer.weight_decay=0.3", "--optimizer.backend=torch"]
    run = prepare(parse_config([*world.flags(tmp_path / "out"), "--policy.optimizer_lr=0.002", *extra]))
    group = run.parts.optimizer.param_groups[0]
    assert (group["initial_lr"], group["weight_decay"], group["betas"]) == (0.002, 0.3, (0.9, 0.95))
    assert run.parts.optimizer.max_grad_norm == 1.0
    assert run.parts.optimizer.backend == "torch"
