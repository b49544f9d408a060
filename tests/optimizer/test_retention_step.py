"""The step with two gradients against the float64 oracle of SPEC section 2."""

import itertools
import math

import pytest
import torch

from craft_opt import CraftConfig, CraftOptimizer
from tests.optimizer.models import batches, craft, flat_params, make_model, ret_loss, task_loss, train
from tests.support.asserts import assert_coefficients, assert_norm_close, assert_same_bits
from tests.support.oracle import adamw_oracle, surgery_oracle
from tests.support.samplers import RANK_CASES, SCALES, flat64, gradient_pair
from tests.support.tolerances import ADAMW_NORM

MODES = ("weighted", "equal", "task_priority")


def parameters(shapes_like):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn_like(g)) for g in shapes_like]


def give(opt, params, task, ret, loss=0.5):
    """Both gradients by hand, in the way a loop of the user's own would."""
    with opt.retention(loss):
        for p, g in zip(params, ret, strict=True):
            p.grad = None if g is None else g.clone()
    for p, g in zip(params, task, strict=True):
        p.grad = None if g is None else g.clone()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", RANK_CASES)
def test_step_matches_the_oracle(case, mode):
    for (i, st), (j, sr) in itertools.product(enumerate(SCALES), enumerate(SCALES)):
        task, ret = gradient_pair(case, st, sr, seed=7 * i + j)
        params = parameters(task)
        config = CraftConfig(projection_mode=mode, initial_lambda=1.7)
        opt = CraftOptimizer(params, lr=1e-2, config=config, backend="auto")
        before = flat64(params).detach()
        give(opt, params, task, ret)
        opt.step()
        t, r = flat64(task), flat64(ret)
        oracle = surgery_oracle(t, r, 1.7, config, 1.0)
        metrics = opt.metrics()
        assert metrics.conflict.item() == oracle.conflict
        # Partial dots are fp32 where that decides: 3e-7 of the norms (measured at 2**18 elements), here far fewer.
        assert abs(metrics.dot.item() - oracle.dot) <= 1e-6 * float(t.norm()) * float(r.norm())
        vector = opt._layouts[0].buffers.metrics
        assert_coefficients(vector[10], vector[11], metrics.grad_norm, oracle, float(t.norm()), float(r.norm()))
        zero = torch.zeros_like(before)
        expected, _, _ = adamw_oracle(before, zero, zero, oracle.clip * oracle.merged, 1, opt.param_groups[0])
        if oracle.norm > 1e-5 * (abs(oracle.a) * float(t.norm()) + abs(oracle.b) * float(r.norm())):
            # AdamW's first step divides g by |g|: where g is all cancellation its sign is rounding.
            assert_norm_close(flat64(params).detach(), expected, ADAMW_NORM, f"{case} {st} {sr}")


def test_lambda_rises_while_violated_and_falls_while_it_holds_after_the_merge_used_it():
    model = make_model()
    config = CraftConfig(epsilon_start=0.2, epsilon_end=0.2, lambda_lr=0.5)
    opt = craft(model, config=config)
    batch = batches(1)[0]
    loss = ret_loss(model, batch)
    with opt.retention(loss):
        loss.backward()
    task_loss(model, batch).backward()
    opt.step()
    metrics = opt.metrics()
    assert metrics.lam_before.item() == 1.0
    expected = 1.0 + 0.5 * (loss.item() - 0.2)
    assert metrics.lam_after.item() == pytest.approx(expected, rel=1e-6)
    opt.zero_grad()
    with opt.retention(0.0):
        ret_loss(model, batch).backward()
    task_loss(model, batch).backward()
    opt.step()
    assert opt.metrics().lam_before.item() == metrics.lam_after.item()
    assert opt.metrics().lam_after.item() == pytest.approx(expected - 0.1, rel=1e-6)


def test_epsilon_follows_completed_steps_and_lambda_only_measured_ones():
    model = make_model()
    opt = craft(model, config=CraftConfig(epsilon_start=1.0, epsilon_end=0.5, retention_freq=2), total_steps=3)
    seen = []
    for batch in batches(3):
        if opt.retention_due:
            loss = ret_loss(model, batch)
            with opt.retention(loss):
                loss.backward()
        task_loss(model, batch).backward()
        opt.step()
        opt.zero_grad()
        m = opt.metrics()
        seen.append((round(m.epsilon.item(), 3), m.lam_after.item() != m.lam_before.item(), math.isnan(m.cos.item())))
    assert seen == [(1.0, True, False), (0.833, False, True), (0.667, True, False)]


