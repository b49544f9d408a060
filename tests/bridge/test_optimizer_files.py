"""λ and the ε clock through LeRobot's own optimizer files."""

import torch
from lerobot.optim.optimizers import load_optimizer_state, save_optimizer_state

from craft_opt import CraftConfig
from tests.optimizer.models import batches, craft, flat_params, make_model, train
from tests.support.asserts import assert_same_bits

CONFIG = CraftConfig(lambda_lr=0.3, epsilon_start=0.5, epsilon_end=0.1, epsilon_decay_steps=6)


def test_lerobots_files_carry_the_whole_state(tmp_path):
    data = batches(6)
    straight, model = make_model(), make_model()
    reference, first = craft(straight, config=CONFIG), craft(model, config=CONFIG)
    train(straight, reference, data)
    train(model, first, data[:3])
    save_optimizer_state(first, tmp_path)
    second = load_optimizer_state(craft(model, config=CONFIG), tmp_path)
    train(model, second, data[3:])
    assert_same_bits(flat_params(model), flat_params(straight), "parameters")
    ours, theirs = second.state_dict()["state"][0]["craft_dual"], reference.state_dict()["state"][0]["craft_dual"]
    for name in ("lam", "t", "skipped"):
        assert_same_bits(ours[name], theirs[name], name)
    assert ours["lam"].item() != 1.0


def test_lerobots_files_of_adamw_load_and_start_the_multiplier_afresh(tmp_path):
    model = make_model()
    adamw = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    adamw.step()
    save_optimizer_state(adamw, tmp_path)
    opt = load_optimizer_state(craft(model), tmp_path)
    first = next(model.parameters())
    assert_same_bits(opt.state[first]["exp_avg"], adamw.state[first]["exp_avg"], "exp_avg")
    assert opt.state_dict()["state"][0]["craft_dual"]["lam"].item() == 1.0
