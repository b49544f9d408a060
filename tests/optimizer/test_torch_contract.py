"""PyTorch's own optimizer tests for AdamW, case by case and by name, on CraftOptimizer.

The constructor arguments, the arguments that must fail and the schedulers are torch's own
(``torch.testing._internal.common_optimizers``); torch ships no test_optim.py, so the bodies are written here after the
names and intents of its cases. docs/optimizer-contract.md lists every case, deviations explained;
test_torch_contract_docs.py holds it to this file.
"""

import copy
import io
import itertools

import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from craft_opt import CraftOptimizer
from tests.optimizer.models import flat_params
from tests.optimizer.torch_contract import (
    assert_close,
    lockstep,
    optim_info,
    optim_inputs,
    reference_kwargs,
    torch_testing,
    wide_copy,
)
from tests.support.asserts import assert_norm_close, assert_same_bits
from tests.support.tolerances import ADAMW_NORM


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def linear(contiguous=True):
    """A weight, a bias and an input, and the loss of one on the other."""
    if contiguous:
        weight, bias = Parameter(torch.randn(10, 5)), Parameter(torch.randn(10))
    else:
        weight, bias = Parameter(torch.randn(10, 5, 2)[..., 0]), Parameter(torch.randn(10, 2)[..., 0])
    x = torch.randn(5)

    def loss():
        return (weight.mv(x) + bias).square().sum()

    return weight, bias, loss


def descend(opt, loss, steps=20, schedulers=()):
    """Train; return the loss before and after."""
    first = loss().item()
    for _ in range(steps):
        opt.zero_grad()
        value = loss()
        value.backward()
        opt.step()
        for scheduler in schedulers:
            scheduler.step(value.detach()) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
    return first, loss().item()


def assert_right_way(kwargs, losses):
    first, last = losses
    assert last > first if kwargs.get("maximize") else last < first, kwargs


def conv_model():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1, stride=2), torch.nn.BatchNorm2d(2))
    x = torch.rand(1, 4, 16, 16)
    return model, lambda: model(x).sum()


