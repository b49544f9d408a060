"""Every method does what its name says, on a small pi0_fast with real caches and the real loop."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from craft_opt import CraftOptimizer
from craft_opt.bridge.anchor_cache import AnchorCache
from craft_opt.bridge.anchors import build_cache
from craft_opt.bridge.features import DEFAULT_POOLING, pi0_fast_of
from craft_opt.bridge.loop import prepare, run_steps
from craft_opt.bridge.policies import has_adapters
from craft_opt.bridge.report import methods
from craft_opt.bridge.report.methods import METHODS, SHORT_LIST, StageInputs, cache_bytes, method_named, parameter_bytes
from craft_opt.bridge.report.terms import (
    QuadraticPenalty,
    ReplayRetention,
    diagonal_fisher,
    interpolate,
    token_loss,
)
from craft_opt.bridge.retention_term import HiddenRetention, Retention, TokenRetention
from craft_opt.retention import POOLINGS
from tests.quickstart.support import TASKS
from tests.support.asserts import assert_same_bits

STEPS = 3
BATCH = 4
# What is measured of the old skills, where it is not the teacher's features.
TERMS = {
    "naive": None,
    "frozen-vision": None,
    "retain": None,
    "lora": None,
    "l2sp": QuadraticPenalty,
    "ewc": QuadraticPenalty,
    "replay": ReplayRetention,
    "agem": ReplayRetention,
    "token_ce": TokenRetention,
}


@dataclass(frozen=True)
class Caches:
    """The world's cache, and others of the same samples, built when a test asks for them."""

    world: object
    folder: Path

    def of(self, method):
        if method.stores == "hidden" and method.pooling == DEFAULT_POOLING:
            return self.world.cache
        name = f"{method.stores}-{method.pooling}"
        what = {"top_k": 4} if method.stores == "token_ce" else {"pooling": method.pooling}
        build_cache(
            self.folder / name,
            self.world.teacher,
            [self.world.source()],
            num_samples=len(AnchorCache.open(self.world.cache)),
            batch_size=4,
            kind=method.stores,
            policy_overrides=["--device=cpu"],
            progress=False,
            **what,
        )
        return self.folder / name


@pytest.fixture(scope="session")
def caches(world, tmp_path_factory) -> Caches:
    return Caches(world, tmp_path_factory.mktemp("caches"))


def begin(caches, method, folder, *, number=1, before=None, steps=STEPS):
    """The prepared run, what the method was given, and the weights that it starts from."""
    cache = caches.of(method) if method.uses_anchors else None
    inputs = StageInputs(
        number=number,
        seed=0,
        cache=None if method.only_latest else cache,
        latest=cache if method.only_latest else None,
        prompted=None,
        memory=folder / "memory",
        before=before,
    )
    craft = method.craft_config([inputs.cache] if inputs.cache else [], BATCH)
    cfg = caches.world.config(folder / "out", steps=steps)
    cfg.craft = craft
    cfg._arguments.append("--policy.optimizer_lr=0.01")
    method.configure(cfg)
    run = prepare(cfg)
    start = {name: p.detach().clone() for name, p in pi0_fast_of(run.parts.policy).named_parameters()}
    return method.attach(run, inputs), inputs, start


def weights_of(policy):
    return {name: tensor.detach().clone() for name, tensor in policy.state_dict().items()}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_a_stage(name, caches, tmp_path):
    method = METHODS[name]
    run, inputs, start = begin(caches, method, tmp_path)
    term = run.parts.term
    kinds = {type(part) for part in (term.terms if isinstance(term, Retention) else filter(None, [term]))}
    expected = TERMS.get(name, HiddenRetention)
    assert kinds == ({expected} if expected is not None else set())
    stored = method.stored_bytes(run, inputs)
    summary = run_steps(run, progress=False)
    assert summary.skipped_steps == 0
    assert (summary.last.retention_loss is not None) == (run.parts.term is not None)
    trained = weights_of(run.parts.policy)
    with method.deployed(run, start) as policy:
        found = dict(policy.named_parameters())
        before = {n.replace(".base_layer", ""): p for n, p in start.items() if "lora_" not in n}
        assert set(found) == set(before)
        moved = [n for n, p in found.items() if not torch.equal(p, before[n])]
        assert all(torch.isfinite(p).all() for p in found.values())
        assert moved, "three steps at this rate move the weights"
        assert any("vision_tower" in n for n in moved) == (name not in ("frozen-vision", "lora"))
    for key, value in run.parts.policy.state_dict().items():
        assert_same_bits(value, trained[key], f"{key}: deploying must not change what is trained")
    assert (stored > 0) == (method.uses_anchors or name in ("l2sp", "retain"))