@pytest.mark.parametrize("mode", MODES)
def test_a_step_without_retention_is_plain_adamw_in_every_merge_mode(mode):
    ours, theirs = make_model(), make_model()
    opt = craft(ours, config=CraftConfig(projection_mode=mode), max_grad_norm=None)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    for batch in batches(10):
        for model, o in ((ours, opt), (theirs, reference)):
            task_loss(model, batch).backward()
            o.step()
            o.zero_grad()
    assert_norm_close(flat_params(ours), flat_params(theirs), ADAMW_NORM, mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_that_one_loss_did_not_reach_takes_the_other_weighted(mode):
    task, ret = gradient_pair("obtuse", seed=3)
    task[0], ret[1] = None, None
    full_t = [torch.zeros_like(ret[0]), *task[1:]]
    full_r = [ret[0], torch.zeros_like(task[1]), *ret[2:]]
    params = parameters(full_t)
    config = CraftConfig(projection_mode=mode)
    opt = CraftOptimizer(params, lr=1e-2, config=config, max_grad_norm=None, backend="auto")
    before = flat64(params).detach()
    give(opt, params, task, ret)
    opt.step()
    oracle = surgery_oracle(flat64(full_t), flat64(full_r), 1.0, config, None)
    zero = torch.zeros_like(before)
    expected, _, _ = adamw_oracle(before, zero, zero, oracle.merged, 1, opt.param_groups[0])
    assert_norm_close(flat64(params).detach(), expected, ADAMW_NORM, mode)


def test_a_parameter_that_neither_loss_reached_is_untouched():
    task, ret = gradient_pair("random")
    task[2], ret[2] = None, None
    params = parameters([*ret[:2], torch.zeros(()), ret[3]])
    opt = CraftOptimizer(params, lr=1e-2, weight_decay=0.5, backend="auto")
    before = params[2].detach().clone()
    for _ in range(3):
        give(opt, params, task, ret)
        opt.step()
    assert_same_bits(params[2].detach(), before, "untouched parameter")
    assert params[2] not in opt.state or not opt.state[params[2]]
    assert opt.state[params[0]]["step"].item() == 3


def test_a_gradient_of_zeros_is_a_gradient():
    p = torch.nn.Parameter(torch.ones(4))
    opt = CraftOptimizer([p], lr=0.1, weight_decay=0.5, backend="auto")
    p.grad = torch.zeros(4)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 0.95))
    assert opt.state[p]["step"].item() == 1


def test_an_absent_gradient_does_not_leave_its_last_value_in_the_dot_product():
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    opt = CraftOptimizer(params, lr=0.1, config=CraftConfig(lambda_lr=0.0), backend="auto")
    give(opt, params, [torch.ones(3), torch.ones(2)], [torch.ones(3), torch.ones(2)])
    opt.step()
    assert opt.metrics().dot.item() == 5.0
    opt.zero_grad()
    give(opt, params, [torch.ones(3), None], [torch.ones(3), torch.ones(2)])
    opt.step()
    assert opt.metrics().dot.item() == 3.0
    opt.zero_grad()
    give(opt, params, [torch.ones(3), torch.ones(2)], [None, torch.ones(2)])
    opt.step()
    assert opt.metrics().dot.item() == 2.0
    assert opt.metrics().grad_norm.item() == pytest.approx(math.sqrt(3 + 8))


BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["task", "ret", "loss"])
def test_what_is_not_finite_skips_the_step_and_changes_nothing(where, bad):
    model = make_model()
    opt = craft(model, config=CraftConfig(lambda_lr=0.3))
    train(model, opt, batches(2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = opt.state_dict()
    moments = [{k: v.clone() for k, v in s.items() if k != "craft_dual"} for s in state["state"].values()]
    lam = opt.metrics().lam_after.item()
    batch = batches(1, seed=9)[0]
    loss = ret_loss(model, batch)
    with opt.retention(bad if where == "loss" else loss):
        loss.backward()
        if where == "ret":
            next(model.parameters()).grad.view(-1)[3] = bad
    task_loss(model, batch).backward()
    if where == "task":
        next(model.parameters()).grad.view(-1)[3] = bad
    opt.step()
    opt.zero_grad()
    metrics = opt.metrics()
    assert metrics.skipped.item()
    assert metrics.skipped_steps.item() == 1
    assert metrics.lam_after.item() == lam
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name], name)
    after = opt.state_dict()
    for old, new in zip(moments, after["state"].values(), strict=True):
        for name in old:
            assert_same_bits(new[name], old[name], name)
    assert after["state"][0]["craft_dual"]["t"].item() == 2
    # The next step must not carry the NaN on.
    train(model, opt, batches(1, seed=10))
    assert not opt.metrics().skipped.item()
    assert flat_params(model).isfinite().all()
    assert opt.metrics().skipped_steps.item() == 1


def test_step_without_any_gradient_does_nothing():
    model = make_model()
    opt = craft(model)
    before = flat_params(model)
    opt.step()
    assert torch.equal(flat_params(model), before)
    assert opt.attempted_steps == 0
    with pytest.raises(RuntimeError, match="before the first step"):
        opt.metrics()


def test_several_dtypes_in_one_model():
    torch.manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(33)),
        torch.nn.Parameter(torch.randn(50).bfloat16()),
        torch.nn.Parameter(torch.randn(7).half()),
    ]
    opt = CraftOptimizer(params, lr=1e-2, max_grad_norm=None, backend="auto")
    task = [torch.randn_like(p) for p in params]
    ret = [-0.5 * g for g in task]
    before = [p.detach().clone() for p in params]
    give(opt, params, task, ret)
    opt.step()
    oracle = surgery_oracle(flat64(task), flat64(ret), 1.0, CraftConfig(), None)
    assert opt.metrics().conflict.item()
    assert opt.metrics().dot.item() == pytest.approx(oracle.dot, rel=1e-6)
    for p, old in zip(params, before, strict=True):
        assert p.dtype == old.dtype
        assert not torch.equal(p, old)
        assert opt.state[p]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("angle", [1e-4, 1e-2, 0.05, 0.2, 1.0, 2.0, 3.0, 3.1, 3.1414])
@pytest.mark.parametrize("threshold", [-0.1, 0.0, -0.999])
def test_coefficients_and_norm_hold_at_every_angle_of_a_larger_gradient(angle, threshold):
    """The quick fp32 reduction must hand over to fp64 wherever it would not meet the bounds."""
    gen = torch.Generator().manual_seed(0)
    t = torch.randn(400_000, generator=gen, dtype=torch.float64)
    perp = torch.randn(400_000, generator=gen, dtype=torch.float64)
    perp -= (perp @ t) / (t @ t) * t
    r = (math.cos(angle) * t + math.sin(angle) * perp * t.norm() / perp.norm()).float()
    t = t.float()
    for lam in (0.0, 1.0):
        p = torch.nn.Parameter(torch.zeros(400_000))
        config = CraftConfig(conflict_threshold=threshold, initial_lambda=lam)
        opt = CraftOptimizer([p], config=config, backend="auto")
        give(opt, [p], [t], [r])
        opt.step()
        t64, r64 = t.double(), r.double()
        oracle = surgery_oracle(t64, r64, lam, config, 1.0)
        vector = opt._layouts[0].buffers.metrics
        assert opt.metrics().conflict.item() == oracle.conflict
        assert_coefficients(vector[10], vector[11], vector[3], oracle, float(t64.norm()), float(r64.norm()))


def test_a_coefficient_beyond_fp32_skips_the_step():
    p = torch.nn.Parameter(torch.ones(2))
    opt = CraftOptimizer([p], config=CraftConfig(initial_lambda=0.0), max_grad_norm=None, backend="auto")
    give(opt, [p], [torch.tensor([1e8, 1e8])], [torch.tensor([-1e-44, 0.0])])
    opt.step()
    assert opt.metrics().skipped.item()
    assert torch.equal(p.detach(), torch.ones(2))
