"""Small models and loops shared by the optimizer's tests."""

import torch
from torch import nn

from craft_opt import CraftOptimizer


def make_model(seed=0, dtype=torch.float32, width=24):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.LayerNorm(width), nn.Linear(width, 3)).to(dtype)


def batches(steps, seed=0, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, 10, generator=gen).to(dtype), torch.randn(8, 10, generator=gen).to(dtype)) for _ in range(steps)
    ]


def task_loss(model, batch):
    return (model(batch[0]) - 1.0).square().mean()


def ret_loss(model, batch):
    return (model(batch[1]) + 0.5).square().mean()


def craft(model, **kwargs):
    kwargs.setdefault("lr", 1e-2)
    return CraftOptimizer(model.parameters(), backend="auto", **kwargs)


def train(model, opt, data, every=1):
    """The explicit loop: retention where due, then the task, then the step."""
    for i, batch in enumerate(data):
        if every and i % every == 0:
            loss = ret_loss(model, batch)
            with opt.retention(loss):
                loss.backward()
        task_loss(model, batch).backward()
        opt.step()
        opt.zero_grad()


def flat_params(model):
    return torch.cat([p.detach().reshape(-1).float() for p in model.parameters()])