# -- optimizer's settings --------------------------------------------------------------------------------------------


def merged(config, task, retention):
    """What CraftOptimizer makes of two gradients, read off AdamW's first moment; and its metrics."""
    p = nn.Parameter(torch.zeros(2, dtype=torch.float32))
    opt = CraftOptimizer([p], lr=0.0, betas=(0.5, 0.9), max_grad_norm=None, config=config, backend="torch")
    with opt.retention(loss := (p * torch.tensor(retention)).sum() + 1.0):
        loss.backward()
    (p * torch.tensor(task)).sum().backward()
    opt.step()
    return opt.state[p]["exp_avg"].tolist(), 0.5, opt.metrics()


@pytest.mark.parametrize(
    ("name", "task", "retention", "expected"),
    [
        # A-GEM: projected at any negative cosine, also one above CRaFT's threshold; the reference is never added.
        ("agem", (1.0, 0.0), (-1.0, 1.0), (0.5, 0.5)),
        ("agem", (1.0, 0.0), (-0.05, 1.0), (1.0 - 0.0025 / 1.0025, 0.05 / 1.0025)),
        ("agem", (1.0, 0.0), (1.0, 1.0), (1.0, 0.0)),
        # CRaFT's projection alone: not for a cosine of -0.05.
        ("projection-only", (1.0, 0.0), (-1.0, 1.0), (0.5, 0.5)),
        ("projection-only", (1.0, 0.0), (-0.05, 1.0), (1.0, 0.0)),
        # Added as it is, whatever the angle.
        ("replay", (1.0, 0.0), (-1.0, 1.0), (0.0, 1.0)),
        ("replay", (1.0, 0.0), (1.0, 1.0), (2.0, 1.0)),
        ("hidden-no-projection", (1.0, 0.0), (-1.0, 1.0), (0.0, 1.0)),
        ("hidden-fixed-lambda", (1.0, 0.0), (-1.0, 1.0), (-0.5, 1.5)),
        ("l2sp", (1.0, 0.0), (-1.0, 1.0), (0.99, 0.01)),
        ("ewc", (1.0, 0.0), (-1.0, 1.0), (-999.0, 1000.0)),
    ],
)
def test_how_the_gradients_merge(name, task, retention, expected):
    moment, share, metrics = merged(METHODS[name].craft_config((), BATCH), task, retention)
    # fp32 moments, in units of the largest component.
    scale = max(map(abs, expected))
    assert [m / share for m in moment] == pytest.approx(expected, abs=1e-6 * scale)
    fixed = name != "hidden-no-projection"
    assert (metrics.lam_after.item() == metrics.lam_before.item()) == fixed, "λ moves in CRaFT's own methods alone"


def test_crafts_own_methods_keep_its_defaults():
    for name in ("hidden", "token_ce", *(f"hidden-{p}" for p in POOLINGS if p != DEFAULT_POOLING)):
        config = METHODS[name].craft_config([Path("somewhere")], BATCH)
        assert (config.use_grad_projection, config.lambda_lr, config.initial_lambda) == (True, 0.1, 1.0), name
        assert config.retention_mode == ("token_ce" if name == "token_ce" else "hidden")
        assert config.enabled and not METHODS[name].craft_config((), BATCH).enabled


def test_every_pooling_is_a_method():
    assert {m.pooling for m in METHODS.values() if m.name.startswith("hidden")} == set(POOLINGS)
    assert set(SHORT_LIST) < set(METHODS)


# -- each method's own mathematics -----------------------------------------------------------------------------------


def test_frozen_vision_leaves_the_vision_tower_bit_equal(caches, tmp_path):
    run, _, start = begin(caches, METHODS["frozen-vision"], tmp_path)
    run_steps(run, progress=False)
    vision = [n for n in start if "vision_tower" in n]
    assert vision
    moved = {n for n, p in run.parts.policy.named_parameters() if not torch.equal(p, start[n])}
    assert not moved & set(vision)
    assert len(moved) > len(start) - len(vision) - 3, "and the rest trains"


