"""Beyond torch's own cases: the rest of what a program that works with torch.optim.AdamW does to its optimizer.

docs/optimizer-contract.md lists every case; test_torch_contract_docs.py holds it to this file.
"""

import collections
import copy
import inspect
import io
import pickle
import shutil

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from craft_opt import CraftOptimizer
from craft_opt.optimizer import _optimizer
from tests.optimizer.models import batches, flat_params, make_model, ret_loss, task_loss
from tests.optimizer.torch_contract import assert_close, compare, lockstep, wide_copy
from tests.support.asserts import assert_norm_close, assert_same_bits
from tests.support.tolerances import ADAMW_NORM

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pair(params, **kwargs):
    """CraftOptimizer on these parameters, AdamW on fp32 copies, and the pairs of the two."""
    wide = wide_copy(params)
    ours = CraftOptimizer(params, max_grad_norm=None, **copy.deepcopy(kwargs))
    return list(zip(params, wide, strict=True)), ours, torch.optim.AdamW(wide, foreach=False, **kwargs)


def random_grads(pairs):
    return [torch.randn(p.shape) for p, _ in pairs]


def models(dtype=torch.float32):
    """A model with CraftOptimizer and its twin with AdamW."""
    ours, theirs = make_model(dtype=dtype), make_model(dtype=dtype)
    return (
        (ours, CraftOptimizer(ours.parameters(), lr=1e-2, max_grad_norm=None)),
        (theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, foreach=False)),
    )


def plain_step(model, opt, batch):
    opt.zero_grad()
    task_loss(model, batch).backward()
    opt.step()


# -- arguments -----------------------------------------------------------------------------------------------------


def test_flags_of_adamw_are_taken_and_kept():
    p, q = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    opt = CraftOptimizer([{"params": [p]}, {"params": [q], "foreach": True}], lr=1e-3, capturable=True)
    assert [g["foreach"] for g in opt.param_groups] == [None, True]
    assert all(g["capturable"] and g["fused"] is None for g in opt.param_groups)
    names = inspect.signature(torch.optim.AdamW).parameters.keys() - {"params"}
    assert names <= inspect.signature(CraftOptimizer).parameters.keys()
    assert repr(CraftOptimizer([p], fused=True)).count("fused: True") == 1


def test_amsgrad_by_position_is_refused():
    with pytest.raises(ValueError, match="named here: amsgrad=True"):
        CraftOptimizer([Parameter(torch.ones(2))], 1e-3, (0.9, 0.999), 1e-8, 0.01, True)


@pytest.mark.parametrize("where", ["constructor", "group", "state dict"])
def test_differentiable_is_refused(where):
    p = Parameter(torch.ones(2))
    opt = CraftOptimizer([p])
    with pytest.raises(ValueError, match="differentiable=True is not supported"):
        if where == "constructor":
            CraftOptimizer([p], differentiable=True)
        elif where == "group":
            opt.add_param_group({"params": [Parameter(torch.ones(1))], "differentiable": True})
        else:
            opt.load_state_dict(torch.optim.AdamW([p], differentiable=True).state_dict())
    assert len(opt.param_groups) == 1
    assert not opt.param_groups[0]["differentiable"]


def test_tensor_betas_have_one_element():
    with pytest.raises(ValueError, match=r"betas\[1\] must be a number or a 1-element tensor, got shape \(2,\)"):
        CraftOptimizer([Parameter(torch.ones(2))], betas=(torch.tensor(0.9), torch.tensor([0.9, 0.99])))


# -- parameters ----------------------------------------------------------------------------------------------------


