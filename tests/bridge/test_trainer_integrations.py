"""CRaFT beside what trainers do: transformers' Trainer, autocast, accumulation, torch.compile; the page about them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from craft_opt import CraftConfig, CraftOptimizer
from craft_opt.bridge import lerobot_train
from craft_opt.bridge.anchors import build_cache
from craft_opt.bridge.loop import prepare, run_steps
from craft_opt.bridge.loop import train as train_explicitly
from tests.support.asserts import assert_same_bits

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(autouse=True)
def accelerate_starts_afresh():
    """Accelerate keeps the first run's precision for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# -- the page --------------------------------------------------------------------------------------------------------


def test_the_page_has_its_snippets():
    assert len(SNIPPETS) == 2


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["loop", "trainer"])
def test_the_pages_python_runs(snippet):
    exec(compile(snippet, str(PAGE), "exec"), {"__name__": "page"})


# -- transformers' Trainer -------------------------------------------------------------------------------------------

CONFIG = CraftConfig(retention_freq=2, lambda_lr=0.5, epsilon_start=0.0, epsilon_end=0.0)
STEPS = 6


class Case:
    """A tiny language model with an optimizer, and its own answers to some old inputs."""

    def __init__(self):
        torch.manual_seed(0)
        sizes = GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2)
        sizes.resid_pdrop = sizes.embd_pdrop = sizes.attn_pdrop = 0.0
        self.model = GPT2LMHeadModel(sizes)
        self.old = torch.randint(0, 16, (8, 8))
        with torch.no_grad():
            self.taught = self.model.transformer(self.old).last_hidden_state.clone()
        rows = torch.randint(16, 32, (16, 8))
        # The Trainer counts all labels, the model's loss all but the first: marked as ignored, both count the same.
        labels = rows.index_fill(1, torch.tensor([0]), -100)
        self.data = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
        self.optimizer = CraftOptimizer(
            self.model.parameters(), lr=1e-2, max_grad_norm=0.5, config=CONFIG, total_steps=STEPS
        )
        self.seen = []

    def adapt(self):
        """Freeze the model and train LoRA adapters in it."""
        torch.manual_seed(1)
        self.model = get_peft_model(self.model, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
        trained = [value for value in self.model.parameters() if value.requires_grad]
        self.optimizer = CraftOptimizer(trained, lr=1e-2, max_grad_norm=0.5, config=CONFIG, total_steps=STEPS)

    def retention_loss(self):
        features = self.model.transformer(self.old).last_hidden_state
        return (features - self.taught).square().mean() / self.taught.var()

    def collate(self, rows):
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        self.seen.append(batch)
        return batch

    def trainer(self, output, **settings):
        given = {"max_steps": STEPS, "max_grad_norm": 0, "per_device_train_batch_size": 4, "save_strategy": "no"}
        arguments = TrainingArguments(str(output), report_to=[], use_cpu=True, disable_tqdm=True, **(given | settings))
        scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        self.optimizer.attach_retention(self.retention_loss)
        return Trainer(
            self.model,
            arguments,
            train_dataset=self.data,
            data_collator=self.collate,
            optimizers=(self.optimizer, scheduler),
        )


def assert_same_training(case, other):
    for (name, found), expected in zip(case.model.named_parameters(), other.model.parameters(), strict=True):
        assert_same_bits(found.detach(), expected.detach(), name)
    assert_same_bits(case.optimizer.metrics().lam_after, other.optimizer.metrics().lam_after, "λ")


def train_explicitly_on(case, batches, micro_batches=1):
    """A bare loop."""
    batches = iter(batches)
    case.model.train()
    for _ in range(STEPS):
        if case.optimizer.retention_due:
            loss = case.retention_loss()
            with case.optimizer.retention(loss):
                loss.backward()
        for _ in range(micro_batches):
            # The Trainer divides by the tokens of all micro-batches, here as many in each.
            (case.model(**next(batches)).loss / micro_batches).backward()
        case.optimizer.step()
        case.optimizer.zero_grad()


COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}
# Dynamo's own, where the Trainer's loss breaks the graph.
DYNAMO_LOOKS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.mark.parametrize(
    ("settings", "adapters"),
    [
        ({}, False),
        ({"gradient_accumulation_steps": 2}, False),
        pytest.param(COMPILED, False, marks=DYNAMO_LOOKS),
        ({}, True),
    ],
    ids=["", "accumulated", "compiled", "LoRA"],
)
def test_the_trainer_is_the_explicit_loop_over_its_batches(tmp_path, settings, adapters):
    micro_batches = settings.get("gradient_accumulation_steps", 1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    case, explicit = Case(), Case()
    frozen = [name for name, _ in case.model.named_parameters()] if adapters else []
    if adapters:
        case.adapt()
        explicit.adapt()
    case.trainer(tmp_path, **settings).train()
    assert len(case.seen) >= STEPS * micro_batches
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) is ("torch_compile" in settings)
    train_explicitly_on(explicit, case.seen, micro_batches)
    if adapters:
        trained = {name: value for name, value in case.model.named_parameters() if value.requires_grad}
        assert trained
        assert all("lora_" in name for name in trained)
        assert all(value.count_nonzero() for value in trained.values()), "B starts at 0, and every one was trained"
        fresh = Case().model.state_dict()
        base = case.model.get_base_model().state_dict()
        for name in frozen:
            assert_same_bits(base[name.replace("c_attn.", "c_attn.base_layer.")], fresh[name], name)
    for found, expected in zip(case.model.parameters(), explicit.model.parameters(), strict=True):
        # Sum over tokens divided once, or a mean of means: fp32 rounding of the gradient, six updates of 1e-2.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    lam = explicit.optimizer.metrics().lam_after.item()
    assert case.optimizer.metrics().lam_after.item() == pytest.approx(lam, rel=1e-4)
    assert lam > 1.0


