"""Several processes: replicas and shards do what one process does on the global batch, and all of them the same."""

import pytest
import torch

from tests.optimizer import process_cases as cases
from tests.optimizer.models import batches, make_model
from tests.support.asserts import assert_norm_close, assert_same_bits
from tests.support.worlds import run_world

REUSE = {"settings": cases.config(off_steps="reuse", retention_freq=3)}
TWO = {
    "ddp numba": ("replicas", {}),
    "ddp torch": ("replicas", {"backend": "torch"}),
    "ddp K=3": ("replicas", {"every": 3}),
    "ddp reuse": ("replicas", {"every": 3, **REUSE}),
    "ddp reuse torch": ("replicas", {"every": 3, "backend": "torch", **REUSE}),
    "ddp accumulated": ("replicas", {"micro": 2, "sync_each": False}),
    "ddp accumulated, averaged each": ("replicas", {"micro": 2, "backend": "torch"}),
    "fsdp numba": ("shards", {}),
    "fsdp torch": ("shards", {"backend": "torch"}),
    "fsdp reuse": ("shards", {"every": 3, **REUSE}),
    "fsdp reuse torch": ("shards", {"every": 3, "backend": "torch", **REUSE}),
    "fsdp bf16": ("shards_in_bf16", {}),
    "ddp bf16": ("replicas", {"dtype": torch.bfloat16}),
    "reached by one": ("reached_by_one", {}),
    "reached by one torch": ("reached_by_one", {"backend": "torch"}),
    **{
        f"spoiled {where} {kind}": ("spoiled", {"where": where, "shard": kind == "fsdp", "backend": backend})
        for where in ("task", "retention", "loss")
        for kind, backend in (("ddp", "numba"), ("ddp", "torch"), ("fsdp", "numba"))
    },
    "exact ddp": ("exact_losses", {}),
    "exact fsdp": ("exact_losses", {"shard": True}),
    "scaled ddp": ("scaled", {}),
    "scaled fsdp": ("scaled", {"shard": True}),
    "refusals": ("refusals", {}),
    "save": ("save_shards", {}),
    "200 steps": ("many_steps", {}),
}
FOUR = {
    "ddp numba": ("replicas", {}),
    "fsdp numba": ("shards", {}),
    "hybrid": ("hybrid_shards", {}),
    "exact ddp": ("exact_losses", {}),
    "exact fsdp": ("exact_losses", {"shard": True}),
    "load": ("load_shards", {}),
    "load full": ("load_shards", {"full": True}),
    "spoiled retention fsdp": ("spoiled", {"where": "retention", "shard": True}),
}