def odd_parameters(dtype):
    """No dimension, no element, and every order of memory."""
    dense = torch.randn(60, dtype=dtype)
    return [
        Parameter(p)
        for p in (
            torch.randn((), dtype=dtype),
            torch.empty(0, dtype=dtype),
            torch.empty(3, 0, 2, dtype=dtype),
            torch.randn(1, dtype=dtype),
            torch.randn(7, 4, dtype=dtype).t(),
            torch.randn(7, 6, dtype=dtype)[:, ::2],
            torch.randn(5, 3, 2, dtype=dtype)[..., 0],
            torch.randn(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last),
            torch.randn(2, 3, 4, 5, 2, dtype=dtype).to(memory_format=torch.channels_last_3d),
            torch.randn(4, 3, 2, dtype=dtype).permute(1, 2, 0),
            dense[1:20],
            dense[20:60].view(5, 8),
        )
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form_of_parameter(dtype):
    pairs, ours, theirs = pair(odd_parameters(dtype), lr=1e-2, weight_decay=0.1, amsgrad=True)
    strides = [p.stride() for p, _ in pairs]
    for _ in range(4):
        lockstep(pairs, ours, theirs, random_grads(pairs))
    assert [p.stride() for p, _ in pairs] == strides
    for p, q in pairs:
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"):
            assert ours.state[p][name].shape == theirs.state[q][name].shape
            assert_close(ours.state[p][name], theirs.state[q][name], name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form_of_parameter_with_retention(dtype):
    """The same numbers in contiguous memory take the same steps, conflicts and λ included."""
    odd = odd_parameters(dtype)
    plain = [Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in odd]
    opts = [CraftOptimizer(params, lr=1e-2) for params in (odd, plain)]
    for _ in range(3):
        for kind in ("retention", "task"):
            grads = [torch.randn(p.shape).to(dtype) for p in odd]
            for params, opt in zip((odd, plain), opts, strict=True):
                loss = sum((p * g).sum() for p, g in zip(params, grads, strict=True))
                if kind == "retention":
                    with opt.retention(0.7):
                        loss.backward()
                else:
                    loss.backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
        found, expected = (opt.metrics().as_floats() for opt in opts)
        assert found == pytest.approx(expected, rel=1e-6)
        for p, q in zip(odd, plain, strict=True):
            assert_close(p, q.detach().float(), str(p.stride()))


def test_only_empty_parameters():
    p = Parameter(torch.empty(0, 3))
    opt = CraftOptimizer([p])
    for _ in range(2):
        p.grad = torch.empty(0, 3)
        opt.step()
    assert opt.state[p]["step"].item() == 2
    assert opt.metrics().grad_norm.item() == 0.0


GRADS = {
    "expanded": lambda p: torch.ones(()).expand(p.shape),
    "transposed": lambda p: torch.randn(p.shape[::-1]).permute(3, 2, 1, 0),
    "channels_last": lambda p: torch.randn(p.shape).to(memory_format=torch.channels_last),
    "with a graph": lambda p: torch.randn(p.shape, requires_grad=True) * 2,
    "a view": lambda p: torch.randn(9, *p.shape)[3],
    "odd offset": lambda p: torch.randn(1 + p.numel())[1:].view(p.shape),
}


@pytest.mark.parametrize("kind", GRADS)
def test_every_form_of_gradient(kind):
    pairs, ours, theirs = pair([Parameter(torch.randn(2, 3, 4, 5))])
    ((p, q),) = pairs
    for _ in range(3):
        p.grad = GRADS[kind](p)
        q.grad = p.grad.detach().clone()
        ours.step()
        theirs.step()
        compare(pairs)


def test_gradients_of_another_dtype_are_refused():
    p = Parameter(torch.ones(4, dtype=torch.bfloat16))
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch lets no gradient have another dtype")
    p.grad_dtype = torch.float32
    opt = CraftOptimizer([p])
    p.grad = torch.full((4,), 0.5)
    with pytest.raises(RuntimeError, match=r"got torch\.float32 for torch\.bfloat16"):
        opt.step()
    assert (p == 1).all()


def test_gradients_left_after_the_step(cpu_backend):
    """Equal to what they were; where gradients land in flat buffers, a reference to one sees the next."""
    model = make_model()
    opt = CraftOptimizer(model.parameters(), lr=1e-2, max_grad_norm=1e-3)
    task_loss(model, batches(1)[0]).backward()
    before = [p.grad.clone() for p in model.parameters()]
    opt.step()
    kept = [p.grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))
    plain_step(model, opt, batches(2)[1])
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True)) == (cpu_backend == "numba")


def test_shared_and_overlapping_parameters():
    p = Parameter(torch.ones(3))
    pairs, ours, theirs = pair([p, Parameter(torch.randn(2))])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        ours.add_param_group({"params": [p]})
    assert len(ours.param_groups) == 1
    lockstep(pairs, ours, theirs, random_grads(pairs))
    # Elements that share one place in memory: torch's own error, as in AdamW.
    expanded = Parameter(torch.ones(1).expand(3))
    expanded.grad = torch.ones(3)
    for opt in (CraftOptimizer([expanded]), torch.optim.AdamW([expanded])):
        with pytest.raises(RuntimeError, match="refers to a single memory location"):
            opt.step()


def test_a_parameter_listed_twice_takes_one_step():
    """torch warns of it; AdamW then steps it twice with one gradient."""
    p, twin = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = CraftOptimizer([p, p], lr=1e-2)
    other = CraftOptimizer([twin], lr=1e-2)
    for _ in range(2):
        for q, one in ((p, opt), (twin, other)):
            q.grad = torch.tensor([0.1, 0.2, 0.3])
            one.step()
    assert_same_bits(p.detach(), twin.detach(), "parameter")
    assert opt.metrics().grad_norm.item() == other.metrics().grad_norm.item()
    assert opt.state[p]["step"].item() == 2


def test_tied_parameters():
    runs = []
    for kind in (CraftOptimizer, torch.optim.AdamW):
        torch.manual_seed(0)
        embed, head = torch.nn.Embedding(12, 6), torch.nn.Linear(6, 12, bias=False)
        head.weight = embed.weight
        model = torch.nn.ModuleDict({"embed": embed, "head": head})
        extra = {"max_grad_norm": None} if kind is CraftOptimizer else {"foreach": False}
        opt = kind(model.parameters(), lr=1e-2, **extra)
        for i in range(4):
            opt.zero_grad()
            torch.nn.functional.cross_entropy(head(embed(torch.tensor([i, 3]))), torch.tensor([1, 2])).backward()
            opt.step()
        runs.append(flat_params(model))
    assert_norm_close(*runs, ADAMW_NORM, "tied")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.complex64, torch.float64])