def test_l2sp_is_zero_at_the_start_and_its_gradient_twice_the_distance(caches, tmp_path):
    run, inputs, start = begin(caches, METHODS["l2sp"], tmp_path)
    policy, term = run.parts.policy, run.parts.term
    assert term.loss(policy).item() == 0.0
    run_steps(run, progress=False)
    loss = term.loss(policy)
    distance = {n: p.detach() - start[n] for n, p in policy.named_parameters()}
    assert loss.item() == pytest.approx(sum(d.double().square().sum().item() for d in distance.values()), rel=1e-5)
    gradients = torch.autograd.grad(loss, list(policy.parameters()))
    for (name, d), g in zip(distance.items(), gradients, strict=True):
        assert_same_bits(g, 2 * d, name)
    assert METHODS["l2sp"].stored_bytes(run, inputs) == 4 * sum(p.numel() for p in policy.parameters())


def test_l2sp_holds_the_weights(caches, tmp_path):
    def distance(name, **settings):
        run, _, start = begin(caches, METHODS[name].with_settings(settings), tmp_path / name, steps=10)
        run_steps(run, progress=False)
        return sum((p - start[n]).square().sum().item() for n, p in run.parts.policy.named_parameters())

    assert distance("l2sp", initial_lambda=10.0) < 0.5 * distance("naive")


def test_ewcs_fisher_is_the_mean_of_squared_gradients(caches, tmp_path):
    method = METHODS["ewc"]
    run, inputs, start = begin(caches, method, tmp_path)
    policy = run.parts.policy
    samples = ReplayRetention(AnchorCache.open(inputs.latest), run.preprocessor, run.cfg.craft, 0)
    expected = {n: torch.zeros_like(p) for n, p in policy.named_parameters()}
    for index in range(20):
        policy.zero_grad()
        token_loss(policy, samples.sample(policy, index)).backward()
        for name, p in policy.named_parameters():
            expected[name] += p.grad.square() / 20
    policy.zero_grad()
    found = load_file(inputs.memory / methods.FISHER_FILE)
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-12, msg=name)
    assert sum(value.sum().item() for value in found.values()) > 0

    # L = ½ Σ F (θ − θ⁰)², gradient F (θ − θ⁰).
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.01)
    moved = {n: p.detach() - start[n] for n, p in policy.named_parameters()}
    loss = run.parts.term.loss(policy)
    by_hand = sum((0.5 * found[n].double() * moved[n].double().square()).sum().item() for n in moved)
    assert loss.item() == pytest.approx(by_hand, rel=1e-4)
    gradients = torch.autograd.grad(loss, list(policy.parameters()))
    for (name, d), g in zip(moved.items(), gradients, strict=True):
        torch.testing.assert_close(g, found[name] * d, rtol=1e-5, atol=1e-12, msg=name)
    assert method.stored_bytes(run, inputs) == 2 * parameter_bytes(policy), "weights and Fisher, no samples"

    # The next stage adds its own to it.
    _, later, _ = begin(caches, method, tmp_path / "next", number=2, before=inputs.memory)
    total = load_file(later.memory / methods.FISHER_FILE)
    for name, value in found.items():
        torch.testing.assert_close(total[name], 2 * value, rtol=1e-5, atol=1e-12, msg=name)


def test_the_fisher_needs_samples(caches, tmp_path):
    run, _, _ = begin(caches, METHODS["naive"], tmp_path)
    with pytest.raises(ValueError, match="at least one stored sample"):
        diagonal_fisher(run.parts.policy, [])


