"""Gradients of both kinds accumulate in any order, however they come into .grad."""

import itertools

import pytest
import torch

from craft_opt import CraftConfig, CraftOptimizer
from tests.optimizer.models import batches, craft, flat_params, make_model, ret_loss, task_loss, train
from tests.support.asserts import assert_norm_close, assert_same_bits

# Sums of two fp32 gradients in another order: one rounding each.
ORDER = 1e-6


def run_order(order, large=False, capture=False):
    """Two retention and two task micro-batches in the given order, then three steps."""
    model = make_model(width=3000 if large else 24)
    opt = craft(model)
    for step in range(3):
        data = {"R": iter(batches(2, seed=step)), "T": iter(batches(2, seed=100 + step))}
        for kind in order:
            batch = next(data[kind])
            if kind == "T":
                (task_loss(model, batch) / 2).backward()
            elif capture:
                loss = ret_loss(model, batch) / 2
                loss.backward()
                opt.capture_retention(loss)
            else:
                loss = ret_loss(model, batch) / 2
                with opt.retention(loss):
                    loss.backward()
        opt.step()
        opt.zero_grad()
    return flat_params(model), opt.metrics()


@pytest.mark.parametrize("large", [False, True])
def test_every_order_of_micro_batches_gives_the_same(large):
    reference, metrics = run_order("RRTT", large)
    for order in sorted(set(itertools.permutations("RRTT"))):
        params, other = run_order(order, large)
        assert_norm_close(params, reference, ORDER, "".join(order))
        assert other.lam_after.item() == pytest.approx(metrics.lam_after.item(), rel=1e-6)


def test_capture_equals_the_context():
    params, metrics = run_order("RRTT")
    captured, other = run_order("RRTT", capture=True)
    assert_norm_close(captured, params, ORDER, "capture")
    assert other.retention_loss.item() == metrics.retention_loss.item()


def test_the_captured_losses_add_up():
    model = make_model()
    opt = craft(model)
    first, second = batches(2)
    losses = []
    for batch in (first, second):
        loss = ret_loss(model, batch) / 2
        losses.append(loss.item())
        with opt.retention(loss):
            loss.backward()
    task_loss(model, first).backward()
    opt.step()
    assert opt.metrics().retention_loss.item() == pytest.approx(sum(losses), rel=1e-7)


@pytest.mark.parametrize("order", ["RT", "TR"])
def test_capture_refuses_task_gradients(order):
    model = make_model()
    opt = craft(model)
    batch = batches(1)[0]
    for kind in order:
        (ret_loss if kind == "R" else task_loss)(model, batch).backward()
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="task gradients already lie"):
        opt.capture_retention(1.0)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_capture_takes_several_backwards_when_told():
    model = make_model()
    opt = craft(model)
    for batch in batches(2):
        (ret_loss(model, batch) / 2).backward()
    opt.capture_retention(1.0, backward_passes=2)
    assert all(p.grad is None for p in model.parameters())


def test_retention_without_a_gradient_is_an_error():
    model = make_model()
    opt = craft(model)
    with pytest.raises(RuntimeError, match="no retention gradient"), opt.retention(1.0):
        pass
    with pytest.raises(RuntimeError, match="no retention gradient"):
        opt.capture_retention(1.0)


@pytest.mark.parametrize("loss", [torch.ones(2), torch.tensor(1j)])
def test_the_loss_must_be_one_number(loss):
    model = make_model()
    opt = craft(model)
    with pytest.raises(ValueError, match="one real number"), opt.retention(loss):
        pass


def test_blocks_do_not_nest():
    model = make_model()
    opt = craft(model)
    with pytest.raises(RuntimeError, match="do not nest"), opt.retention(1.0), opt.retention(1.0):
        pass


def test_an_error_inside_the_block_drops_the_half_gradient_and_keeps_the_task_gradient():
    model, other = make_model(), make_model()
    opt, reference = craft(model), craft(other)
    batch = batches(1)[0]
    task_loss(model, batch).backward()
    kept = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), opt.retention(1.0):
        ret_loss(model, batch).backward()
        raise ZeroDivisionError
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), kept, strict=True))
    opt.step()
    task_loss(other, batch).backward()
    reference.step()
    assert_same_bits(flat_params(model), flat_params(other), "after the error")


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_either_way_trains_alike(set_to_none):
    def run(flag):
        model = make_model()
        opt = craft(model)
        for batch in batches(4):
            loss = ret_loss(model, batch)
            with opt.retention(loss):
                loss.backward()
            task_loss(model, batch).backward()
            opt.step()
            opt.zero_grad(set_to_none=flag)
        return flat_params(model)

    assert_same_bits(run(set_to_none), run(True), "set_to_none")


