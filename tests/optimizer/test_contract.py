"""Arguments, GradScaler, devices and what is refused."""

import gc
import logging
import weakref

import pytest
import torch

from craft_opt import CraftConfig, CraftOptimizer
from tests.optimizer.models import batches, craft, flat_params, make_model, ret_loss, task_loss
from tests.support.asserts import assert_norm_close


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"lr": torch.ones(2)}, "1-element"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\]"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\]"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0, or None"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm"),
        ({"backend": "cuda"}, "auto, triton, numba, torch"),
        ({"backend": "triton"}, "needs Triton and a CUDA device"),
        ({"total_steps": 0}, "total_steps"),
    ],
)
def test_bad_arguments_are_refused(kwargs, match):
    model = make_model()
    with pytest.raises(ValueError, match=match):
        opt = CraftOptimizer(model.parameters(), **kwargs)
        task_loss(model, batches(1)[0]).backward()
        opt.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_unsupported_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="fp32, bf16 or fp16"):
        CraftOptimizer([torch.nn.Parameter(torch.ones(3, dtype=dtype))])


def test_a_refused_group_is_not_added():
    model = make_model()
    opt = craft(model)
    with pytest.raises(ValueError, match="weight_decay"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": -1.0})
    assert len(opt.param_groups) == 1


def test_sparse_gradients_are_refused():
    embed = torch.nn.Embedding(5, 3, sparse=True)
    opt = CraftOptimizer(embed.parameters(), backend="torch")
    embed(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        opt.step()


def test_auto_says_once_what_it_chose(caplog, cpu_backend):
    model = make_model()
    opt = CraftOptimizer(model.parameters())
    with caplog.at_level(logging.INFO, logger="craft_opt"):
        for batch in batches(3):
            task_loss(model, batch).backward()
            opt.step()
            opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    assert [r.message for r in caplog.records] == [f"CraftOptimizer: backend {cpu_backend} for cpu"]


def amp_run(enabled):
    model = make_model()
    opt = craft(model, config=CraftConfig(lambda_lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
    for batch in batches(4):
        loss = ret_loss(model, batch)
        with opt.retention(loss):
            scaler.scale(loss).backward()
        scaler.scale(task_loss(model, batch)).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    return flat_params(model), opt.metrics().as_floats()


def test_grad_scaler_unscales_both_gradients():
    plain, plain_metrics = amp_run(False)
    scaled, metrics = amp_run(True)
    # A power of two as scale: only the roundings of the division inside AdamW differ.
    assert_norm_close(scaled, plain, 1e-6, "scaled")
    assert metrics["grad_norm"] == pytest.approx(plain_metrics["grad_norm"], rel=1e-5)
    assert metrics["dot"] == pytest.approx(plain_metrics["dot"], rel=1e-5)


def test_grad_scaler_overflow_skips_and_backs_off():
    model = make_model()
    opt = craft(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = flat_params(model)
    scaler.scale(task_loss(model, batches(1)[0])).backward()
    next(model.parameters()).grad.view(-1)[0] = torch.inf
    scaler.step(opt)
    scaler.update()
    assert opt.metrics().skipped.item()
    assert torch.equal(flat_params(model), before)
    assert scaler.get_scale() == 512.0


def test_unscaling_outside_is_refused_while_a_retention_gradient_is_pending():
    model = make_model()
    opt = craft(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    batch = batches(1)[0]
    loss = ret_loss(model, batch)
    with opt.retention(loss):
        scaler.scale(loss).backward()
    scaler.scale(task_loss(model, batch)).backward()
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match="Leave unscale_ out"):
        scaler.step(opt)


def test_step_counts_as_an_in_place_change_for_autograd():
    w = torch.nn.Parameter(torch.ones(3))
    opt = CraftOptimizer([w], backend="torch")
    saved = (w * w).sum()
    w.grad = torch.ones(3)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_the_optimizer_is_freed_with_its_last_reference_and_unhooks_the_model():
    model = make_model()
    opt = craft(model)
    ref = weakref.ref(opt)
    del opt
    gc.collect()
    assert ref() is None
    assert not next(model.parameters())._post_accumulate_grad_hooks


def test_metrics_are_copies():
    model = make_model()
    opt = craft(model)
    first = None
    for batch in batches(2):
        loss = ret_loss(model, batch)
        with opt.retention(loss):
            loss.backward()
        task_loss(model, batch).backward()
        opt.step()
        opt.zero_grad()
        if first is None:
            first = opt.metrics()
            value = first.grad_norm.item()
    assert first.grad_norm.item() == value
    assert opt.metrics().grad_norm.item() != value