def test_frozen_parameters_may_have_any_dtype(dtype):
    """Quantised weights beside adapters; thawed, those that no moment fits are refused before anything moves."""
    frozen, p = Parameter(torch.ones(3).to(dtype), requires_grad=False), Parameter(torch.ones(2))
    opt = CraftOptimizer([frozen, p])
    p.grad = torch.ones(2)
    opt.step()
    assert opt.state[p]["step"].item() == 1
    assert (frozen == 1).all()
    if dtype is torch.uint8:
        return
    before = p.detach().clone()
    frozen.requires_grad_(True)
    with pytest.raises(ValueError, match="fp32, bf16 or fp16"):
        opt.step()
    assert torch.equal(p.detach(), before)


def test_a_model_turned_to_double_is_refused():
    model, opt = models()[0]
    plain_step(model, opt, batches(1)[0])
    model.double()
    opt.zero_grad()
    task_loss(model, batches(1, dtype=torch.float64)[0]).backward()
    before = flat_params(model)
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        opt.step()
    assert torch.equal(flat_params(model), before)


def test_a_frozen_parameter_with_a_gradient_stays():
    """AdamW steps whatever has a .grad: zeros that zero_grad(set_to_none=False) left go on decaying frozen weights."""
    pairs, ours, theirs = pair([Parameter(torch.ones(3)), Parameter(torch.ones(2))], lr=0.1, weight_decay=0.1)
    lockstep(pairs, ours, theirs, random_grads(pairs))
    p, q = pairs[0]
    before = p.detach().clone()
    for one, opt in ((p, ours), (q, theirs)):
        opt.zero_grad(set_to_none=False)
        one.requires_grad_(False)
        opt.step()
    assert torch.equal(p, before)
    assert not torch.equal(q, before)
    compare(pairs[1:])
    # Thawed, it goes on with its own moments and steps.
    assert ours.state[p]["step"].item() == 1
    p.requires_grad_(True)
    p.grad = torch.ones(3)
    ours.step()
    assert ours.state[p]["step"].item() == 2


def test_frozen_and_thawed_mid_run():
    """Head first, then the body instead: each has its steps, and the checkpoint every moment."""
    pairs = models()
    for i, batch in enumerate(batches(9)):
        for model, opt in pairs:
            model[3].requires_grad_(i < 3 or i >= 6)
            model[0].requires_grad_(i >= 3)
            plain_step(model, opt, batch)
        assert_norm_close(flat_params(pairs[0][0]), flat_params(pairs[1][0]), ADAMW_NORM, f"step {i}")
        found, expected = (opt.state_dict()["state"] for _, opt in pairs)
        # Ours has λ under the first parameter, with zero moments where it took no step yet.
        assert found.keys() - {0} == expected.keys() - {0}, i
        for key in expected:
            assert_norm_close(found[key]["exp_avg"], expected[key]["exp_avg"], 1e-5, f"moments of {key} at step {i}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_whose_data_was_swapped(dtype):
    """``p.data = …``: other memory, other order of memory in the same place, other values; moments carry on."""
    pairs, ours, theirs = pair([Parameter(torch.randn(4, 4).to(dtype)), Parameter(torch.randn(3).to(dtype))])

    def swap(change):
        for p, q in pairs:
            p.data = change(p.data)
            q.data = change(q.data)

    for change in (
        lambda d: d,
        lambda d: d.clone(),
        lambda d: d.t() if d.dim() == 2 else d,
        lambda d: d.t() if d.dim() == 2 else d * 2,
        lambda d: torch.cat([d, d])[: len(d)],
    ):
        swap(change)
        for _ in range(2):
            lockstep(pairs, ours, theirs, random_grads(pairs))
    for p, q in pairs:
        assert_close(ours.state[p]["exp_avg"], theirs.state[q]["exp_avg"], "exp_avg")


def test_model_to_memory_format_and_dtype():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 2))
    twin = copy.deepcopy(model)
    ours = CraftOptimizer(model.parameters(), max_grad_norm=None, lr=1e-2)
    theirs = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    pairs = list(zip(model.parameters(), twin.parameters(), strict=True))
    for form in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        model.to(memory_format=form)
        for _ in range(2):
            x = torch.randn(2, 3, 8, 8)
            for one, opt in ((model, ours), (twin, theirs)):
                opt.zero_grad()
                one(x).square().mean().backward()
                opt.step()
            compare(pairs)
    # To bf16 and on: the moments stay fp32 and go on.
    model.bfloat16()
    with torch.no_grad():
        for p, q in pairs:
            q.copy_(p)
    for _ in range(2):
        lockstep(pairs, ours, theirs, random_grads(pairs))
    assert all(state["exp_avg"].dtype is torch.float32 for state in ours.state.values())


def test_module_conversion_by_swapping_tensors():
    """torch.__future__'s way to convert modules swaps the tensors inside the parameters."""
    model, opt = models()[0]
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.bfloat16()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    plain_step(model, opt, batches(1, dtype=torch.bfloat16)[0])
    assert all(opt.state[p]["step"].item() == 1 for p in model.parameters())


@pytest.mark.parametrize("how", ["clear", "new", "empty entries"])
def test_emptied_state_starts_afresh(how):
    """What reinforcement learning code does between its phases: drop ``optimizer.state``."""
    pairs, ours, theirs = pair([Parameter(torch.randn(5)), Parameter(torch.randn(4, 2))], lr=1e-2)
    for _ in range(2):
        for _ in range(3):
            lockstep(pairs, ours, theirs, random_grads(pairs))
        for opt in (ours, theirs):
            if how == "clear":
                opt.state.clear()
            elif how == "new":
                opt.state = collections.defaultdict(dict)
            else:
                for entry in opt.state.values():
                    entry.clear()
    lockstep(pairs, ours, theirs, random_grads(pairs))
    assert all(ours.state[p]["step"].item() == 1 for p, _ in pairs)