def test_replay_is_the_policys_own_loss_on_stored_samples(caches, tmp_path):
    run, inputs, _ = begin(caches, METHODS["replay"], tmp_path)
    policy, (term,) = run.parts.policy.eval(), run.parts.term.terms
    found = run.parts.term.loss(policy)
    # The first four of the order, one by one: every sample has as many tokens.
    order = type(term.order)(20, 0).draw(BATCH)
    losses = [token_loss(policy, term.sample(policy, index)) for index in order]
    torch.testing.assert_close(found, torch.stack(losses).mean())
    assert found.requires_grad

    manifest = AnchorCache.open(inputs.cache).manifest
    bytes_of = {"uint8": 1, "int16": 2, "int32": 4, "int64": 8, "float32": 4, "bool": 1}
    sizes = {
        name: bytes_of[info.dtype] * torch.Size(info.shape).numel() * manifest.samples
        for name, info in manifest.tensors.items()
    }
    features = {name for name in sizes if name.startswith("feature")}
    assert METHODS["replay"].stored_bytes(run, inputs) == sum(v for n, v in sizes.items() if n not in features)
    assert METHODS["hidden"].stored_bytes(run, inputs) == sum(sizes.values())
    assert len(features) == 3, "two layers and their mask"
    assert cache_bytes(inputs.cache, features=True) > cache_bytes(inputs.cache, features=False) > 20 * 32 * 32 * 3


def test_hidden_and_replay_pulls_with_both_gradients(caches, tmp_path):
    method = METHODS["hidden+replay"].with_settings({"replay_weight": 0.3})
    run, inputs, _ = begin(caches, method, tmp_path, steps=5)
    run_steps(run, progress=False)
    policy, craft = run.parts.policy.eval(), run.cfg.craft
    parameters = [p for p in policy.parameters() if p.requires_grad]
    values, gradients = {}, {}
    for name, config, make in (
        ("both", craft, HiddenRetention),
        ("hidden", replace(craft, replay_weight=0.0), HiddenRetention),
        ("replay", craft, ReplayRetention),
    ):
        loss = Retention([AnchorCache.open(inputs.cache)], run.preprocessor, config, 0, make).loss(policy)
        values[name] = loss.item()
        parts = torch.autograd.grad(loss, parameters, materialize_grads=True)
        gradients[name] = torch.cat([part.flatten() for part in parts])
    assert values["both"] == values["hidden"] > 0, "the constraint is the drift alone"
    assert gradients["hidden"].norm() > 0.1 * gradients["replay"].norm(), (
        "both must count for the test to say something"
    )
    # One backward pass adds in another order than two: rounding.
    difference = gradients["both"] - gradients["hidden"] - 0.3 * gradients["replay"]
    assert difference.norm() < 1e-5 * gradients["both"].norm()
    assert run.parts.term.drift(policy) == pytest.approx(
        Retention([AnchorCache.open(inputs.cache)], run.preprocessor, craft, 0, HiddenRetention).drift(policy)
    )


def test_prompted_frames_join_the_stored_samples(caches, tmp_path):
    world = caches.world
    sources = [replace(world.source(), root=world.new, prompt=prompt) for prompt in TASKS]
    flags = ["--device=cpu"]
    build_cache(tmp_path / "asked", world.teacher, sources, num_samples=8, policy_overrides=flags, progress=False)
    method = METHODS["hidden"].with_settings({"prompted": 8, "prompted_weight": 3.0})
    craft = method.craft_config([world.cache, tmp_path / "asked"], BATCH)
    assert (craft.anchor_cache_weights, craft.retention_mode) == ("1,3.0", "hidden")
    cfg = world.config(tmp_path / "out", steps=STEPS)
    cfg.craft = craft
    run = prepare(cfg)
    assert run.term.counts == [1, 3]
    run_steps(run, progress=False)
    assert run.term.positions == (STEPS, 3 * STEPS)
    # Without stored samples the frames are all there is.
    alone = METHODS["naive"].with_settings({"prompted": 8}).craft_config([tmp_path / "asked"], BATCH)
    assert alone.enabled and alone.retention_mode == "hidden" and not alone.anchor_cache_weights


def test_retain_interpolates_between_before_and_after(caches, tmp_path):
    run, _, start = begin(caches, METHODS["retain"], tmp_path)
    run_steps(run, progress=False)
    after = {n: p.detach().clone() for n, p in run.parts.policy.named_parameters()}
    for alpha in (0.0, 0.25, 1.0):
        method = METHODS["retain"].with_settings({"alpha": alpha})
        with method.deployed(run, start) as policy:
            for name, p in policy.named_parameters():
                if alpha in (0.0, 1.0):
                    assert_same_bits(p.detach(), (start if alpha == 0.0 else after)[name], name)
                else:
                    torch.testing.assert_close(p.detach(), 0.75 * start[name] + 0.25 * after[name])
        for name, p in run.parts.policy.named_parameters():
            assert_same_bits(p.detach(), after[name], name)