def sigmoid_model(dtype=torch.float32):
    """A small network, and a parameter without dimensions that the loss does not see."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid())
    model.register_parameter("extra", Parameter(torch.rand(())))
    x = torch.arange(1, 7).mul(0.1).reshape(3, 2).to(dtype)
    return model.to(dtype), lambda: model(x).sum()


def test_optim_infos_do_not_specify_global_cliquey_kwargs():
    for one in optim_info().optim_inputs_func("cuda"):
        assert not {"foreach", "fused", "differentiable"} & one.kwargs.keys()


# What torch's own failing inputs fail with here: the type is torch's, the words are ours where ours say more.
ERRORS = {
    "invalid param type": "iterable of Tensors or dicts",
    "a param group cannot have duplicate parameters": "duplicate parameters",
    "duplicate parameters should not occur across param groups either": "more than one parameter group",
    "Tensor lr must be 1-element": "lr must be a number or a 1-element tensor",
    "all optimizer params should be with/without names": "Some param names are missing",
    "all optimizer param groups should be with/without names.": "cannot add param group with names",
    "beta1 should be between 0 and 1": r"betas\[0\] must be in \[0, 1\), got 1.0",
    "weight_decay should > 0": "weight_decay must be at least 0, got -1",
}
# Restrictions of torch's foreach implementation, which is not used here.
ACCEPTED = {
    "lr as Tensor doesn't work with foreach & not capturable",
    "betas must be either both floats or both Tensors",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
}


def test_errors():
    seen = set()
    for error in optim_info().optim_error_inputs_func("cpu", torch.float32):
        case = error.optimizer_error_input
        seen.add(case.desc)
        if case.desc in ACCEPTED:
            p = Parameter(torch.ones(2))
            opt = CraftOptimizer([p], **case.kwargs)
            p.grad = torch.ones(2)
            opt.step()
            assert (p < 1).all(), case.desc
        elif issubclass(error.error_type, Warning):
            with pytest.warns(error.error_type, match=ERRORS[case.desc]):
                CraftOptimizer(case.params, **case.kwargs)
        else:
            with pytest.raises(error.error_type, match=ERRORS[case.desc]):
                CraftOptimizer(case.params, **case.kwargs)
    assert seen == ERRORS.keys() | ACCEPTED
    # torch's two further inputs want a CUDA device for their tensor only.
    for kwargs, kind in (({"foreach": True, "fused": True}, RuntimeError), ({"differentiable": True}, ValueError)):
        with pytest.raises(kind, match=next(iter(kwargs))):
            CraftOptimizer([Parameter(torch.ones(()))], **kwargs)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("with_lrsched", [True, False])
def test_forloop_goes_right_direction(contiguous, with_lrsched):
    for constructors in optim_info().scheduler_inputs if with_lrsched else [()]:
        for kwargs in optim_inputs(foreach=False, fused=False)[::3]:
            weight, bias, loss = linear(contiguous)
            opt = CraftOptimizer([weight, bias], **kwargs)
            assert_right_way(kwargs, descend(opt, loss, schedulers=[make(opt) for make in constructors]))


def test_param_group_with_lrscheduler_goes_right_direction():
    for constructors in optim_info().scheduler_inputs:
        weight, bias, loss = linear()
        opt = CraftOptimizer([{"params": [weight]}, {"params": [bias], "lr": 0.01}])
        assert_right_way({}, descend(opt, loss, schedulers=[make(opt) for make in constructors]))


@pytest.mark.parametrize("num_dim", [0, 1, 2])
def test_tensor_lr(num_dim):
    for kwargs in optim_inputs(lr=1e-3):
        weight, bias, loss = linear()
        twin = Parameter(weight.detach().clone()), Parameter(bias.detach().clone())
        opt = CraftOptimizer([weight, bias], **kwargs)
        lr = torch.full((1,) * num_dim, 1e-3)
        other = CraftOptimizer(twin, **{**kwargs, "lr": lr})
        for step in range(5):
            opt.zero_grad()
            loss().backward()
            for p, q in zip((weight, bias), twin, strict=True):
                q.grad = p.grad.clone()
            if step == 3:
                # Changed in place, as schedulers change a tensor.
                opt.param_groups[0]["lr"] = 0.5
                lr.fill_(0.5)
            opt.step()
            other.step()
        # 1e-3 in fp32 is not 1e-3, a relative 5e-8 of an update of 1e-3.
        for p, q in zip((weight, bias), twin, strict=True):
            assert_norm_close(q.detach(), p.detach(), ADAMW_NORM, str(kwargs))


def test_rosenbrock_sparse():
    p = Parameter(torch.tensor([1.5, 1.5]))
    opt = CraftOptimizer([p])
    p.grad = torch.tensor([4.0, 0.0]).to_sparse()
    with pytest.raises(RuntimeError, match=r"dense gradients, got layout torch\.sparse_coo.*sparse=False"):
        opt.step()
    assert torch.equal(p.detach(), torch.tensor([1.5, 1.5]))
    assert opt.attempted_steps == 0


def test_complex_is_refused():
    for real in ([], [Parameter(torch.ones(2))]):
        with pytest.raises(ValueError, match=r"fp32, bf16 or fp16.*got torch.complex64 of shape \(3,\)"):
            CraftOptimizer([*real, Parameter(torch.ones(3, dtype=torch.complex64))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_matches_forloop(dtype):
    """And foreach_matches_forloop: whatever the flags say, each step is that of torch's loop, a frozen layer included.

    States too; bf16 against fp32 moments.
    """
    for kwargs in optim_inputs(max_grad_norm=None):
        model, loss = sigmoid_model(dtype)
        opt = CraftOptimizer(model.parameters(), **kwargs)
        wide = wide_copy(model.parameters())
        theirs = torch.optim.AdamW(wide, **reference_kwargs(kwargs))
        pairs = list(zip(model.parameters(), wide, strict=True))
        for i in range(7):
            if i in (3, 5):
                model[2].requires_grad_(i == 5)
            opt.zero_grad()
            if i != 2:
                loss().backward()
            if i % 2:
                model.extra.grad = torch.rand_like(model.extra)
            lockstep(pairs, opt, theirs, [p.grad for p in model.parameters()])
            for p, q in pairs:
                found, expected = opt.state[p], theirs.state[q]
                assert found.keys() == expected.keys(), (i, kwargs)
                for name, value in expected.items():
                    assert_close(found[name], value.reshape(found[name].shape), f"{name} at step {i} of {kwargs}")


@pytest.mark.parametrize("default", [torch.float64, torch.float16])
def test_set_default_dtype(default):
    """torch's set_default_dtype_works_with_foreach; here every number is the same to the bit under any default."""

    def run(kwargs):
        torch.manual_seed(0)
        params = [Parameter(torch.rand(3, 2, dtype=torch.float32)), Parameter(torch.rand((), dtype=torch.float32))]
        opt = CraftOptimizer(params, **kwargs)
        for i in range(4):
            for p in params:
                p.grad = None if i == 2 and p.dim() == 0 else torch.rand_like(p)
            if i % 2:
                with opt.retention(0.5):
                    params[0].square().sum().backward()
            opt.step()
        return [*params, *(value for state in opt.state.values() for value in state.values())], opt.metrics()

    for kwargs in optim_inputs()[::3]:
        expected, wanted = run(kwargs)
        torch.set_default_dtype(default)
        try:
            found, metrics = run(kwargs)
        finally:
            torch.set_default_dtype(torch.float32)
        for a, b in zip(found, expected, strict=True):
            assert_same_bits(a.detach(), b.detach(), str(kwargs))
        assert metrics.as_floats() == wanted.as_floats()


