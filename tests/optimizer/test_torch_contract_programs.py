"""Random programs on an optimizer: everything that the other contract tests do once, in any order, beside AdamW."""

import copy
import random

import pytest
import torch
from torch.nn import Parameter

from craft_opt import CraftOptimizer
from tests.optimizer.torch_contract import assert_close, wide_copy
from tests.support.tolerances import ADAMW_NORM

SHAPES = [(), (1,), (5,), (3, 4), (4, 4), (2, 3, 2), (0,), (70,)]


class Program:
    """CraftOptimizer on parameters of every form and AdamW on fp32 copies; each method is one thing to do to both."""

    def __init__(self, seed, dtype):
        self.rng, self.dtype = random.Random(seed), dtype
        torch.manual_seed(seed)
        self.options = {"lr": 1e-2, "weight_decay": self.rng.choice([0.0, 0.1]), "amsgrad": self.rng.random() < 0.3}
        params = [self.parameter() for _ in range(self.rng.randint(1, 4))]
        self.pairs = list(zip(params, wide_copy(params), strict=True))
        self.ours = CraftOptimizer(params, max_grad_norm=None, **self.options)
        self.theirs = torch.optim.AdamW([q for _, q in self.pairs], foreach=False, **self.options)

    def parameter(self):
        value = torch.randn(self.rng.choice(SHAPES)).to(self.dtype)
        if value.dim() == 2 and self.rng.random() < 0.5:
            value = self.rng.choice([value.t(), torch.cat([value, value], dim=1)[:, ::2]])
        return Parameter(value)

    @property
    def both(self):
        return self.ours, self.theirs

    def step(self):
        for p, q in self.pairs:
            there = p.requires_grad and self.rng.random() < 0.75
            p.grad = torch.randn(p.shape).to(p.dtype) if there else None
            q.grad = p.grad.float() if there else None
        for opt in self.both:
            opt.step()
        for p, q in self.pairs:
            if p.dtype is torch.bfloat16:
                assert_close(p, q, "bf16 parameter")
                with torch.no_grad():
                    q.copy_(p)
            else:
                # Relative to the parameter and to its update, which is of the order of lr, here at most 0.1.
                bound = ADAMW_NORM * (q.detach().norm() + 0.1 * q.numel() ** 0.5)
                assert (p.detach() - q.detach()).norm() <= bound
            found, expected = self.ours.state.get(p) or {}, self.theirs.state.get(q) or {}
            if expected:
                assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.allclose(found[name].reshape(value.shape), value, rtol=1e-4, atol=1e-7), name

    def freeze_or_thaw(self):
        pair = self.rng.choice(self.pairs)
        thaw = not pair[0].requires_grad
        for p in pair:
            p.requires_grad_(thaw)
            p.grad = None

    def add_a_group(self):
        p = self.parameter()
        self.pairs.append((p, wide_copy([p])[0]))
        settings = {"lr": self.rng.choice([1e-2, 0.1]), "betas": (0.5, 0.7), "maximize": self.rng.random() < 0.5}
        for opt, one in zip(self.both, self.pairs[-1], strict=True):
            opt.add_param_group({"params": [one], **settings})

    def swap_data(self):
        change = self.rng.choice(
            [
                lambda d: d.clone(),
                lambda d: d.t() if d.dim() == 2 and d.shape[0] == d.shape[1] else d,
                lambda d: d * 2,
                lambda d: d.contiguous(),
            ]
        )
        for p in self.rng.choice(self.pairs):
            p.data = change(p.data)

    def save_and_load(self):
        state = copy.deepcopy(self.ours.state_dict())
        groups = [{**group, "params": list(group["params"])} for group in self.ours.param_groups]
        self.ours = CraftOptimizer(groups, max_grad_norm=None, **self.options)
        self.ours.load_state_dict(state)

    def load_from_adamw(self):
        self.ours.load_state_dict(copy.deepcopy(self.theirs.state_dict()))

    def empty_an_entry(self):
        for opt, p in zip(self.both, self.rng.choice(self.pairs), strict=True):
            opt.state.pop(p, None)

    def look_and_save(self):
        _ = self.ours.state[self.rng.choice(self.pairs)[0]]
        self.ours.state_dict()

    def change_lr(self):
        i, lr = self.rng.randrange(len(self.ours.param_groups)), self.rng.choice([1e-3, 0.05])
        for opt in self.both:
            opt.param_groups[i]["lr"] = lr

    def deepcopy(self):
        self.ours, params = copy.deepcopy((self.ours, [p for p, _ in self.pairs]))
        self.pairs = [(p, q) for p, (_, q) in zip(params, self.pairs, strict=True)]


ACTIONS = [name for name in vars(Program) if name not in ("parameter", "both", "step") and not name.startswith("_")]


def run(seed, dtype):
    program, done = Program(seed, dtype), []
    for _ in range(25):
        done.append("step" if program.rng.random() < 0.4 else program.rng.choice(ACTIONS))
        try:
            getattr(program, done[-1])()
        except Exception as error:
            raise AssertionError(f"seed {seed}, {dtype}: {error!r} after {', '.join(done)}") from error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_programs(dtype):
    for seed in range(12):
        run(seed, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_random_programs(dtype):
    for seed in range(100, 600):
        run(seed, dtype)
