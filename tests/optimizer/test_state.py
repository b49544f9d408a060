"""state_dict in both directions with torch's AdamW, through torch.save, safetensors, copy and pickle."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from craft_opt import CraftConfig, CraftOptimizer
from tests.optimizer.models import batches, craft, flat_params, make_model, task_loss, train
from tests.support.asserts import assert_norm_close, assert_same_bits
from tests.support.tolerances import ADAMW_NORM

CONFIG = CraftConfig(lambda_lr=0.2, epsilon_start=0.5, epsilon_end=0.1, epsilon_decay_steps=10)


def plain_steps(model, opt, data):
    for batch in data:
        task_loss(model, batch).backward()
        opt.step()
        opt.zero_grad()


def trained(steps=3, **kwargs):
    model = make_model()
    opt = craft(model, config=CONFIG, **kwargs)
    train(model, opt, batches(steps))
    return model, opt


def through_torch_save(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def through_safetensors(state, tmp_path):
    """What LeRobot does: a flat safetensors file for state, keys joined by '/'."""
    flat = {}
    for key, entry in state["state"].items():
        for name, value in entry.items():
            if isinstance(value, dict):
                flat.update({f"{key}/{name}/{k}": v for k, v in value.items()})
            else:
                flat[f"{key}/{name}"] = value
    save_file(flat, tmp_path / "optimizer.safetensors")
    back = {}
    for path, value in load_file(tmp_path / "optimizer.safetensors").items():
        key, *rest = path.split("/")
        entry = back.setdefault(int(key), {})
        for part in rest[:-1]:
            entry = entry.setdefault(part, {})
        entry[rest[-1]] = value
    return {"state": back, "param_groups": state["param_groups"]}


@pytest.mark.parametrize("path", ["direct", "torch.save", "safetensors"])
def test_4_steps_equal_2_plus_save_plus_load_plus_2(path, tmp_path):
    data = batches(4)
    straight = make_model()
    opt = craft(straight, config=CONFIG)
    train(straight, opt, data)

    model = make_model()
    first = craft(model, config=CONFIG)
    train(model, first, data[:2])
    state = first.state_dict()
    if path == "torch.save":
        state = through_torch_save(state)
    elif path == "safetensors":
        state = through_safetensors(state, tmp_path)
    second = craft(model, config=CONFIG)
    second.load_state_dict(state)
    assert second.attempted_steps == 2
    train(model, second, data[2:])
    assert_same_bits(flat_params(model), flat_params(straight), "parameters")
    for a, b in zip(second.state_dict()["state"].values(), opt.state_dict()["state"].values(), strict=True):
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert_same_bits(a[name], b[name], name)
    for name in ("lam", "t", "skipped"):
        assert_same_bits(
            second.state_dict()["state"][0]["craft_dual"][name], opt.state_dict()["state"][0]["craft_dual"][name], name
        )


def test_group_keys_and_state_types_are_those_of_adamw():
    _model, opt = trained()
    other = make_model()
    reference = torch.optim.AdamW(other.parameters())
    plain_steps(other, reference, batches(1))
    ours, theirs = opt.state_dict(), reference.state_dict()
    assert list(ours["param_groups"][0]) == list(theirs["param_groups"][0])
    for key, value in theirs["param_groups"][0].items():
        assert type(ours["param_groups"][0][key]) is type(value), key
    for name, value in theirs["state"][1].items():
        found = ours["state"][1][name]
        assert (found.dtype, found.device, found.shape) == (value.dtype, value.device, value.shape), name
    assert set(ours["state"][1]) == set(theirs["state"][1])
    assert set(ours["state"][0]) == {*theirs["state"][0], "craft_dual"}


def test_an_adamw_checkpoint_continues_here():
    model, other = make_model(), make_model()
    reference = torch.optim.AdamW(other.parameters(), lr=1e-2)
    plain_steps(other, reference, batches(5))
    model.load_state_dict(other.state_dict())
    opt = craft(model, max_grad_norm=None)
    opt.load_state_dict(copy.deepcopy(reference.state_dict()))
    plain_steps(model, opt, batches(5, seed=1))
    plain_steps(other, reference, batches(5, seed=1))
    assert_norm_close(flat_params(model), flat_params(other), ADAMW_NORM, "from AdamW")
    assert opt.metrics().lam_after.item() == 1.0


def test_our_checkpoint_continues_in_adamw():
    model, opt = trained(5, max_grad_norm=None)
    other = make_model()
    other.load_state_dict(model.state_dict())
    reference = torch.optim.AdamW(other.parameters(), lr=1e-2)
    reference.load_state_dict(through_torch_save(opt.state_dict()))
    plain_steps(model, opt, batches(5, seed=1))
    plain_steps(other, reference, batches(5, seed=1))
    assert_norm_close(flat_params(other), flat_params(model), ADAMW_NORM, "into AdamW")


def test_a_checkpoint_before_the_first_step_loads_into_adamw_and_back():
    model = make_model()
    opt = craft(model)
    state = opt.state_dict()
    reference = torch.optim.AdamW(make_model().parameters())
    reference.load_state_dict(copy.deepcopy(state))
    again = craft(make_model())
    again.load_state_dict(state)
    assert again.attempted_steps == 0


def test_bf16_moments_stay_fp32_through_load():
    torch.manual_seed(0)
    model = make_model(dtype=torch.bfloat16)
    opt = craft(model)
    train(model, opt, batches(3, dtype=torch.bfloat16))
    fresh = craft(model)
    fresh.load_state_dict(through_torch_save(opt.state_dict()))
    for p in model.parameters():
        assert_same_bits(fresh.state[p]["exp_avg"], opt.state[p]["exp_avg"], "exp_avg")
        assert fresh.state[p]["exp_avg"].dtype == torch.float32


def test_bf16_moments_of_torch_are_widened():
    model = make_model(dtype=torch.bfloat16)
    reference = torch.optim.AdamW(model.parameters())
    plain_steps(model, reference, batches(2, dtype=torch.bfloat16))
    opt = craft(model)
    opt.load_state_dict(copy.deepcopy(reference.state_dict()))
    for p in model.parameters():
        assert opt.state[p]["exp_avg"].dtype == torch.float32
        assert torch.equal(opt.state[p]["exp_avg"].bfloat16(), reference.state[p]["exp_avg"])


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_alike(how):
    model, opt = trained()
    if how == "deepcopy":
        twin, twin_opt = copy.deepcopy((model, opt))
    else:
        twin, twin_opt = pickle.loads(pickle.dumps((model, opt)))
    train(model, opt, batches(3, seed=2))
    train(twin, twin_opt, batches(3, seed=2))
    assert_same_bits(flat_params(twin), flat_params(model), how)
    assert twin_opt.metrics().lam_after.item() == opt.metrics().lam_after.item()
    assert twin_opt.attempted_steps == opt.attempted_steps


def changed(state, key, value):
    state = copy.deepcopy(state)
    entry = state["state"][0]
    if value is None:
        del entry[key]
    else:
        entry[key] = value
    return state


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("exp_avg", None, "no 'exp_avg'"),
        ("step", None, "no 'step'"),
        ("exp_avg_sq", torch.zeros(3), r"shape \(3,\)"),
        ("craft_dual", {"lam": torch.tensor(99.0), "t": torch.tensor(1), "skipped": torch.tensor(0)}, "lambda_max"),
        ("craft_dual", {"lam": torch.tensor(1.0)}, "no entry 't'"),
    ],
)
def test_foreign_state_is_refused_and_changes_nothing(key, value, match):
    model, opt = trained()
    before = opt.state_dict()
    bad = changed(before, key, value)
    with pytest.raises(ValueError, match=match):
        opt.load_state_dict(bad)
    for a, b in zip(before["state"].values(), opt.state_dict()["state"].values(), strict=True):
        assert_same_bits(a["exp_avg"], b["exp_avg"], "exp_avg")
    train(model, opt, batches(1))


def test_load_hooks_see_and_change_the_state():
    _model, opt = trained()
    state = opt.state_dict()
    other = craft(make_model(), config=CONFIG)

    def halve(_, incoming):
        incoming = copy.deepcopy(incoming)
        incoming["state"][0]["exp_avg"] *= 0.5
        return incoming

    other.register_load_state_dict_pre_hook(halve)
    other.load_state_dict(state)
    first = other.param_groups[0]["params"][0]
    torch.testing.assert_close(other.state[first]["exp_avg"], 0.5 * state["state"][0]["exp_avg"])


def test_loading_drops_a_pending_retention_gradient():
    model, opt = trained()
    state = opt.state_dict()
    with opt.retention(1.0):
        task_loss(model, batches(1)[0]).backward()
    opt.load_state_dict(state)
    plain_steps(model, opt, batches(1))
    assert opt.metrics().retention_loss.isnan()


def test_step_hooks_run():
    model = make_model()
    opt = CraftOptimizer(model.parameters(), backend="auto")
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    plain_steps(model, opt, batches(1))
    assert calls == ["pre", "post"]
