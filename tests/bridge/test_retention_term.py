"""What a run retains: tokens or features, of one cache or several, against an ε that may be measured first."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from craft_opt import CraftConfig
from craft_opt.bridge import cli
from craft_opt.bridge.anchor_manifest import AnchorManifest, sha256_of_file
from craft_opt.bridge.anchors import build_cache
from craft_opt.bridge.checkpoint import CraftState
from craft_opt.bridge.logs import StepRecord, read_steps
from craft_opt.bridge.loop import prepare, run_steps, train
from craft_opt.bridge.retention_term import cache_weights, shares

TOKEN = {"retention_mode": "token_ce"}


def make_cache(world, folder, **settings):
    """A cache of the world's old skills beside its own."""
    defaults = {"num_samples": 12, "batch_size": 4, "policy_overrides": ["--device=cpu"], "progress": False}
    build_cache(folder, world.teacher, [world.source()], **(defaults | settings))
    return folder


@pytest.fixture(scope="module")
def token_cache(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens") / "cache"
    return make_cache(world, folder, kind="token_ce", top_k=4, token_source="teacher")


@pytest.fixture(scope="module")
def hard_cache(world, tmp_path_factory):
    """Tokens without probabilities."""
    return make_cache(
        world, tmp_path_factory.mktemp("hard") / "cache", kind="token_ce", top_k=0, token_source="demonstrated"
    )


@pytest.fixture(scope="module")
def second_cache(world, tmp_path_factory):
    """Features of other samples."""
    return make_cache(world, tmp_path_factory.mktemp("second") / "cache", seed=7)


def recorded(cfg):
    seen = []
    train(cfg, on_step=seen.append, progress=False)
    return seen


def metrics_of(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def refused(capsys, argv):
    assert cli.main(argv) == 2
    return capsys.readouterr().err.splitlines()[-1]


def flags(world, output, cache, *extra):
    """The world's command line with another cache; what is given again replaces what it has."""
    given = [f"--craft.anchor_cache_dir={cache}", *extra]
    names = {arg.split("=")[0] for arg in given}
    return [*(arg for arg in world.flags(output) if arg.split("=")[0] not in names), *given]


def resume(folder, *extra):
    return cli.main(["--resume=true", f"--config_path={folder}/pretrained_model/train_config.json", *extra])


# -- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_a_token_run_from_the_command_line(world, token_cache, tmp_path, capsys, loss):
    output = tmp_path / "out"
    extra = ("--retention-mode=token_ce", f"--craft.token_loss={loss}", "--dry-run")
    assert cli.main(flags(world, output, token_cache, *extra)) == 0
    shown = capsys.readouterr().out.splitlines()
    for line in (
        "AnchorCache tokens: teacher, top 4 probabilities",
        "Retention Mode: token_ce",
        f"token loss: {loss}",
    ):
        assert line in shown
    records = metrics_of(output)
    assert [record["mode"] for record in records] == ["token_ce"] * 3
    assert ["retention_loss" in record for record in records] == [True, False, True]
    # In fp32 and other batches than the cache's: rounding of a log_softmax.
    assert records[0]["retention_loss"] == pytest.approx(0, abs=1e-6)
    assert abs(records[2]["retention_loss"]) > 1e-6, "and no longer after training"


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_retention_of_tokens_holds_the_student_nearer_to_the_teacher(world, token_cache, tmp_path, loss):
    found = {}
    # An untrained teacher is nearly indifferent: the gradient of its tokens is small, so λ is large.
    for name, lam in (("without", 0.0), ("with", 100.0)):
        craft = {"initial_lambda": lam, "lambda_max": 100.0, "lambda_lr": 0.0, "retention_freq": 1}
        craft |= TOKEN | {"token_loss": loss, "use_grad_projection": False}
        run = prepare(world.config(tmp_path / name, cache=token_cache, steps=30, log_freq=0, craft=craft))
        run_steps(run, progress=False)
        found[name] = run.term.mean_loss(run.parts.policy)
    assert found["with"] < 0.3 * found["without"]


def test_a_run_of_one_kind_refuses_the_cache_of_the_other(world, token_cache, tmp_path, capsys):
    error = refused(capsys, flags(world, tmp_path / "out", token_cache, "--retention-mode=hidden"))
    assert "is a 'token_ce' cache, and craft.retention_mode is 'hidden'; pass --retention-mode token_ce" in error
    assert error.endswith("--kind=hidden")
    error = refused(capsys, flags(world, tmp_path / "out", world.cache, "--retention-mode=token_ce"))
    assert "is a 'hidden' cache, and craft.retention_mode is 'token_ce'; pass --retention-mode hidden" in error
    assert error.endswith("--kind=token_ce")
    assert not (tmp_path / "out").exists()


def test_a_kl_needs_probabilities(world, hard_cache, tmp_path, capsys):
    argv = flags(world, tmp_path / "out", hard_cache, "--retention-mode=token_ce", "--dry-run")
    error = refused(capsys, argv)
    assert "without its probabilities (top_k 0), and craft.token_loss=kl needs them" in error
    assert "--craft.token_loss=ce" in error
    assert cli.main([*argv, "--craft.token_loss=ce"]) == 0
    assert "AnchorCache tokens: demonstrated, no probabilities" in capsys.readouterr().out


def test_tokens_have_no_layers(world, token_cache, tmp_path, capsys):
    argv = flags(world, tmp_path / "out", token_cache, "--retention-mode=token_ce")
    for extra in ("--anchor_layers=[-1]", "--anchor_pooling=last_token"):
        assert "holds tokens, which have no layers and no pooling" in refused(capsys, [*argv, extra])


@pytest.mark.parametrize(("kind", "tensor"), [("kl", "top_logprobs"), ("ce", "teacher_ce")])
def test_tokens_that_are_not_this_teachers_are_refused(world, token_cache, hard_cache, tmp_path, capsys, kind, tensor):
    """Under checksums and fingerprints that fit: the check before step 0."""
    cache = Path(shutil.copytree(token_cache if kind == "kl" else hard_cache, tmp_path / "cache"))
    manifest = AnchorManifest.read(cache)
    shards = []
    for shard in manifest.shards:
        tensors = load_file(cache / shard.file)
        # Half of the samples above, half below: for CE their mean is what it was.
        sign = torch.where(torch.arange(len(tensors[tensor])) % 2 == 0, 1.0, -1.0)
        tensors[tensor] += 0.3 * sign.reshape(-1, *[1] * (tensors[tensor].ndim - 1))
        save_file(tensors, cache / shard.file)
        file = cache / shard.file
        shards.append(replace(shard, sha256=sha256_of_file(file), bytes=file.stat().st_size))
    replace(manifest, shards=shards).write(cache)
    extra = ("--retention-mode=token_ce", f"--craft.token_loss={kind}")
    error = refused(capsys, flags(world, tmp_path / "out", cache, *extra))
    assert "before step 0 the policy's tokens are" in error
    assert "cache and policy do not belong together" in error


# -- several caches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5], [2 / 3, 1 / 3], [0.98, 0.01, 0.01], [0.2] * 5, [0.7, 0.2, 0.1]])
@pytest.mark.parametrize("batch", [5, 6, 7, 16, 101])
def test_a_batch_is_shared_out_in_proportion(batch, weights):
    counts = shares(batch, weights)
    assert sum(counts) == batch
    assert min(counts) >= 1
    # Largest remainders are within one of the exact share; only those lifted to one move the largest further.
    lifted = sum(batch * weight < 1 for weight in weights)
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - batch * weight) <= 1 + lifted


def test_weights_are_normalised_and_checked():
    def weights(text):
        return cache_weights(CraftConfig(anchor_cache_dir="a, b,c", anchor_cache_weights=text))

    assert weights("") == pytest.approx([1 / 3] * 3)
    assert weights("2, 1,1") == pytest.approx([0.5, 0.25, 0.25])
    for bad in ("1,2", "1,2,3,4", "1,2,x", "1,0,1", "1,-2,3", "1,2,inf", "1,,2"):
        with pytest.raises(ValueError, match=r"must be 3 positive numbers .*, got "):
            weights(bad)


def test_l_ret_is_the_weighted_mean_over_the_caches(world, second_cache, tmp_path):
    craft = {"anchor_cache_dir": f"{world.cache}, {second_cache}", "anchor_cache_weights": "3,1", "retention_freq": 1}
    run = prepare(world.config(tmp_path / "out", craft=craft, steps=2))
    assert run.term.counts == [3, 1]
    run_steps(run, progress=False)
    assert run.term.positions == (6, 2), "three anchors of one and one of the other, twice"
    run.parts.policy.eval()
    parts = [term.mean_loss(run.parts.policy) for term in run.term.terms]
    assert parts[0] != parts[1]
    assert run.term.mean_loss(run.parts.policy) == pytest.approx(0.75 * parts[0] + 0.25 * parts[1])
    before = run.term.positions
    loss = run.term.loss(run.parts.policy).item()
    run.term.positions = before
    single = [t.loss(run.parts.policy, n).item() for t, n in zip(run.term.terms, run.term.counts, strict=True)]
    assert loss == pytest.approx(0.75 * single[0] + 0.25 * single[1], rel=1e-6)


def test_several_caches_are_checked_one_by_one(world, second_cache, token_cache, tmp_path, capsys):
    def error(caches, *extra):
        return refused(capsys, flags(world, tmp_path / "out", ",".join(map(str, caches)), *extra))

    both = [world.cache, second_cache]
    assert "craft.anchor_cache_weights must be 2 positive numbers" in error(both, "--craft.anchor_cache_weights=1")
    assert f"{token_cache} is a 'token_ce' cache" in error([world.cache, token_cache])
    assert "nothing does not exist; build it with" in error([world.cache, tmp_path / "nothing"])
    assert "names one cache twice" in error([world.cache, world.cache])
    found = error([*both, tmp_path / "third"], "--craft.anchor_batch_size=2")
    assert "craft.anchor_batch_size is 2, and there are 3 anchor caches" in found
    found = error(both, "--craft.anchor_batch_size=30")
    assert "has 12 anchors, and craft.anchor_batch_size is 30, of which 15 come from this one of 2 caches" in found
    assert "set --craft.anchor_batch_size=24 or less" in found


def test_a_run_with_two_caches_resumes_to_the_same_bits(world, second_cache, tmp_path, capsys):
    output = tmp_path / "out"
    caches = f"{world.cache},{second_cache}"
    extra = ("--craft.anchor_cache_weights=2,1", "--steps=4", "--save_freq=2")
    assert cli.main(flags(world, output, caches, *extra)) == 0
    shown = capsys.readouterr().out
    assert "AnchorCache weight: 0.667 (3 anchors of every batch)" in shown
    assert "AnchorCache weight: 0.333 (1 anchors of every batch)" in shown
    checkpoints = output / "checkpoints"
    whole = load_file(checkpoints / "000004/pretrained_model/model.safetensors")
    state = CraftState.read(checkpoints / "000002/training_state/craft_state.safetensors")
    assert (state.anchor_positions, len(state.cache_digests)) == ((3, 1), 2)
    shutil.rmtree(checkpoints / "000004")
    assert resume(checkpoints / "000002", f"--craft.anchor_cache_dir={second_cache},{world.cache}") == 2
    assert "resume with the same cache" in capsys.readouterr().err
    assert resume(checkpoints / "000002") == 0
    again = load_file(checkpoints / "000004/pretrained_model/model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_a_checkpoint_of_before_there_were_several_caches_is_read(tmp_path):
    file = tmp_path / "craft_state.safetensors"
    tensors = {
        "lam": torch.tensor(0.5, dtype=torch.float64),
        "t": torch.tensor(4),
        "skipped": torch.tensor(1),
        "anchor_position": torch.tensor(8),
    }
    metadata = {"format": "craft-state-1", "cache_digest": "abc", "normalization_stats": "teacher"}
    save_file(tensors, file, metadata=metadata)
    assert CraftState.read(file) == CraftState(0.5, 4, 1, (8,), ("abc",), "teacher")
    save_file(tensors, file, metadata=metadata | {"cache_digest": ""})
    assert CraftState.read(file) == CraftState(0.5, 4, 1, (), (), "teacher")
    save_file(tensors, file, metadata=metadata | {"format": "craft-state-3"})
    with pytest.raises(ValueError, match="has format 'craft-state-3', and this program reads craft-state-2"):
        CraftState.read(file)


# -- ε that is measured ----------------------------------------------------------------------------------------------

AUTO = {"epsilon": "auto", "epsilon_auto_steps": 6, "epsilon_auto_fraction": 0.25}


@pytest.mark.parametrize("mode", ["hidden", "token_ce"])
def test_epsilon_comes_from_a_naive_run_that_leaves_no_trace(world, token_cache, tmp_path, capsys, mode):
    cache = world.cache if mode == "hidden" else token_cache

    # Random transforms draw from the global generator: the naive run must give it back as it was.
    def config(name, **craft):
        cfg = world.config(tmp_path / name, cache=cache, steps=6, craft={"retention_mode": mode, **craft})
        cfg.dataset.image_transforms.enable = True
        return cfg

    auto = recorded(config("auto", **AUTO))
    shown = capsys.readouterr().out
    drift = float(re.search(r"ε auto: it drifted by (\S+);", shown)[1])
    naive = prepare(config("naive", initial_lambda=0.0, lambda_lr=0.0, use_grad_projection=False))
    run_steps(naive, progress=False)
    with torch.no_grad():
        assert naive.term.mean_loss(naive.parts.policy) == pytest.approx(drift, rel=1e-3)
    end = float(re.search(r"ε end: (\S+)", shown)[1])
    assert end == pytest.approx(0.25 * drift, rel=1e-3)
    assert f"ε start: {2 * end}" in shown
    assert auto[0].epsilon == pytest.approx(2 * end)

    given = recorded(config("given", epsilon_start=2 * end, epsilon_end=end))
    timings = {"update_s": 0.0, "data_s": 0.0}
    assert [replace(r, **timings) for r in auto] == [replace(r, **timings) for r in given], "bit for bit"


def test_a_resumed_run_does_not_measure_epsilon_again(world, tmp_path, capsys):
    output = tmp_path / "out"
    settings = [f"--craft.{name}={value}" for name, value in AUTO.items()]
    assert cli.main([*world.flags(output), "--steps=4", "--save_freq=2", *settings]) == 0
    first = capsys.readouterr().out
    checkpoints = output / "checkpoints"
    whole = load_file(checkpoints / "000004/pretrained_model/model.safetensors")
    before = metrics_of(output)
    shutil.rmtree(checkpoints / "000004")
    assert resume(checkpoints / "000002") == 0
    second = capsys.readouterr().out
    assert "ε auto" in first
    assert "ε auto" not in second
    banner = re.compile(r"ε (?:start|end): \S+")
    assert banner.findall(first) == banner.findall(second)
    again = load_file(checkpoints / "000004/pretrained_model/model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    assert [record["epsilon"] for record in metrics_of(output)] == [record["epsilon"] for record in before]


def test_a_naive_run_that_does_not_drift_is_refused(world, tmp_path):
    still = ["--optimizer_lr=1e-30", "--scheduler_decay_lr=1e-30"]  # below half a unit of every fp32 weight
    cfg = world.config(tmp_path / "out", craft=AUTO, policy_overrides=still)
    with pytest.raises(ValueError, match=r"a naive run of 6 steps drifted by .*pass a larger --craft.epsilon_auto_ste"):
        prepare(cfg)


# -- memory ----------------------------------------------------------------------------------------------------------


def test_two_batches_of_two_are_one_of_four(world, tmp_path):
    whole = recorded(world.config(tmp_path / "whole", steps=4))
    halves = recorded(world.config(tmp_path / "halves", steps=4, batch_size=2, gradient_accumulation_steps=2))
    # Every sample of the tiny dataset has as many tokens: the mean of means is the mean. AdamW's first steps are
    # nearly the sign of the gradient, which enlarges rounding.
    assert [r.loss for r in halves] == pytest.approx([r.loss for r in whole], rel=1e-4)
    assert [r.grad_norm for r in halves] == pytest.approx([r.grad_norm for r in whole], rel=1e-3)
    assert whole[2].retention_loss == pytest.approx(halves[2].retention_loss, rel=1e-2)


def test_accumulation_resumes_to_the_same_bits(world, tmp_path, capsys):
    output = tmp_path / "out"
    argv = [arg for arg in world.flags(output) if "--batch_size" not in arg]
    assert cli.main([*argv, "--steps=4", "--save_freq=2", "--batch_size=5", "--gradient_accumulation_steps=3"]) == 0
    checkpoints = output / "checkpoints"
    whole = load_file(checkpoints / "000004/pretrained_model/model.safetensors")
    shutil.rmtree(checkpoints / "000004")
    assert resume(checkpoints / "000002", "--gradient_accumulation_steps=2") == 2
    assert "was trained with --gradient_accumulation_steps=3, got 2" in capsys.readouterr().err
    assert resume(checkpoints / "000002") == 0
    again = load_file(checkpoints / "000004/pretrained_model/model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("mode", ["hidden", "token_ce"])
def test_gradient_checkpointing_changes_nothing_but_memory(world, token_cache, tmp_path, mode):
    cache = world.cache if mode == "hidden" else token_cache
    runs = {}
    for name, on in (("plain", False), ("checkpointed", True)):
        craft = {"retention_mode": mode, "retention_freq": 1}
        overrides = [f"--gradient_checkpointing={str(on).lower()}"]
        run = prepare(world.config(tmp_path / name, cache=cache, steps=4, craft=craft, policy_overrides=overrides))
        assert run.parts.policy.model.gradient_checkpointing_enabled == on
        saved = count_saved(run)
        seen = []
        run_steps(run, on_step=seen.append, progress=False)
        runs[name] = seen, saved
    # The same sums in the same order.
    assert [r.loss for r in runs["plain"][0]] == [r.loss for r in runs["checkpointed"][0]]
    assert [r.retention_loss for r in runs["plain"][0]] == [r.retention_loss for r in runs["checkpointed"][0]]
    assert runs["checkpointed"][1] < 0.7 * runs["plain"][1], "activations of the retention forward"


def count_saved(run):
    """Bytes that the retention forward keeps for its backward."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    positions = run.term.positions
    run.parts.policy.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run.term.loss(run.parts.policy)
    run.term.positions = positions
    return sum(sizes)


# -- between the measuring steps -------------------------------------------------------------------------------------


def test_a_step_that_reuses_a_gradient_is_told_as_such():
    base = {"loss": 1.0, "grad_norm": 2.0, "lr": 1e-3, "update_s": 0.1, "data_s": 0.0, "mode": "hidden"}
    base |= {"steps": 9, "skipped": False, "skipped_steps": 0, "lam_before": 1.0, "lam": 1.0, "epsilon": 0.5}
    measured = StepRecord(step=3, retention_loss=0.7, conflict=False, dot=0.2, cos=0.1, **base)
    reused = StepRecord(step=5, conflict=True, dot=-0.2, cos=-0.3, reused=True, **base)
    assert reused.line(measured).endswith(
        "| mode=hidden | L_ret=0.700 | λ=1.000 | ε=0.500 | conflict=✓ | dot=-0.200 | cos=-0.300 | reused=✓ | stale=2"
    )
    assert reused.line().endswith("| mode=hidden | conflict=✓ | dot=-0.200 | cos=-0.300 | reused=✓")
    values = reused.as_dict()
    assert values["reused"] is True
    assert values["cos"] == -0.3
    assert values["lambda_before"] == values["lambda"] == 1.0
    assert "retention_loss" not in values
    assert "reused" not in measured.as_dict()
    assert read_steps([], 9, "hidden") == []


def test_reused_gradients_reach_the_metrics(world, tmp_path, capsys):
    craft = {"off_steps": "reuse", "reuse_decay": 0.5, "retention_freq": 3}
    seen = recorded(world.config(tmp_path / "out", steps=6, craft=craft))
    assert "between retention steps: reuse, decay 0.5" in capsys.readouterr().out
    assert [record.reused for record in seen] == [False, True, True, False, True, True]
    assert [record.retention_loss is not None for record in seen] == [True, False, False] * 2
    assert all(record.cos is not None and record.conflict is not None for record in seen)
    assert [seen[k].lam for k in (1, 2)] == [seen[0].lam] * 2, "λ moves only where L_ret was measured"
    assert seen[3].lam != seen[2].lam
    records = metrics_of(tmp_path / "out")
    assert [record.get("reused", False) for record in records] == [record.reused for record in seen]
    skipping = recorded(world.config(tmp_path / "skip", steps=6, craft=craft | {"off_steps": "skip"}))
    assert not any(record.reused for record in skipping)
    assert skipping[5].loss != seen[5].loss


def test_a_run_that_reuses_resumes_to_the_same_bits(world, tmp_path):
    """The checkpoint lies between two measuring steps."""
    output = tmp_path / "out"
    extra = ("--craft.off_steps=reuse", "--craft.retention_freq=3", "--steps=6", "--save_freq=2")
    assert cli.main(flags(world, output, world.cache, *extra)) == 0
    checkpoints, before = output / "checkpoints", metrics_of(output)
    whole = load_file(checkpoints / "000006/pretrained_model/model.safetensors")
    shutil.rmtree(checkpoints / "000006")
    shutil.rmtree(checkpoints / "000004")
    assert resume(checkpoints / "000002") == 0
    assert [record.get("reused", False) for record in metrics_of(output)] == [
        record.get("reused", False) for record in before
    ]
    again = load_file(checkpoints / "000006/pretrained_model/model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


# -- with LeRobot's own settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_tokens_in_bf16_are_within_their_tolerance(world, tmp_path, capsys, loss):
    overrides = ["--device=cpu", "--dtype=bfloat16"]
    cache = make_cache(world, tmp_path / "cache", kind="token_ce", top_k=4, policy_overrides=overrides)
    extra = ("--retention-mode=token_ce", f"--craft.token_loss={loss}", "--policy.dtype=bfloat16", "--dry-run")
    # Another batch size than the cache's, so that rounding differs.
    assert cli.main(flags(world, tmp_path / "out", cache, *extra, "--craft.anchor_batch_size=3")) == 0
    assert float(re.search(r"Drift before step 0: (\S+)", capsys.readouterr().out)[1]) < 1e-2


def test_an_adapter_retains_tokens(world, token_cache, tmp_path):
    peft = ["--peft.method_type=LORA", "--peft.r=4", r"--peft.target_modules=.*self_attn\.(q|v)_proj"]
    extra = ("--retention-mode=token_ce", "--dry-run", *peft, "--policy.gradient_checkpointing=true")
    assert cli.main(flags(world, tmp_path / "out", token_cache, *extra)) == 0
    records = metrics_of(tmp_path / "out")
    assert records[0]["retention_loss"] == pytest.approx(0, abs=1e-6)
    assert records[2]["retention_loss"] > 0
