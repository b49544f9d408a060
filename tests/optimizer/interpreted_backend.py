"""Run in a process with TRITON_INTERPRET=1: CraftOptimizer on the Triton kernel against the torch backend."""

import copy
import itertools
import sys

import torch

from craft_opt import CraftConfig, CraftOptimizer
from tests.optimizer.models import batches, ret_loss, task_loss
from tests.support.asserts import assert_norm_close
from tests.support.tolerances import ADAMW_NORM


class Mixed(torch.nn.Module):
    """fp32 and bf16 parameters, odd sizes, a frozen one and one that only retention reaches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(10, 7)
        self.gain = torch.nn.Parameter(torch.randn(7).bfloat16())
        self.frozen = torch.nn.Parameter(torch.ones(7), requires_grad=False)
        self.only_ret = torch.nn.Parameter(torch.ones(7))
        self.sliced = torch.nn.Parameter(torch.randn(7, 4)[:, ::2])

    def forward(self, x):
        return torch.tanh(self.body(x)) * self.gain.float() * self.frozen + self.sliced.sum(dim=1)


def groups(model):
    return [
        {"params": [model.body.weight, model.frozen], "lr": 1e-2, "weight_decay": 0.1},
        {"params": [model.body.bias, model.gain, model.only_ret, model.sliced], "betas": (0.8, 0.9), "maximize": True},
    ]


def run(backend, config, amsgrad, every, amp, poison):
    model = Mixed()
    opt = CraftOptimizer(groups(model), config=config, backend=backend, amsgrad=amsgrad, total_steps=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=amp)
    log = []
    late = torch.nn.Parameter(torch.ones(5))
    for i, batch in enumerate(batches(4)):
        if i == 2:
            # The buffers are laid out afresh: settings, moments and λ must come along.
            opt.add_param_group({"params": [late], "lr": 1e-2})
        if i % every == 0:
            loss = ret_loss(model, batch) + model.only_ret.square().sum()
            with opt.retention(loss):
                scaler.scale(loss).backward()
        scaler.scale(task_loss(model, batch) + (late.square().sum() if i >= 2 else 0.0)).backward()
        if poison and i == 1:
            model.body.bias.grad[2] = torch.nan
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        log.append(opt.metrics().as_floats())
    return model, opt, log


def main():
    cases = itertools.product(("weighted", "equal", "task_priority"), (False, True))
    for i, (mode, amsgrad) in enumerate(cases):
        schedule = ("linear", "cosine", "exponential")[i % 3]
        config = CraftConfig(projection_mode=mode, epsilon_schedule=schedule, lambda_lr=0.2, conflict_threshold=0.2)
        arguments = (config, amsgrad, 1 + i % 2, i % 3 == 1, i % 3 == 2)
        ours, opt, log = run("triton", *arguments)
        theirs, reference, expected = run("torch", *arguments)
        for found, wanted in zip(log, expected, strict=True):
            for name, value in wanted.items():
                close = abs(found[name] - value) <= 1e-5 * max(1.0, abs(value)) or (value != value != found[name])
                assert close, f"case {i}: {name} is {found[name]!r}, expected {value!r}"
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            # bf16: both round the same fp32 update once, but that update may differ in its last bits.
            tolerance = 2.0**-8 if p.dtype == torch.bfloat16 else ADAMW_NORM
            assert_norm_close(p.detach(), q.detach(), tolerance, f"case {i}: {name}")
        again = copy.deepcopy(opt)
        again.load_state_dict(opt.state_dict())
        saved, wanted = opt.state_dict()["state"], reference.state_dict()["state"]
        assert saved.keys() == wanted.keys()
        for key, entry in wanted.items():
            assert torch.equal(saved[key]["step"], entry["step"]), f"case {i}: step of {key}"
            assert_norm_close(saved[key]["exp_avg"], entry["exp_avg"], 1e-5, f"case {i}: exp_avg of {key}")
    print("backends agree")


if __name__ == "__main__":
    sys.exit(main())