@pytest.mark.parametrize("number", [0, 1])
def test_state_looked_at_or_emptied_before_a_checkpoint(number):
    """``state`` is a default dict: looking leaves an empty entry, which a checkpoint must not fill by half."""
    params = [Parameter(torch.randn(3)), Parameter(torch.randn(2))]
    opt = CraftOptimizer(params, lr=1e-2)
    assert not opt.state[params[number]]
    again = CraftOptimizer(params, lr=1e-2)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for p in params:
        p.grad = torch.ones_like(p)
    again.step()
    assert all(again.state[p]["step"].item() == 1 for p in params)
    # Emptied after a step and saved before the next one: what the checkpoint holds starts afresh as well.
    del again.state[params[number]]
    opt.load_state_dict(copy.deepcopy(again.state_dict()))
    for one in (again, opt):
        one.step()
        assert [one.state[p]["step"].item() for p in params] == [2 - (i == number) for i in range(2)]


def test_moments_changed_in_place_count():
    pairs, ours, theirs = pair([Parameter(torch.randn(5))], lr=1e-2)
    for _ in range(3):
        lockstep(pairs, ours, theirs, random_grads(pairs))
        for (p, q), factor in zip(pairs, (0.5,), strict=True):
            for state in (ours.state[p], theirs.state[q]):
                state["exp_avg"].mul_(factor)


@pytest.mark.parametrize("how", ["item", "update", "entry"])
def test_moments_assigned_count(how):
    """``state[p]["exp_avg"] = …``, with a number as step, or a whole new entry."""
    pairs, ours, theirs = pair([Parameter(torch.randn(5)), Parameter(torch.randn(2))], lr=1e-2, amsgrad=True)
    for _ in range(2):
        for _ in range(2):
            lockstep(pairs, ours, theirs, random_grads(pairs))
        fresh = {name: torch.rand(5) for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
        for opt, p in zip((ours, theirs), pairs[0], strict=True):
            new = {name: value.clone() for name, value in fresh.items()} | {"step": torch.tensor(1.0)}
            if how == "item":
                for name, value in new.items():
                    opt.state[p][name] = value
            elif how == "update":
                opt.state[p].update(new)
            else:
                opt.state[p] = new
        assert torch.equal(ours.state_dict()["state"][0]["exp_avg"], fresh["exp_avg"])
    lockstep(pairs, ours, theirs, random_grads(pairs))
    assert ours.state[pairs[0][0]]["step"].item() == 2
    # The state dict holds plain dicts, which torch.load(weights_only=True) and safetensors take.
    assert all(type(entry) is dict for entry in ours.state_dict()["state"].values())


def test_a_parameter_replaced_with_its_state():
    """Growing and pruning: another Parameter in the group, the old moments, cut or extended, under it."""
    p = Parameter(torch.randn(4, 3))
    pairs, ours, theirs = pair([p], lr=1e-2)
    for size in (6, 2, 2):
        lockstep(pairs, ours, theirs, random_grads(pairs))
        fresh = []
        for old, opt in zip(pairs[0], (ours, theirs), strict=True):
            state = opt.state.pop(old)
            grown = torch.cat([old.detach(), old.detach()])[:size]
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.cat([state[name], torch.zeros_like(state[name])])[:size]
            fresh.append(Parameter(grown.clone()))
            opt.param_groups[0]["params"][0] = fresh[-1]
            opt.state[fresh[-1]] = state
        pairs = [tuple(fresh)]
    lockstep(pairs, ours, theirs, random_grads(pairs))
    # Another shape and the old moments do not fit: AdamW's step fails too.
    pairs[0][0].data = torch.randn(7, 3)
    pairs[0][0].grad = torch.randn(7, 3)
    with pytest.raises(RuntimeError, match=r"exp_avg in optimizer.state has \(2, 3\), the parameter \(7, 3\)"):
        ours.step()


# -- groups, closures, gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_added_late(dtype):
    pairs, ours, theirs = pair([Parameter(torch.randn(5).to(dtype))], lr=1e-2)
    schedulers = [lr_scheduler.ExponentialLR(opt, 0.9) for opt in (ours, theirs)]
    for i in range(4):
        if i == 2:
            late = Parameter(torch.randn(3, 2).to(dtype))
            pairs.append((late, wide_copy([late])[0]))
            for opt, p, scheduler in zip((ours, theirs), pairs[-1], schedulers, strict=True):
                opt.add_param_group({"params": [p], "lr": 0.1, "betas": (0.5, 0.9), "amsgrad": True})
                scheduler.base_lrs.append(0.1)
        lockstep(pairs, ours, theirs, random_grads(pairs))
        for scheduler in schedulers:
            scheduler.step()


def test_groups_changed_in_a_run():
    """Settings of a group, and the group of a parameter, count from the next step on."""
    pairs, ours, theirs = pair([Parameter(torch.randn(n)) for n in (5, 4, 3)], lr=1e-2)
    for opt in (ours, theirs):
        opt.add_param_group({"params": [opt.param_groups[0]["params"].pop()], "lr": 0.1})
    for change in (
        lambda groups: None,
        lambda groups: groups[1].update(lr=0.05, weight_decay=0.5, betas=(0.5, 0.6), eps=1e-3),
        lambda groups: groups[0].update(maximize=True),
        lambda groups: groups[1]["params"].insert(0, groups[0]["params"].pop()),
        lambda groups: groups.reverse(),
        lambda groups: groups.pop(),
    ):
        for opt in (ours, theirs):
            change(opt.param_groups)
        for _ in range(2):
            lockstep(pairs, ours, theirs, random_grads(pairs))


def test_amsgrad_switched_on_in_a_run():
    """The maximum begins with the step that finds it on; AdamW has no place for it and fails."""
    p = Parameter(torch.ones(70))
    opt = CraftOptimizer([p], lr=1e-2, max_grad_norm=None)
    for i in range(4):
        opt.param_groups[0]["amsgrad"] = i >= 2
        p.grad = torch.full((70,), 1.0 / (i + 1))
        before = 0.0 if i < 3 else opt.state[p]["max_exp_avg_sq"].clone()
        opt.step()
        if i >= 2:
            state = opt.state[p]
            assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"].clamp(min=before))
    assert opt.state_dict()["state"][0]["max_exp_avg_sq"].min() > 0


def test_zero_grad_that_keeps_zeros():
    """A zero gradient is one: moments decay and weights too, for a parameter that the loss no longer reaches."""
    pairs = models()
    for i, batch in enumerate(batches(5)):
        for model, opt in pairs:
            opt.zero_grad(set_to_none=False)
            (task_loss(model, batch) if i < 2 else model[0](batch[0]).square().mean()).backward()
            opt.step()
        assert_norm_close(flat_params(pairs[0][0]), flat_params(pairs[1][0]), ADAMW_NORM, f"step {i}")
    assert all(state["step"].item() == 5 for state in pairs[0][1].state.values())


def test_gradient_hooks():
    """Hooks on tensors, and hooks after accumulation registered before and after ours, replacing .grad or not."""

    def halve(p):
        p.grad.mul_(0.5)

    pairs = []
    for kind in range(2):
        model = make_model()
        first, last = model[0].weight, model[3].weight
        first.register_hook(lambda g: 3 * g)
        first.register_post_accumulate_grad_hook(halve)
        opt = (
            CraftOptimizer(model.parameters(), lr=1e-2, max_grad_norm=None)
            if kind == 0
            else torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        )
        last.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad * 0.25))
        pairs.append((model, opt))
    for batch in batches(4):
        for model, opt in pairs:
            plain_step(model, opt, batch)
        assert_norm_close(flat_params(pairs[0][0]), flat_params(pairs[1][0]), ADAMW_NORM, "hooks")


