"""Between the steps that measure retention: plain AdamW, or the last retention gradient once more."""

import copy
import math

import pytest
import torch

from craft_opt import CraftConfig, CraftOptimizer
from craft_opt.dual import Multiplier, advance
from tests.optimizer.models import batches, craft, flat_params, make_model, ret_loss, task_loss, train
from tests.support.asserts import assert_norm_close, assert_same_bits
from tests.support.oracle import adamw_oracle, surgery_oracle
from tests.support.samplers import flat64
from tests.support.tolerances import ADAMW_NORM


def reusing(decay=0.5, **kwargs):
    return CraftConfig(off_steps="reuse", reuse_decay=decay, retention_freq=3, initial_lambda=2.0, **kwargs)


def test_an_off_step_merges_the_last_retention_gradient_decayed_by_its_age():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(50))
    config = reusing(lambda_lr=0.0)
    opt = CraftOptimizer([p], lr=1e-2, config=config)
    ret, tasks = torch.randn(50), torch.randn(4, 50)
    state = torch.zeros(50, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    expected = p.detach().double().clone()
    for i, task in enumerate(tasks):
        if i == 0:
            with opt.retention(0.5):
                p.grad = ret.clone()
        p.grad = task.clone()
        opt.step()
        opt.zero_grad()
        # Without a conflict the weight of g_r is λ·decay^age; with one, the projection is that of the undecayed.
        oracle = surgery_oracle(task.double(), ret.double(), 2.0 * 0.5**i, config, 1.0)
        grad = oracle.clip * oracle.merged
        expected, *state = adamw_oracle(expected, *state, grad, i + 1, opt.param_groups[0])
        assert opt.metrics().conflict.item() == oracle.conflict
        assert math.isnan(opt.metrics().retention_loss.item()) == (i > 0)
        assert opt.metrics().lam_after.item() == 2.0
    assert_norm_close(p.detach(), expected, ADAMW_NORM, "after four steps")


def test_lambda_moves_only_on_steps_that_measured():
    model = make_model()
    opt = craft(model, config=reusing(lambda_lr=0.3, epsilon_start=0.1))
    for i, batch in enumerate(batches(7)):
        before = opt.metrics().lam_after.item() if i else 2.0
        train(model, opt, [batch], every=1 if i % 3 == 0 else 0)
        assert (opt.metrics().lam_after.item() != before) == (i % 3 == 0)
        assert not math.isnan(opt.metrics().cos.item())


def test_skip_leaves_off_steps_plain():
    model, plain = make_model(), make_model()
    opt = craft(model, config=CraftConfig(initial_lambda=0.0, use_grad_projection=False, lambda_lr=0.0))
    train(model, opt, batches(6), every=3)
    train(plain, craft(plain), batches(6), every=0)
    assert_norm_close(flat_params(model), flat_params(plain), ADAMW_NORM, "λ = 0 without projection")
    assert math.isnan(opt.metrics().cos.item())


def test_a_parameter_of_the_last_retention_gradient_alone_is_not_mixed_with_the_one_before():
    shared, left, right = (torch.nn.Parameter(torch.ones(4)) for _ in range(3))
    opt = CraftOptimizer([shared, left, right], lr=1e-2, weight_decay=0.0, config=reusing(1.0))
    for branch in (left, right):
        loss = (shared * branch).square().sum()
        with opt.retention(loss):
            loss.backward()
        shared.square().sum().backward()
        opt.step()
        opt.zero_grad()
    moved = left.detach().clone()
    shared.square().sum().backward()
    opt.step()
    assert torch.equal(left.detach(), moved), "the gradient before last is gone"
    assert opt.state[right]["step"] == 2


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_two_steps_save_load_two_steps_are_four_with_reuse(stop):
    data = batches(6)
    config = reusing(0.8)

    def go(model, opt, steps):
        for i in steps:
            train(model, opt, [data[i]], every=1 if i % 3 == 0 else 0)

    whole = make_model()
    go(whole, craft(whole, config=config), range(6))
    model = make_model()
    opt = craft(model, config=config)
    go(model, opt, range(stop))
    saved = copy.deepcopy(opt.state_dict())
    again = copy.deepcopy(model)
    resumed = craft(again, config=config)
    resumed.load_state_dict(saved)
    go(again, resumed, range(stop, 6))
    assert_same_bits(flat_params(again), flat_params(whole), "resumed")


def test_the_state_with_a_kept_gradient_loads_into_adamw():
    model = make_model()
    opt = craft(model, config=reusing())
    train(model, opt, batches(2), every=2)
    adamw = torch.optim.AdamW(model.parameters())
    adamw.load_state_dict(opt.state_dict())
    task_loss(model, batches(1)[0]).backward()
    adamw.step()


def test_a_kept_gradient_outlives_a_late_parameter():
    """The buffers are laid out afresh when a group is added; what is to be reused must come along."""
    model, late = make_model(), torch.nn.Parameter(torch.ones(3))
    opt = craft(model, config=reusing(1.0))
    train(model, opt, batches(1))
    opt.add_param_group({"params": [late]})
    task_loss(model, batches(1)[0]).backward()
    opt.step()
    assert not math.isnan(opt.metrics().cos.item())


def test_reuse_refuses_a_grad_scaler():
    model = make_model()
    opt = craft(model, config=reusing())
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for _ in range(2):
        batch = batches(1)[0]
        if opt.attempted_steps == 0:
            loss = ret_loss(model, batch)
            with opt.retention(loss):
                scaler.scale(loss).backward()
            scaler.scale(task_loss(model, batch)).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        else:
            scaler.scale(task_loss(model, batch)).backward()
            with pytest.raises(RuntimeError, match="off_steps='skip'"):
                scaler.step(opt)


@pytest.mark.parametrize("controller", ["ascent", "nupi"])
def test_the_optimizer_moves_lambda_as_the_dual_functions_say(controller):
    config = CraftConfig(
        lambda_controller=controller, nupi_kp=0.7, nupi_nu=0.3, retention_ema=0.5, lambda_lr=0.2, epsilon_start=0.4
    )
    model = make_model()
    opt = craft(model, config=config)
    state = Multiplier(config.initial_lambda)
    for batch in batches(8):
        train(model, opt, [batch])
        found = opt.metrics()
        state = advance(state, found.retention_loss.item(), found.epsilon.item(), config)
        assert found.lam_after.item() == pytest.approx(state.lam, rel=1e-12)


def test_controllers_memory_survives_save_and_load():
    config = CraftConfig(lambda_controller="nupi", retention_ema=0.9)
    whole, model = make_model(), make_model()
    data = batches(6)
    full, half = craft(whole, config=config), craft(model, config=config)
    train(whole, full, data)
    train(model, half, data[:3])
    resumed = craft(model, config=config)
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    train(model, resumed, data[3:])
    assert resumed.metrics().lam_after.item() == full.metrics().lam_after.item()
    assert_same_bits(flat_params(model), flat_params(whole), "resumed")


def test_an_off_step_leaves_the_callers_gradient_as_it_was():
    model = make_model()
    opt = craft(model, config=reusing(1.0))
    train(model, opt, batches(1))
    task_loss(model, batches(1)[0]).backward()
    before = flat64([p.grad for p in model.parameters()])
    opt.step()
    assert torch.equal(before, flat64([p.grad for p in model.parameters()]))