@pytest.fixture
def cpu_backend():
    """Of the room's conftest: here every case names its backend."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def two(folder):
    return run_world(2, cases.__name__, TWO, folder)


@pytest.fixture(scope="module")
def four(two, folder):  # after two, which saves what four load
    return run_world(4, cases.__name__, FOUR, folder)


def alone(dtype=torch.float32, **kwargs):
    """The same in this process, on the global batch."""
    model = make_model(dtype=dtype)
    opt = cases.optimizer(model, kwargs.pop("backend", "numba"), settings=kwargs.pop("settings", None))
    seen = cases.loop(model, opt, batches(kwargs.pop("steps", 6), dtype=dtype), **kwargs)
    return seen, cases.whole(model)


def assert_alike(found, name):
    first = found[0][name]
    for other in found[1:]:
        assert_same_bits(other[name]["params"], first["params"], name)
        # nan is nan: steps without retention have none of its numbers.
        torch.testing.assert_close(
            torch.tensor(other[name]["seen"]), torch.tensor(first["seen"]), rtol=0, atol=0, equal_nan=True
        )
    return first


def assert_equals_one(first, name, seen, params):
    assert_norm_close(first["params"], params, 2e-6, name)
    ours, theirs = torch.tensor(first["seen"], dtype=torch.float64), torch.tensor(seen, dtype=torch.float64)
    # Means of means and sums of sums: fp32 rounding of the losses and gradients, nothing else.
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-7, equal_nan=True)
    for exact in (2, 6, 8):  # conflict, epsilon, skipped
        assert ours[:, exact].tolist() == theirs[:, exact].tolist()


FP32 = [name for name, (case, kwargs) in TWO.items() if case in ("replicas", "shards") and "dtype" not in kwargs]


@pytest.mark.parametrize("name", FP32)
def test_two_processes_equal_one_on_the_global_batch(two, name):
    kwargs = {key: value for key, value in TWO[name][1].items() if key not in ("sync_each", "micro")}
    assert_equals_one(assert_alike(two, name), name, *alone(**kwargs))


@pytest.mark.parametrize("name", ["exact ddp", "exact fsdp"])
def test_lambda_epsilon_and_conflicts_are_exactly_those_of_one_process(two, four, name):
    expected = cases.exact_losses(0, 1, None)["seen"]
    assert len({row[0] for row in expected}) == len(expected)
    for found in (*two, *four):
        assert found[name]["seen"] == expected


def test_the_steps_compared_are_of_both_kinds(two):
    assert {row[2] for row in two[0]["ddp numba"]["seen"]} == {True, False}


@pytest.mark.parametrize("name", ["ddp numba", "fsdp numba", "hybrid"])
def test_four_processes_equal_one(four, name):
    assert_equals_one(assert_alike(four, name), name, *alone())


def test_replicas_are_bitwise_equal_after_200_steps(two):
    seen = assert_alike(two, "200 steps")["seen"]
    assert len(seen) == 200 and {row[2] for row in seen} == {True, False}


def test_bf16_replicas_and_mixed_precision_shards_stay_alike(two):
    for name in ("ddp bf16", "fsdp bf16"):
        first = assert_alike(two, name)
        assert torch.isfinite(first["params"]).all()
    # Gradients in bf16, moments and masters in fp32: near the fp32 run, and not it.
    exact = two[0]["fsdp numba"]["params"]
    difference = (two[0]["fsdp bf16"]["params"] - exact).norm() / exact.norm()
    assert 1e-5 < difference < 2e-2


@pytest.mark.parametrize("name", ["reached by one", "reached by one torch"])
def test_a_parameter_that_one_process_reached_is_updated_in_all(two, name):
    first, second = two[0][name], two[1][name]
    assert_same_bits(first["params"], second["params"], name)
    assert first["untouched"] and second["untouched"]
    # Weight and bias of the first and the last layer, nothing of the middle one.
    assert first["state"] == second["state"] == [0, 1, 4, 5]


@pytest.mark.parametrize("name", [name for name in TWO if name.startswith("spoiled")])
def test_what_is_not_finite_in_one_process_skips_the_step_in_all(two, name):
    for found in two:
        first, second, third = found[name]["params"]
        assert found[name]["skipped"] == [0.0, 1.0, 0.0]
        assert_same_bits(second, first, "skipped")
        assert torch.isfinite(third).all() and not torch.equal(third, second)
    assert_same_bits(two[0][name]["params"][2], two[1][name]["params"][2], name)
    assert two[0][name]["lam"] == two[1][name]["lam"]


@pytest.mark.parametrize("name", ["scaled ddp", "scaled fsdp"])
def test_an_overflow_under_a_grad_scaler_skips_in_all(two, name):
    for found in two:
        assert found[name]["skipped"] == [0.0, 1.0, 0.0]
        assert found[name]["scale"] == 512.0
    assert_same_bits(two[0][name]["params"], two[1][name]["params"], name)


def test_a_skip_reaches_four_shards(four):
    assert all(found["spoiled retention fsdp"]["skipped"] == [0.0, 1.0, 0.0] for found in four)


REFUSED = {
    "no_ddp": "DistributedDataParallel",
    "other_parameters": "different parameters",
    "some_plain": "plain tensors beside DTensors",
    "tensor_parallel": "tensor parallelism",
    "fsdp1": "fsdp_version 2",
}


@pytest.mark.parametrize(("case", "words"), REFUSED.items())
def test_refused_with_a_sentence(two, case, words):
    for found in two:
        assert words in found["refusals"][case]


def test_processes_of_their_own_train_models_of_their_own(two):
    assert all(found["refusals"]["no_ddp_alone"] is None for found in two)


@pytest.mark.parametrize("name", ["load", "load full"])
def test_a_sharded_checkpoint_goes_on_in_another_world(two, four, name):
    saved = two[0]["save"]
    for found in four:
        assert_same_bits(found[name]["params"], saved["params"], "loaded weights")
        assert_norm_close(found[name]["after"], saved["after"], 2e-6, "three more steps")
        torch.testing.assert_close(
            torch.tensor(found[name]["last"]), torch.tensor(saved["last"]), rtol=2e-5, atol=1e-7, equal_nan=True
        )
        assert found[name]["attempted"] == saved["attempted"] == 6


def test_a_sharded_checkpoint_goes_on_in_one_process(two, folder):
    saved = two[0]["save"]
    found = cases.load_shards(0, 1, folder, full=True)
    assert_same_bits(found["params"], saved["params"], "loaded weights")
    assert_norm_close(found["after"], saved["after"], 2e-6, "three more steps")


def test_replicas_save_what_one_process_saves(two):
    model = make_model()
    opt = cases.optimizer(model)
    opt.load_state_dict(two[0]["ddp numba"]["state"])
    theirs = opt.state_dict()["state"]
    for number, state in two[1]["ddp numba"]["state"]["state"].items():
        assert_same_bits(state["exp_avg"], theirs[number]["exp_avg"], f"exp_avg of {number}")