def test_a_step_in_the_backward():
    """An optimizer a parameter, stepped and cleared as soon as its gradient is there."""
    results = []
    for kind in (CraftOptimizer, torch.optim.AdamW):
        model = make_model(width=300)
        extra = {"max_grad_norm": None} if kind is CraftOptimizer else {"foreach": False}
        opts = {p: kind([p], lr=1e-2, **extra) for p in model.parameters()}

        def step(p, opts=opts):
            opts[p].step()
            opts[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        for batch in batches(3):
            task_loss(model, batch).backward()
            assert all(p.grad is None for p in model.parameters())
        results.append(flat_params(model))
    assert_norm_close(*results, ADAMW_NORM, "steps in the backward")


def test_gradients_from_torch_func():
    pairs = models()
    for batch in batches(3):
        for model, opt in pairs:
            params = {name: p.detach() for name, p in model.named_parameters()}
            grads = torch.func.grad(
                lambda w, m=model, b=batch: (torch.func.functional_call(m, w, b[0]) - 1).square().mean()
            )(params)
            for name, p in model.named_parameters():
                p.grad = grads[name]
            opt.step()
        assert_norm_close(flat_params(pairs[0][0]), flat_params(pairs[1][0]), ADAMW_NORM, "torch.func")


def test_closure_is_run_with_gradients_under_no_grad():
    (model, ours), (twin, theirs) = models()
    for batch in batches(3):
        losses = []
        for one, opt in ((model, ours), (twin, theirs)):

            def closure(one=one, opt=opt, batch=batch):
                opt.zero_grad()
                loss = task_loss(one, batch)
                loss.backward()
                return loss

            with torch.no_grad():
                losses.append(opt.step(closure).item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_norm_close(flat_params(model), flat_params(twin), ADAMW_NORM, "closure")


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_on_the_cpu(unscale):
    """Overflow in the third step included; with unscale_ the caller clips, as loops for AdamW do."""
    pairs = models()
    results = []
    for model, opt in pairs:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for i, batch in enumerate(batches(6)):
            opt.zero_grad()
            scaler.scale(task_loss(model, batch)).backward()
            if i == 2:
                model[0].bias.grad[1] = torch.inf
            if unscale:
                scaler.unscale_(opt)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(opt)
            scaler.update()
        results.append((flat_params(model), scaler.get_scale(), opt.state[model[0].bias]["step"].item()))
    assert_norm_close(results[0][0], results[1][0], ADAMW_NORM, "scaled")
    assert results[0][1:] == results[1][1:]
    assert results[0][2] == 5


# -- schedulers and averages ---------------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda n: 0.9**n),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda n: 0.8),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 3, 0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 5], 0.3),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.2, 4),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.1, total_iters=5),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.7),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(opt, 6)], [3]
    ),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 6, 1e-4),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.1, 3), lr_scheduler.ExponentialLR(opt, 0.9)]
    ),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1, factor=0.5),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 1e-4, 1e-2, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3, 2),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=12),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 6, 2.0),
    "SWALR": lambda opt: SWALR(opt, 1e-4, anneal_epochs=4),
}