def test_fused_error_on_params_on_meta():
    with torch.device("meta"):
        model = torch.nn.Linear(2, 3)
    opt = CraftOptimizer(model.parameters(), fused=True)
    with torch.device("meta"):
        for p in model.parameters():
            p.grad = torch.rand_like(p)
    with pytest.raises(ValueError, match="runs on CPU and CUDA devices, got parameters on meta"):
        opt.step()
    # What to_empty() makes are new parameters: an optimizer is built after it, as for AdamW.
    model.to_empty(device="cpu")
    opt = CraftOptimizer(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    opt.step()
    assert all(opt.state[p]["step"].item() == 1 for p in model.parameters())


@pytest.mark.parametrize("no_grad_scale", [False, True])
def test_fused_does_not_step_if_foundinf(no_grad_scale):
    for kwargs in optim_inputs(fused=True, foreach=None)[::3]:
        params = [Parameter(torch.ones(1)) for _ in range(5)]
        for p in params:
            p.grad = torch.ones_like(p)
        opt = CraftOptimizer(params, **kwargs)
        opt.grad_scale = None if no_grad_scale else torch.ones(1)
        opt.found_inf = torch.ones(())
        opt.step()
        assert all(torch.equal(p.detach(), torch.ones(1)) for p in params)
        assert all(opt.state[p]["step"].item() == 0 for p in params)
        assert opt.metrics().skipped.item()
        del opt.found_inf
        opt.step()
        assert all(opt.state[p]["step"].item() == 1 and not torch.equal(p.detach(), torch.ones(1)) for p in params)


def test_param_groups_weight_decay():
    for kwargs in optim_inputs():
        weight, bias, loss = linear()
        opt = CraftOptimizer([{"params": [weight], **kwargs}, {"params": [bias], **kwargs, "weight_decay": 0.0}])
        assert_right_way(kwargs, descend(opt, loss))


def test_param_groups_lr():
    for kwargs in optim_inputs():
        kwargs.setdefault("lr", 1e-3)
        weight, bias, loss = linear()
        bystander = Parameter(torch.randn(2))
        before = bystander.detach().clone()
        opt = CraftOptimizer([{"params": [weight, bias], **kwargs}, {"params": [bystander]}], lr=1e-28)
        assert_right_way(kwargs, descend(opt, lambda loss=loss, b=bystander: loss() + 0.0 * b.sum()))
        assert torch.equal(bystander.detach(), before)


def test_step_is_noop_when_params_have_no_grad():
    for requires_grad in (False, True):
        params = [torch.randn(2, 3, requires_grad=requires_grad) for _ in range(2)]
        before = [p.detach().clone() for p in params]
        for kwargs in optim_inputs():
            opt = CraftOptimizer(params, **kwargs)
            assert opt.step(lambda: torch.tensor([1.0])).item() == 1.0
            assert all(torch.equal(p.detach(), q) for p, q in zip(params, before, strict=True))
            assert not any(opt.state.values())


def test_step_is_noop_for_zero_grads():
    for kwargs in optim_inputs(weight_decay=0.0):
        p = torch.randn(5, 1, requires_grad=True)
        before = p.detach().clone()
        opt = CraftOptimizer([p], **kwargs)
        p.grad = torch.zeros_like(p)
        opt.step(lambda: torch.tensor([1.0]))
        assert torch.equal(p.detach(), before), kwargs
        assert opt.state[p]["step"].item() == 1


def test_optimizer_can_be_printed():
    for kwargs in optim_inputs():
        opt = CraftOptimizer([Parameter(torch.randn(2, 3))], **kwargs)
        assert repr(opt).startswith("CraftOptimizer (\nParameter Group 0\n")
        assert f"fused: {kwargs['fused']}" in repr(opt)


def named(params, with_names):
    return [(f"name{i}", p) for i, p in enumerate(params)] if with_names else params


def without_names(state):
    return {
        "state": state["state"],
        "param_groups": [{k: v for k, v in g.items() if k != "param_names"} for g in state["param_groups"]],
    }


def same(a, b):
    """Whether two state dicts are equal, NaN (a mean of losses before the first) included."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        alike = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.device == b.device and a.shape == b.shape
        return alike and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    return a == b


NAMES = list(itertools.product((True, False), (True, False)))


@pytest.mark.parametrize(("named0", "named1"), NAMES)
def test_state_dict_deterministic(named0, named1):
    for kwargs in optim_inputs():
        weight, bias, loss = linear()
        x = torch.randn(5)
        opt = CraftOptimizer(named([weight, bias], named0), **kwargs)
        descend(opt, loss, steps=5)
        weight2, bias2 = Parameter(weight.detach().clone()), Parameter(bias.detach().clone())
        other = CraftOptimizer(named([weight2, bias2], named1), **kwargs)
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        descend(opt, lambda w=weight, b=bias, x=x: (w.mv(x) + b).square().sum(), steps=5)
        descend(other, lambda w=weight2, b=bias2, x=x: (w.mv(x) + b).square().sum(), steps=5)
        assert torch.equal(weight, weight2) and torch.equal(bias, bias2), kwargs
        assert same(without_names(opt.state_dict()), without_names(other.state_dict()))
        # Repeated parameters have one representation in the state dict.
        other.param_groups.extend(other.param_groups)
        repeated = without_names(other.state_dict())["param_groups"]
        assert same(repeated[-1], without_names(opt.state_dict())["param_groups"][-1])


def test_can_load_older_state_dict():
    for kwargs in optim_inputs():
        model, loss = conv_model()
        opt = CraftOptimizer(model.parameters(), **kwargs)
        descend(opt, loss, steps=3)
        old = copy.deepcopy(opt.state_dict())
        for group in old["param_groups"]:
            for flag in (*optim_info().not_og_supported_flags, "decoupled_weight_decay"):
                group.pop(flag, None)
        opt.load_state_dict(old)
        assert opt.param_groups[0].keys() == CraftOptimizer(model.parameters()).param_groups[0].keys()
        descend(opt, loss, steps=1)
        assert opt.state[next(model.parameters())]["step"].item() == 4


@pytest.mark.parametrize(("named0", "named1"), NAMES)
def test_can_load_from_to_named_state_dict(named0, named1):
    for kwargs in optim_inputs():
        model, loss = conv_model()
        opt = CraftOptimizer(model.named_parameters() if named0 else model.parameters(), **kwargs)
        descend(opt, loss, steps=3)
        other = CraftOptimizer(model.named_parameters() if named1 else model.parameters(), **kwargs)
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        descend(other, loss, steps=1)
        names = other.state_dict()["param_groups"][0].get("param_names")
        assert names == ([name for name, _ in model.named_parameters()] if named0 or named1 else None)
        assert all(other.state[p]["step"].item() == 4 for p in model.parameters())


@pytest.mark.parametrize("with_names", [True, False])
def test_save_load_equality_with_weights_only(with_names):
    for kwargs in optim_inputs():
        weight, bias, loss = linear()
        opt = CraftOptimizer(named([weight, bias], with_names), **kwargs)
        descend(opt, loss, steps=3)
        state = opt.state_dict()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        assert same(torch.load(buffer, weights_only=True), state)


def test_load_nontensor_step():
    for kwargs in optim_inputs():
        params = [Parameter(torch.randn(2, 3)) for _ in range(2)]
        opt = CraftOptimizer(params, **kwargs)
        for p in params:
            p.grad = torch.rand_like(p)
        for _ in range(3):
            opt.step()
        state = copy.deepcopy(opt.state_dict())
        for entry in state["state"].values():
            entry["step"] = entry["step"].item()
        opt.load_state_dict(state)
        opt.step()
        assert all(opt.state[p]["step"].item() == 4 and opt.state[p]["step"].dtype is torch.float32 for p in params)


def mark_state(opt):
    opt.state["test"] = 1


def take_mark(_, state):
    state["marked"] = state["state"].pop("test", None) is not None
    return state


def one_parameter(**kwargs):
    return CraftOptimizer([torch.rand(2, 3, requires_grad=True)], **kwargs)


def test_state_dict_pre_hook():
    for kwargs in optim_inputs():
        opt = one_parameter(**kwargs)
        opt.register_state_dict_pre_hook(mark_state)
        assert opt.state_dict()["state"]["test"] == 1


def test_state_dict_post_hook():
    for kwargs in optim_inputs():
        opt = one_parameter(**kwargs)
        opt.register_state_dict_post_hook(take_mark)
        assert opt.state_dict()["marked"] is False


def test_state_dict_pre_post_hook():
    for kwargs in optim_inputs():
        opt = one_parameter(**kwargs)
        opt.register_state_dict_pre_hook(mark_state)
        opt.register_state_dict_post_hook(take_mark)
        state = opt.state_dict()
        assert state["marked"] is True
        assert "test" not in state["state"]


def lr_two(_, state):
    state["param_groups"][0]["lr"] = 0.002


def lr_three_in_a_copy(_, state):
    state = copy.deepcopy(state)
    state["param_groups"][0]["lr"] = 0.003
    return state


def note_load(opt):
    opt.state["saw_three"] = bool(opt.param_groups[0]["lr"] == 0.003)
    opt.state["loaded"] = True


def test_load_state_dict_pre_hook_and_prepend():
    for kwargs in optim_inputs():
        opt = one_parameter(**kwargs)
        state = opt.state_dict()
        opt.register_load_state_dict_pre_hook(lr_two)
        opt.load_state_dict(state)
        assert opt.param_groups[0]["lr"] == 0.002
        # Prepended, so the first hook has the last word.
        opt.register_load_state_dict_pre_hook(lr_three_in_a_copy, prepend=True)
        opt.load_state_dict(state)
        assert opt.param_groups[0]["lr"] == 0.002


def test_load_state_dict_post_hook():
    for kwargs in optim_inputs():
        opt = one_parameter(**kwargs)
        opt.register_load_state_dict_post_hook(note_load)
        opt.load_state_dict(opt.state_dict())
        assert opt.state["saw_three"] is False
        assert opt.state["loaded"] is True


def test_load_state_dict_pre_post_hook():
    for kwargs in optim_inputs():
        opt = one_parameter(**kwargs)
        opt.register_load_state_dict_pre_hook(lr_three_in_a_copy)
        opt.register_load_state_dict_post_hook(note_load)
        opt.load_state_dict(opt.state_dict())
        assert opt.state["saw_three"] is True
        assert opt.state["loaded"] is True


def test_entries_of_hooks_pass_through_a_load():
    """What a hook put into ``state`` beside the parameters is saved, loaded and stepped over, as with AdamW."""
    opt = one_parameter()
    p = opt.param_groups[0]["params"][0]
    mark_state(opt)
    state = copy.deepcopy(opt.state_dict())
    other = CraftOptimizer([p])
    other.load_state_dict(state)
    p.grad = torch.ones_like(p)
    other.step()
    assert other.state["test"] == 1
    assert other.state_dict()["state"]["test"] == 1


@pytest.mark.parametrize("when", ["pre", "post"])
def test_step_hook(when):
    """torch's step_pre_hook and step_post_hook."""
    for kwargs in optim_inputs():
        opt = CraftOptimizer([torch.ones(2)], **kwargs)
        calls = []
        handle = getattr(opt, f"register_step_{when}_hook")(lambda *args, calls=calls: calls.append(args[0]))
        opt.step()
        opt.step()
        handle.remove()
        opt.step()
        assert calls == [opt, opt]


def test_step_all_hooks():
    for kwargs in optim_inputs():
        params = [torch.ones(2)]
        opt, other = CraftOptimizer(params, **kwargs), torch.optim.SGD(params)
        calls = []
        handles = [
            register_optimizer_step_pre_hook(lambda *_, c=calls: c.append("global pre")),
            register_optimizer_step_post_hook(lambda *_, c=calls: c.append("global post")),
        ]
        try:
            for one in (opt, other):
                handles.append(one.register_step_pre_hook(lambda *_, c=calls: c.append("pre")))
                handles.append(one.register_step_post_hook(lambda *_, c=calls: c.append("post")))
            once = ["global pre", "pre", "post", "global post"]
            for i, one in enumerate((opt, other, opt), 1):
                one.step()
                assert calls == i * once
        finally:
            for handle in handles:
                handle.remove()
        opt.step()
        other.step()
        assert calls == 3 * once


def test_deepcopy_copies_all_public_attrs():
    for kwargs in optim_inputs():
        params = [Parameter(torch.randn(2, 3)) for _ in range(2)]
        opt = CraftOptimizer(params, **kwargs)
        for p in params:
            p.grad = torch.rand_like(p)
        for _ in range(3):
            opt.step()
        twin = copy.deepcopy(opt)

        def public(one):
            return {name for name in vars(one) if not name.startswith("_")}

        assert public(twin) == public(opt)
        assert same(twin.state_dict(), opt.state_dict())


def test_non_empty_state():
    for kwargs in optim_inputs():
        model, loss = conv_model()
        opt = CraftOptimizer(model.parameters(), **kwargs)
        loss().backward()
        opt.step()
        assert all(len(opt.state[p]) > 0 for p in model.parameters())


def test_tensor_tracker_sees_equal_runs():
    """torch's own tracker over two runs of one seed: every intermediate parameter and moment is the same."""
    tracker = torch_testing().TensorTracker({"rtol": 0, "atol": 0})

    class Case(torch.testing._internal.common_utils.TestCase):
        def runTest(self):
            pass

    for run in range(2):
        model, loss = sigmoid_model()
        opt = CraftOptimizer(model.parameters(), lr=1e-2)
        for _ in range(3):
            descend(opt, loss, steps=1)
            for tensor in [*model.parameters(), *(s["exp_avg_sq"] for s in opt.state.values())]:
                tracker.add(tensor) if run == 0 else tracker.pop_check_set(tensor, Case())
    assert tracker.all_popped()


# -- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_state_dict_with_cuda_params():
    for kwargs in optim_inputs(max_grad_norm=None):
        params = [Parameter(torch.randn(2, 3)) for _ in range(2)]
        opt = CraftOptimizer(params, **kwargs)
        for p in params:
            p.grad = torch.randn_like(p)
        for _ in range(3):
            opt.step()
        there = [Parameter(p.detach().cuda()) for p in params]
        for p, q in zip(params, there, strict=True):
            q.grad = p.grad.cuda()
        other = CraftOptimizer(there, **kwargs)
        state = copy.deepcopy(opt.state_dict())
        other.load_state_dict(state)
        assert same(state, opt.state_dict())
        device = "cuda" if kwargs.get("capturable") or kwargs["fused"] else "cpu"
        assert all(entry["step"].device.type == device for entry in other.state_dict()["state"].values())
        for _ in range(5):
            opt.step()
            other.step()
            for p, q in zip(params, there, strict=True):
                assert_norm_close(q.detach().cpu(), p.detach(), ADAMW_NORM, str(kwargs))


@pytest.mark.gpu
def test_cpu_load_state_dict():
    """A checkpoint of a fused or capturable optimizer that was moved to the CPU continues on the GPU."""
    for flag, kwargs in itertools.product(("fused", "capturable"), optim_inputs()[::3]):
        p = Parameter(torch.tensor([0.1, 0.2]))
        opt = CraftOptimizer([p], **kwargs)
        p.grad = torch.rand_like(p)
        opt.step()
        state = copy.deepcopy(opt.state_dict())
        state["param_groups"][0][flag] = True
        q = Parameter(p.detach().cuda())
        other = CraftOptimizer([q], **{**kwargs, flag: True})
        other.load_state_dict(state)
        q.grad = torch.rand_like(q)
        other.step()
        assert other.state[q]["step"].item() == 2


@pytest.mark.gpu
def test_mixed_device_dtype():
    """Parameters of several dtypes on CPU and GPU in one optimizer: as one optimizer for each, unclipped."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    params = [Parameter(torch.rand(2, 3, dtype=dt, device=dev)) for dev in ("cpu", "cuda") for dt in dtypes]
    twins = [Parameter(p.detach().clone()) for p in params]
    one = CraftOptimizer(params, max_grad_norm=None)
    many = [CraftOptimizer([p], max_grad_norm=None) for p in twins]
    for _ in range(3):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.rand_like(p)
            q.grad = p.grad.clone()
        one.step()
        for opt in many:
            opt.step()
    for p, q in zip(params, twins, strict=True):
        assert_same_bits(p.detach(), q.detach(), f"{p.dtype} on {p.device}")


@pytest.mark.gpu
def test_fused_cpu_matches_cuda():
    for kwargs in optim_inputs(max_grad_norm=None, fused=True, foreach=None)[::3]:
        here, _ = sigmoid_model()
        there = copy.deepcopy(here).cuda()
        opts = [CraftOptimizer(model.parameters(), **kwargs) for model in (here, there)]
        for _ in range(7):
            for p, q in zip(here.parameters(), there.parameters(), strict=True):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.cuda()
            for opt in opts:
                opt.step()
        assert_norm_close(flat_params(there).cpu(), flat_params(here), ADAMW_NORM, str(kwargs))


@pytest.mark.gpu
def test_forloop_goes_right_direction_multigpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for kwargs in optim_inputs():
        weight, bias = Parameter(torch.randn(10, 5, device="cuda:0")), Parameter(torch.randn(10, device="cuda:1"))
        x = torch.randn(5, device="cuda:0")
        opt = CraftOptimizer([weight, bias], **kwargs)
        assert_right_way(kwargs, descend(opt, lambda w=weight, b=bias, x=x: (w.mv(x).to("cuda:1") + b).square().sum()))