def test_interpolation_is_exact_at_its_ends_for_numbers_of_any_size():
    generator = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.arange(-8, 9).repeat_interleave(50)
    start, end = (torch.randn(scales.numel(), generator=generator) * scales for _ in range(2))
    for alpha, expected in ((0.0, start), (1.0, end)):
        model = nn.ParameterDict({"w": nn.Parameter(end.clone())})
        interpolate(model, {"w": start}, alpha)
        assert_same_bits(model["w"].detach(), expected, f"α = {alpha}")


def test_lora_deploys_the_base_with_merged_adapters(caches, tmp_path):
    run, inputs, start = begin(caches, METHODS["lora"], tmp_path, steps=5)
    wrapped = run.parts.policy
    assert has_adapters(wrapped)
    assert all("lora_" in n for n, p in wrapped.named_parameters() if p.requires_grad)
    ranks = {p.shape[0] for n, p in wrapped.named_parameters() if "lora_A" in n}
    assert ranks == {16}
    run_steps(run, progress=False)
    batch = ReplayRetention(
        AnchorCache.open(caches.world.cache), run.preprocessor, METHODS["hidden"].craft_config((), BATCH), 0
    ).sample(wrapped, 0)
    wrapped.eval()
    with torch.no_grad(), METHODS["lora"].deployed(run, start) as merged_policy:
        assert not has_adapters(merged_policy) and not merged_policy.config.use_peft
        assert token_loss(merged_policy, batch).item() == pytest.approx(token_loss(wrapped, batch).item(), rel=1e-5)
        with wrapped.disable_adapter():
            assert token_loss(wrapped, batch).item() != pytest.approx(token_loss(merged_policy, batch).item(), rel=1e-4)
    assert METHODS["lora"].stored_bytes(run, inputs) == 0


# -- settings --------------------------------------------------------------------------------------------------------


def test_every_method_has_as_many_settings_to_try_the_defaults_first():
    for method in METHODS.values():
        assert len(method.knobs) == 4, method.name
        assert method.knobs[0] == {}, method.name
        made = [method.with_settings(settings) for settings in method.knobs]
        assert len({(m.lr, str(m.craft), str(methods_own(m))) for m in made}) == 4, f"{method.name}: two are the same"


def methods_own(method):
    names = ("pooling", "alpha", "rank", "prompted", "prompted_weight")
    return {name: getattr(method, name) for name in names if hasattr(method, name)}


def test_settings_reach_the_optimizer_or_the_method():
    hidden = METHODS["hidden"].with_settings({"lambda_lr": 0.0, "lr": 1e-4})
    assert hidden.craft_config((), 1).lambda_lr == 0.0
    assert hidden.lr == 1e-4
    assert METHODS["retain"].with_settings({"alpha": 0.8}).alpha == 0.8
    assert METHODS["hidden"].craft_config((), 1).lambda_lr == 0.1, "the method itself is as it was"
    with pytest.raises(ValueError, match="naive has no setting alpha"):
        METHODS["naive"].with_settings({"alpha": 0.5})
    with pytest.raises(ValueError, match="lambda_lr"):
        METHODS["hidden"].with_settings({"lambda_lr": -1.0})
    with pytest.raises(ValueError, match="there is no method 'hiden'; there are naive, "):
        method_named("hiden")
    for name, setting, told in (
        ("hidden", {"selection": "herding"}, "selection must be one of random, coverage, got 'herding'"),
        ("hidden", {"pooling": "mean"}, "pooling must be one of .*, got 'mean'"),
        ("hidden", {"layers": -1}, r"layers must be a list of decoder layers such as \[-2, -1\], got -1"),
        ("hidden", {"layers": "last"}, "layers must be a list of decoder layers"),
        ("hidden", {"prompted": 2.5}, "prompted must be of type int"),
        ("hidden", {"prompted": -1}, "prompted must be finite and at least 0"),
        ("hidden+prompted", {"prompted_weight": -0.5}, "prompted_weight must be finite and at least 0"),
        ("naive", {"lr": "fast"}, "lr must be of type float"),
        ("retain", {"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ("lora", {"rank": 0}, "rank must be finite and at least 1"),
    ):
        with pytest.raises(ValueError, match=told):
            METHODS[name].with_settings(setting)
    assert replace(METHODS["naive"]) == METHODS["naive"]