def test_every_scheduler_of_torch_is_here():
    classes = {
        name for name in lr_scheduler.__all__ if isinstance(getattr(lr_scheduler, name), type) and name != "LRScheduler"
    }
    assert classes | {"SWALR"} == SCHEDULERS.keys()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_lr_scheduler(name, tensor_lr, dtype):
    """Learning rates, betas where it cycles them, and every step; half way through a checkpoint of both."""
    params = [Parameter(torch.randn(6).to(dtype)), Parameter(torch.randn(3, 2).to(dtype))]
    pairs, ours, theirs = pair(params, lr=torch.tensor(0.01) if tensor_lr else 0.01)
    schedulers = [SCHEDULERS[name](opt) for opt in (ours, theirs)]
    for i in range(11):
        if i == 6:
            state = pickle.loads(pickle.dumps([ours.state_dict(), schedulers[0].state_dict()]))
            ours = CraftOptimizer(params, lr=torch.tensor(0.01) if tensor_lr else 0.01, max_grad_norm=None)
            schedulers[0] = SCHEDULERS[name](ours)
            ours.load_state_dict(state[0])
            schedulers[0].load_state_dict(state[1])
        lockstep(pairs, ours, theirs, random_grads(pairs))
        for scheduler in schedulers:
            # The metric improves at first only.
            scheduler.step(max(0.0, 3.0 - i)) if name == "ReduceLROnPlateau" else scheduler.step()
        for key in ("lr", "betas"):
            found, expected = (torch.as_tensor(opt.param_groups[0][key]).double() for opt in (ours, theirs))
            assert torch.allclose(found, expected, rtol=1e-6, atol=0), (key, i)


AVERAGES = {
    "mean": {},
    "swa": {"multi_avg_fn": get_swa_multi_avg_fn()},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.8), "use_buffers": True},
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_averaged_model(kind):
    """The average follows AdamW's, takes nothing from the optimizer, and trains on with one of its own."""
    pairs = models()
    averages = [AveragedModel(model, **AVERAGES[kind]) for model, _ in pairs]
    for batch in batches(5):
        for (model, opt), average in zip(pairs, averages, strict=True):
            plain_step(model, opt, batch)
            average.update_parameters(model)
    assert_norm_close(flat_params(averages[0]), flat_params(averages[1]), ADAMW_NORM, kind)
    assert not any(p._post_accumulate_grad_hooks for p in averages[0].parameters())
    steps = pairs[0][1].attempted_steps
    opt = CraftOptimizer(averages[0].parameters())
    task_loss(averages[0], batches(1)[0]).backward()
    opt.step()
    assert pairs[0][1].attempted_steps == steps


# -- torch.compile -------------------------------------------------------------------------------------------------


def compiled_run(backend, *, retention):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = make_model()
    opt = CraftOptimizer(model.parameters(), lr=1e-2)

    def train_step(batch, measure):
        if measure:
            loss = ret_loss(model, batch)
            with opt.retention(loss):
                loss.backward()
        loss = task_loss(model, batch)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    step = train_step if backend is None else torch.compile(train_step, backend=backend)
    losses = [step(batch, retention and i % 2 == 0).item() for i, batch in enumerate(batches(5))]
    return flat_params(model), losses, opt


@pytest.mark.parametrize("retention", [False, True])
@pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor"))]
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_compiled_train_step(backend, retention, monkeypatch):
    """The step is a break in the graph; numbers and counts are those of the plain loop."""
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    if retention:
        # Every gradient lands in the hook, as those of a large model do.
        monkeypatch.setattr(_optimizer, "LAND_AT_ONCE", 1)
    expected, wanted, plain = compiled_run(None, retention=retention)
    found, losses, opt = compiled_run(backend, retention=retention)
    if backend == "eager":
        assert_same_bits(found, expected, backend)
    assert_norm_close(found, expected, 1e-5 if backend == "inductor" else ADAMW_NORM, backend)
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert opt.attempted_steps == plain.attempted_steps == 5
    assert opt.metrics().lam_after.item() == pytest.approx(plain.metrics().lam_after.item(), rel=1e-5)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"