def test_zero_grad_keeps_the_captured_retention_gradient():
    model = make_model()
    opt = craft(model)
    batch = batches(1)[0]
    loss = ret_loss(model, batch)
    with opt.retention(loss):
        loss.backward()
    opt.zero_grad()
    task_loss(model, batch).backward()
    opt.step()
    assert opt.metrics().retention_loss.item() == pytest.approx(loss.item(), rel=1e-7)


def test_step_consumes_the_retention_gradient():
    model = make_model()
    opt = craft(model)
    train(model, opt, batches(2), every=2)
    assert opt.metrics().retention_loss.isnan()


def test_replaced_grads_are_used():
    model, other = make_model(), make_model()
    opt, reference = craft(model), craft(other)
    for batch in batches(3):
        for m, o in ((model, opt), (other, reference)):
            task_loss(m, batch).backward()
            if m is model:
                for p in m.parameters():
                    p.grad = (p.grad * 2).clone()
            else:
                for p in m.parameters():
                    p.grad.mul_(2)
            o.step()
            o.zero_grad()
    assert_same_bits(flat_params(model), flat_params(other), "replaced .grad")


def test_tied_and_frozen_parameters():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = torch.nn.Linear(10, 10, bias=False)
            self.frozen = torch.nn.Linear(10, 10)
            self.frozen.requires_grad_(False)
            self.head = torch.nn.Linear(10, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(torch.tanh(self.frozen(self.embed(x))))

    ours, theirs = Tied(), Tied()
    opt = CraftOptimizer(ours.parameters(), lr=1e-2, max_grad_norm=None, backend="auto")
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    for batch in batches(5):
        for model, o in ((ours, opt), (theirs, reference)):
            task_loss(model, batch).backward()
            o.step()
            o.zero_grad()
    assert_norm_close(flat_params(ours), flat_params(theirs), ORDER, "tied")
    assert_same_bits(ours.frozen.weight, theirs.frozen.weight, "frozen")


def test_thawing_a_parameter_and_adding_a_group_keep_the_state():
    ours, theirs = make_model(), make_model()
    late_ours, late_theirs = torch.nn.Parameter(torch.ones(10)), torch.nn.Parameter(torch.ones(10))
    for m in (ours, theirs):
        m[0].requires_grad_(False)
    opt = CraftOptimizer(ours.parameters(), lr=1e-2, max_grad_norm=None, backend="auto")
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    for i, batch in enumerate(batches(9)):
        if i == 3:
            for m in (ours, theirs):
                m[0].requires_grad_(True)
        if i == 6:
            opt.add_param_group({"params": [late_ours], "lr": 0.1})
            reference.add_param_group({"params": [late_theirs], "lr": 0.1})
        for model, o, late in ((ours, opt, late_ours), (theirs, reference, late_theirs)):
            scale = late if i >= 6 else 1.0
            (model(batch[0] * scale) - 1).square().mean().backward()
            o.step()
            o.zero_grad()
    assert_norm_close(flat_params(ours), flat_params(theirs), ORDER, "thawed")
    assert_norm_close(late_ours.detach(), late_theirs.detach(), ORDER, "late group")


def test_a_pending_retention_gradient_survives_a_new_group():
    model = make_model()
    opt = craft(model)
    batch = batches(1)[0]
    loss = ret_loss(model, batch)
    with opt.retention(loss):
        loss.backward()
    late = torch.nn.Parameter(torch.ones(3))
    opt.add_param_group({"params": [late]})
    (task_loss(model, batch) + late.sum()).backward()
    opt.step()
    assert opt.metrics().retention_loss.item() == pytest.approx(loss.item(), rel=1e-7)
    assert not opt.metrics().dot.isnan()
    assert opt.metrics().dot.item() != 0


@pytest.mark.parametrize("form", ["transposed", "slice", "channels_last", "odd_offset", "expanded_stride", "scalar"])
def test_memory_formats_of_parameters(form):
    torch.manual_seed(0)
    if form == "transposed":
        data = torch.randn(6, 4).t()
    elif form == "slice":
        data = torch.randn(6, 8)[:, ::2]
    elif form == "channels_last":
        data = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    elif form == "odd_offset":
        data = torch.randn(25)[1:]
    elif form == "expanded_stride":
        data = torch.randn(3, 1, 4)
    else:
        data = torch.randn(())
    copied = data.detach().clone().contiguous()
    ours, theirs = torch.nn.Parameter(data), torch.nn.Parameter(copied)
    opt = CraftOptimizer([ours], lr=1e-2, max_grad_norm=None, backend="auto")
    reference = torch.optim.AdamW([theirs], lr=1e-2)
    for i in range(5):
        for p, o in ((ours, opt), (theirs, reference)):
            weights = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            (p * weights).square().sum().backward()
            o.step()
            o.zero_grad()
    assert_norm_close(ours.detach(), theirs.detach(), ORDER, form)


def test_moving_the_parameters_memory_is_noticed():
    model, other = make_model(), make_model()
    opt, reference = craft(model), craft(other)
    train(model, opt, batches(2))
    train(other, reference, batches(2))
    for p in model.parameters():
        p.data = p.data.clone()
    train(model, opt, batches(2, seed=5))
    train(other, reference, batches(2, seed=5))
    assert_same_bits(flat_params(model), flat_params(other), "moved memory")


def test_attached_retention_equals_the_explicit_loop():
    config = CraftConfig(retention_freq=2, lambda_lr=0.1)
    explicit, attached = make_model(), make_model()
    opt = craft(explicit, config=config)
    train(explicit, opt, batches(6), every=2)

    other = craft(attached, config=config)
    data = batches(6)
    current = {}
    other.attach_retention(lambda: ret_loss(attached, current["batch"]))
    for batch in data:
        current["batch"] = batch
        task_loss(attached, batch).backward()
        other.step()
        other.zero_grad()
    assert_same_bits(flat_params(attached), flat_params(explicit), "attached")
    assert other.metrics().lam_after.item() == opt.metrics().lam_after.item()
    other.attach_retention(None)
    train(attached, other, data[:1], every=0)
    assert other.metrics().retention_loss.isnan()


def test_a_loop_that_clips_by_itself_needs_its_clipping_off():
    """What attach_retention's docstring says: the loop's own clip sees the task gradient alone."""

    def run(loop_clip):
        model = make_model()
        opt = craft(model, max_grad_norm=0.1)
        current = {}
        opt.attach_retention(lambda: ret_loss(model, current["batch"]), every=1)
        for current["batch"] in batches(3):
            task_loss(model, current["batch"]).backward()
            if loop_clip > 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), loop_clip)
            opt.step()
            opt.zero_grad()
        return flat_params(model)

    explicit = make_model()
    train(explicit, craft(explicit, max_grad_norm=0.1), batches(3))
    assert_same_bits(run(0), flat_params(explicit), "clipping off")
    assert not torch.equal(run(0.1), flat_params(explicit))


def test_plain_adamw_never_allocates_a_retention_buffer():
    model = make_model()
    opt = craft(model)
    train(model, opt, batches(2), every=0)
    assert opt._layouts[0].buffers.grads_ret == {}


def test_a_loop_that_clears_with_the_modules_zero_grad_may_capture():
    """It passes the optimizer by, so the optimizer sees by empty .grad that a new step began."""
    model, other = make_model(), make_model()
    opt, explicit = craft(model), craft(other)
    for batch in batches(4):
        loss = ret_loss(model, batch)
        loss.backward()
        opt.capture_retention(loss)
        task_loss(model, batch).backward()
        opt.step()
        model.zero_grad()
    train(other, explicit, batches(4))
    assert_same_bits(flat_params(model), flat_params(other), "capture_retention")
    task_loss(model, batches(1)[0]).backward()
    ret_loss(model, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match="gradients of 2 backward passes"):
        opt.capture_retention(1.0)


def test_a_replay_is_refused_where_nothing_can_have_been_captured():
    model = make_model()
    opt = craft(model)
    with pytest.raises(RuntimeError, match="Triton backend on one CUDA device"):
        opt.prepare_replay()
