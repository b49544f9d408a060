"""bf16 parameters whose updates are smaller than half a unit in the last place."""

import copy

import pytest
import torch

from craft_opt import CraftConfig
from tests.optimizer.models import batches, craft, flat_params, make_model, train
from tests.support.asserts import assert_same_bits

LR = 2.5e-5


def run(rounding, seed=0, steps=60, dtype=torch.bfloat16, lr=LR):
    model = make_model(dtype=dtype, width=64)
    config = CraftConfig(bf16_rounding=rounding, rounding_seed=seed, use_grad_projection=False, initial_lambda=0.1)
    opt = craft(model, config=config, lr=lr, max_grad_norm=None)
    train(model, opt, batches(steps, dtype=dtype))
    return flat_params(model)


def test_stochastic_rounding_moves_what_nearest_rounding_leaves_in_place():
    start = flat_params(make_model(dtype=torch.bfloat16, width=64))
    stuck = {name: (run(name) == start).float().mean().item() for name in ("nearest", "stochastic")}
    assert stuck["nearest"] > 0.5
    assert stuck["stochastic"] < 0.5 * stuck["nearest"]


def test_on_average_the_weights_go_where_fp32_goes():
    """Mean over seeds of a sum of rounding errors, each at most one unit in the last place with mean 0.

    60 steps and 12 seeds: a weight w of about 0.25 has units of 2^-10, so the mean of its error has a standard
    deviation of at most 2^-10 sqrt(60 / 12) / 2, 1.1e-3, as far as the weights move (60 × 2.5e-5); over 5,000 of them
    it is 70 times less.
    """
    start = make_model(dtype=torch.bfloat16, width=64)
    wide = make_model(dtype=torch.float32, width=64)
    wide.load_state_dict(start.state_dict())
    first = flat_params(wide).clone()
    config = CraftConfig(use_grad_projection=False, initial_lambda=0.1)
    train(wide, craft(wide, config=config, lr=LR, max_grad_norm=None), batches(60))
    moved = flat_params(wide) - first
    mean = torch.stack([run("stochastic", seed) for seed in range(12)]).mean(dim=0) - first
    # Along the direction that fp32 takes: 1 if on average nothing is lost, 0.3 or so to nearest.
    along = {"stochastic": float(mean @ moved / (moved @ moved))}
    along["nearest"] = float((run("nearest") - first) @ moved / (moved @ moved))
    assert abs(along["stochastic"] - 1.0) < 0.1, along
    assert along["nearest"] < 0.5, along


def test_a_resumed_run_rounds_alike_and_another_seed_does_not():
    data = batches(6, dtype=torch.bfloat16)
    config = CraftConfig(bf16_rounding="stochastic")
    whole, model = make_model(dtype=torch.bfloat16), make_model(dtype=torch.bfloat16)
    train(whole, craft(whole, config=config, lr=LR), data)
    opt = craft(model, config=config, lr=LR)
    train(model, opt, data[:3])
    resumed = craft(model, config=config, lr=LR)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(model, resumed, data[3:])
    assert_same_bits(flat_params(model), flat_params(whole), "resumed")
    assert not torch.equal(run("stochastic", 0), run("stochastic", 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_round_as_ever(dtype):
    assert_same_bits(run("stochastic", dtype=dtype, lr=1e-3), run("nearest", dtype=dtype, lr=1e-3), str(dtype))