# -- copies, pickles, profiler -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_with_a_scheduler(how):
    """The optimizer object itself, with the scheduler that wrapped its step and a tensor as lr."""
    model = make_model()
    opt = CraftOptimizer(model.parameters(), lr=torch.tensor(1e-2), amsgrad=True, fused=True)
    scheduler = lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=9)
    data = batches(6)

    def run(model, opt, scheduler, data):
        for batch in data:
            loss = ret_loss(model, batch)
            with opt.retention(loss):
                loss.backward()
            plain_step_keeping(model, opt, batch)
            scheduler.step()

    def plain_step_keeping(model, opt, batch):
        task_loss(model, batch).backward()
        opt.step()
        opt.zero_grad()

    run(model, opt, scheduler, data[:3])
    bundle = (model, opt)
    if how == "deepcopy":
        twin, twin_opt = copy.deepcopy(bundle)
    elif how == "pickle":
        twin, twin_opt = pickle.loads(pickle.dumps(bundle))
    else:
        buffer = io.BytesIO()
        torch.save(bundle, buffer)
        buffer.seek(0)
        twin, twin_opt = torch.load(buffer, weights_only=False)
    twin_scheduler = lr_scheduler.OneCycleLR(twin_opt, 1e-2, total_steps=9)
    twin_opt.param_groups[0]["lr"] = opt.param_groups[0]["lr"].clone()
    twin_opt.param_groups[0]["betas"] = opt.param_groups[0]["betas"]
    twin_scheduler.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    assert repr(twin_opt) == repr(opt)
    run(model, opt, scheduler, data[3:])
    run(twin, twin_opt, twin_scheduler, data[3:])
    assert_same_bits(flat_params(twin), flat_params(model), how)
    assert twin_opt.metrics().as_floats() == opt.metrics().as_floats()