def test_the_trainer_resumes_with_its_own_checkpoints(tmp_path):
    whole = Case()
    whole.trainer(tmp_path / "whole", save_strategy="steps", save_steps=3).train()
    resumed = Case()
    resumed.trainer(tmp_path / "resumed").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_training(resumed, whole)


def test_the_trainer_retains_the_same_with_gradient_checkpointing(tmp_path):
    case, plain = Case(), Case()
    plain.trainer(tmp_path / "plain").train()
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    case.trainer(tmp_path / "other", **checkpointing).train()
    assert case.model.is_gradient_checkpointing
    for found, expected in zip(case.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    lam = plain.optimizer.metrics().lam_after.item()
    assert case.optimizer.metrics().lam_after.item() == pytest.approx(lam, rel=1e-4)
    assert lam > 1.0


@pytest.mark.parametrize("change", ["gradient checkpointing", "compiled"])
def test_a_bare_loop_retains_the_same_with(change):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    case, plain = Case(), Case()
    if change == "compiled":
        case.model.transformer.compile(backend="eager")  # task and anchors
    else:
        case.model.gradient_checkpointing_enable({"use_reentrant": False})
        case.model.train()
        assert case.model.is_gradient_checkpointing
    rows = [case.collate(case.data[start : start + 4]) for start in (0, 4, 8, 12, 0, 4)]
    train_explicitly_on(case, rows)
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) is (change == "compiled")
    train_explicitly_on(plain, rows)
    for found, expected in zip(case.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    lam = plain.optimizer.metrics().lam_after.item()
    assert case.optimizer.metrics().lam_after.item() == pytest.approx(lam, rel=1e-4)
    assert lam > 1.0


# -- precision -------------------------------------------------------------------------------------------------------


def test_autocast_in_a_bare_loop_stays_near_fp32():
    """fp32 weights, forwards in bf16, both gradients fp32."""
    results = []
    for enabled in (False, True):
        case = Case()
        losses = []
        for start in range(0, 16, 4):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                retention_loss = case.retention_loss()
            with case.optimizer.retention(retention_loss):
                retention_loss.backward()
            rows = torch.stack([row["input_ids"] for row in case.data[start : start + 4]])
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = case.model(input_ids=rows, labels=rows).loss
            loss.backward()
            case.optimizer.step()
            case.optimizer.zero_grad()
            losses.append(loss.item())
        assert not case.optimizer.metrics().skipped
        results.append(losses)
    # bf16 has 8 bits: 2^-8 a product, averaged over thousands of them.
    assert results[1] == pytest.approx(results[0], rel=2**-7)
    assert results[1] != results[0]


def test_bf16_in_lerobots_loop_is_bf16_in_ours(world, tmp_path):
    """There accelerate's autocast around the policy's forward, here ours; and both near fp32."""
    overrides = ["--device=cpu", "--dtype=bfloat16"]
    settings = {"num_samples": 8, "batch_size": 4, "policy_overrides": overrides, "progress": False}
    build_cache(tmp_path / "cache", world.teacher, [world.source()], **settings)

    def seen_by(train, name, *, cache=None, dtype="bfloat16"):
        cfg = world.config(tmp_path / name, cache=cache, craft={"retention_freq": 1}, num_workers=0, seed=1)
        cfg._arguments.append(f"--policy.dtype={dtype}")
        records = []
        train(cfg, on_step=records.append)
        return [(r.loss, r.retention_loss, r.lam, r.grad_norm) for r in records]

    explicit = seen_by(train_explicitly, "explicit", cache=tmp_path / "cache")
    assert seen_by(lerobot_train.train, "attached", cache=tmp_path / "cache") == explicit
    full = seen_by(train_explicitly, "full", dtype="float32")
    assert [step[0] for step in explicit] == pytest.approx([step[0] for step in full], rel=2**-7)


# -- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_policy_trains_as_an_eager_one(world, tmp_path, backend):
    """What pi0_fast's own ``compile_model`` compiles; retention switches the depth of the decoder in between."""
    results = []
    for name in ("eager", "compiled"):
        run = prepare(world.config(tmp_path / name, steps=5, craft={"initial_lambda": 5.0}))
        core = run.parts.policy.model
        if name == "compiled":
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            core.forward = torch.compile(core.forward, backend=backend)
        records = []
        run_steps(run, on_step=records.append, progress=False)
        results.append([(r.loss, r.grad_norm) for r in records])
        retained = [r.retention_loss for r in records if r.retention_loss is not None]
        assert len(retained) == 3
        assert retained[-1] > 1e-6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "it was compiled"
    for found, expected in zip(results[1], results[0], strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # of what Inductor imports
@pytest.mark.parametrize("mode", ["hidden", "token_ce"])
def test_the_flag_compiles_with_inductor_and_trains_as_without(world, tmp_path, mode):
    """``--policy.compile_model=true`` as the command line gives it: PyTorch's own backend, its C++ compiler."""
    cache = world.cache
    if mode == "token_ce":
        cache = tmp_path / "tokens"
        settings = {"kind": mode, "num_samples": 8, "batch_size": 4, "policy_overrides": ["--device=cpu"]}
        build_cache(cache, world.teacher, [world.source()], progress=False, **settings)
    results = []
    for name, flags in (("eager", []), ("compiled", ["--compile_model=true", "--compile_mode=default"])):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        craft = {"initial_lambda": 5.0, "retention_mode": mode}
        records = []
        cfg = world.config(tmp_path / name, cache=cache, steps=5, seed=0, craft=craft, policy_overrides=flags)
        train_explicitly(cfg, on_step=records.append)
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert (compiled > 0) is (name == "compiled"), compiled
        results.append([(r.loss, r.grad_norm, r.retention_loss or 0.0) for r in records])
    assert results[0][2][2] > 1e-6, "it drifts, and that is measured"
    for found, expected in zip(results[1], results[0], strict=True):
        # Fused fp32 sums round otherwise; the retention loss, a small difference, has most of it.
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