def test_profiler_names_the_step():
    model, opt = models()[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        plain_step(model, opt, batches(1)[0])
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#CraftOptimizer.step", "Optimizer.zero_grad#CraftOptimizer.zero_grad"} <= names


def test_a_subclass_is_an_optimizer():
    class Louder(CraftOptimizer):
        def step(self, closure=None):
            calls.append("step")
            return super().step(closure)

    calls = []
    model = make_model()
    opt = Louder(model.parameters(), lr=1e-2)
    handle = opt.register_step_post_hook(lambda *_: calls.append("hook"))
    plain_step(model, opt, batches(1)[0])
    handle.remove()
    # torch wraps the step of each class, so its hooks run around both.
    assert calls == ["step", "hook", "hook"]
    assert isinstance(opt, torch.optim.Optimizer)


# -- foreign state -------------------------------------------------------------------------------------------------


def stepped(kind, steps=3, **kwargs):
    """The state dict of another optimizer after some steps on the model of these tests."""
    model = make_model()
    opt = kind(model.parameters(), **kwargs)
    for batch in batches(steps):
        plain_step(model, opt, batch)
    return opt.state_dict()


def without(state, *, group=(), entry=()):
    state = copy.deepcopy(state)
    for one in state["param_groups"]:
        for name in group:
            del one[name]
    for one in state["state"].values():
        for name in entry:
            del one[name]
    return state


def edited(state, number=1, **changes):
    state = copy.deepcopy(state)
    state["state"][number].update(changes)
    return state


TAKEN = {
    "AdamW": lambda: stepped(torch.optim.AdamW, lr=3e-3, weight_decay=0.1),
    "AdamW amsgrad": lambda: stepped(torch.optim.AdamW, amsgrad=True, lr=3e-3),
    "AdamW foreach": lambda: stepped(torch.optim.AdamW, foreach=True, lr=3e-3),
    "AdamW fused": lambda: stepped(torch.optim.AdamW, fused=True, lr=3e-3),
    "AdamW of torch 1.8": lambda: without(
        stepped(torch.optim.AdamW, lr=3e-3),
        group=("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"),
    ),
    "AdamW with whole numbers as steps": lambda: edited(stepped(torch.optim.AdamW), step=3),
    "Adam": lambda: stepped(torch.optim.Adam, lr=3e-3),
    "AdamW before its first step": lambda: stepped(torch.optim.AdamW, steps=0, lr=3e-3),
}


@pytest.mark.parametrize("name", TAKEN)
def test_foreign_state_is_taken_over(name):
    """And goes on as it does in AdamW, which loads the same."""
    state = TAKEN[name]()
    model, twin = make_model(seed=1), make_model(seed=1)
    ours = CraftOptimizer(model.parameters(), max_grad_norm=None)
    theirs = torch.optim.AdamW(twin.parameters())
    for opt in (ours, theirs):
        opt.load_state_dict(copy.deepcopy(state))
    if "1.8" not in name:
        assert same_settings(ours, theirs)
    for batch in batches(4, seed=3):
        plain_step(model, ours, batch)
        plain_step(twin, theirs, batch)
        assert_norm_close(flat_params(model), flat_params(twin), ADAMW_NORM, name)
    assert ours.param_groups[0]["decoupled_weight_decay"]


def same_settings(ours, theirs):
    return all(
        {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}
        for a, b in zip(ours.param_groups, theirs.param_groups, strict=True)
    )


def adamw():
    return stepped(torch.optim.AdamW)


REFUSED = {
    "SGD": (lambda: stepped(torch.optim.SGD), "no 'betas' and no 'eps'"),
    "SGD with momentum": (lambda: stepped(torch.optim.SGD, momentum=0.9), "no 'betas' and no 'eps'"),
    "RMSprop": (lambda: stepped(torch.optim.RMSprop), "no 'betas'"),
    "Adamax": (lambda: stepped(torch.optim.Adamax), "no 'exp_avg_sq'"),
    "Adagrad": (lambda: stepped(torch.optim.Adagrad), "no 'betas'"),
    "no step": (lambda: without(adamw(), entry=("step",)), "no 'step'"),
    "no groups' lr": (lambda: without(adamw(), group=("lr",)), "no 'lr'"),
    "wrong size": (lambda: edited(adamw(), exp_avg=torch.zeros(5)), r"exp_avg has shape \(5,\)"),
    "wrong size of the last": (lambda: edited(adamw(), 5, exp_avg_sq=torch.zeros(5)), r"exp_avg_sq has shape \(5,\)"),
    "wrong size of amsgrad": (lambda: edited(adamw(), max_exp_avg_sq=torch.zeros(())), r"shape \(\)"),
    "two steps": (lambda: edited(adamw(), step=torch.ones(2)), r"step has shape \(2,\)"),
    "no tensor": (lambda: edited(adamw(), exp_avg=[1.0]), "exp_avg is no tensor of real numbers"),
    "complex": (lambda: edited(adamw(), exp_avg=torch.zeros(24, dtype=torch.complex64)), "no tensor of real numbers"),
    "another model": (
        lambda: torch.optim.AdamW([Parameter(torch.ones(2))]).state_dict(),
        "doesn't match the size of optimizer's group",
    ),
    "other groups": (
        lambda: torch.optim.AdamW([{"params": [p]} for p in make_model().parameters()]).state_dict(),
        "different number of parameter groups",
    ),
    "a negative lr": (
        lambda: {**adamw(), "param_groups": [{**adamw()["param_groups"][0], "lr": -1.0}]},
        "param group 0 of the state dict: lr must be at least 0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_foreign_state_is_refused(name):
    """With a ValueError, and nothing changed: the run goes on as if nobody had tried."""
    make, match = REFUSED[name]
    runs = []
    for attempt in (False, True):
        model = make_model()
        opt = CraftOptimizer(model.parameters(), lr=1e-2)
        for batch in batches(2):
            plain_step(model, opt, batch)
        loss = ret_loss(model, batches(1)[0])
        with opt.retention(loss):
            loss.backward()
        if attempt:
            bad = make()
            with pytest.raises(ValueError, match=match):
                opt.load_state_dict(bad)
        plain_step(model, opt, batches(1, seed=5)[0])
        runs.append((flat_params(model), opt.metrics().as_floats(), str(opt.state_dict())))
    assert_same_bits(runs[1][0], runs[0][0], name)
    assert runs[1][1:] == runs[0][1:]


def test_state_by_parameter_names():
    """torch's recipe for named parameters: a hook sorts the saved state by name, here after the layers changed."""
    model, other = make_model(), make_model()
    opt = CraftOptimizer(model.named_parameters(), lr=1e-2)
    for batch in batches(2):
        plain_step(model, opt, batch)
    turned = CraftOptimizer(reversed(list(other.named_parameters())), lr=1e-2)

    def by_name(target, state):
        numbers = dict(zip(state["param_groups"][0]["param_names"], state["param_groups"][0]["params"], strict=True))
        names = target.param_groups[0]["param_names"]
        entries = {i: state["state"][numbers[name]] for i, name in enumerate(names)}
        group = {**state["param_groups"][0], "params": list(range(len(names))), "param_names": names}
        return {"state": entries, "param_groups": [group]}

    turned.register_load_state_dict_pre_hook(by_name)
    turned.load_state_dict(copy.deepcopy(opt.state_dict()))
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert_same_bits(turned.state[q]["exp_avg"], opt.state[p]["exp_avg"], name)
    assert turned.state_dict()["param_groups"][0]["param_names"][0] == "3.bias"


def test_state_dict_hooks_see_the_dual_state():
    """A hook that renames or moves entries has all of them before it, λ too."""
    model = make_model()
    opt = CraftOptimizer(model.named_parameters(), lr=1e-2)

    def by_name(target, state):
        names = target.param_groups[0]["param_names"]
        state["state"] = {names[i]: entry for i, entry in state["state"].items()}
        return state

    opt.register_state_dict_post_hook(by_name)
    plain_step(model, opt, batches(1)[0])
    saved = opt.state_dict()["state"]
    assert list(saved) == [name for name, _ in model.named_parameters()]
    assert saved["0.weight"]["craft_dual"]["t"].item() == 1


# -- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_parameters_moved_between_devices():
    """CPU to GPU and back after construction and between steps; AdamW's state would stay behind."""
    (model, ours), (twin, theirs) = models()
    for i, batch in enumerate(batches(6)):
        model.to("cuda" if i in (1, 2, 5) else "cpu")
        here = tuple(x.to(next(model.parameters()).device) for x in batch)
        plain_step(model, ours, here)
        plain_step(twin, theirs, batch)
        assert_norm_close(flat_params(model).cpu(), flat_params(twin), 1e-5, f"step {i}")
    assert all(state["step"].item() == 6 for state in ours.state.values())


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_every_form_of_parameter_on_a_gpu(backend):
    params = [Parameter(p.detach().cuda()) for p in odd_parameters(torch.float32)]
    wide = wide_copy(params)
    ours = CraftOptimizer(params, lr=1e-2, max_grad_norm=None, backend=backend)
    theirs = torch.optim.AdamW(wide, lr=1e-2)
    pairs = list(zip(params, wide, strict=True))
    for _ in range(4):
        lockstep(pairs, ours, theirs, [torch.randn(p.shape, device="cuda") for p in params])
