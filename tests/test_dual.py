import itertools
import math

import pytest
import torch

from craft_opt import CraftConfig
from craft_opt.dual import DualState, epsilon_schedule, update_lambda

SCHEDULES = ("linear", "cosine", "exponential")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.1), (0.3, 0.7), (1e-8, 1e8), (0.5, 0.5)])
def test_both_ends_are_reached_exactly(schedule, start, end):
    config = CraftConfig(epsilon_schedule=schedule, epsilon_start=start, epsilon_end=end, epsilon_decay_steps=7)
    assert epsilon_schedule(0, config) == start
    assert epsilon_schedule(7, config) == end
    assert epsilon_schedule(1000, config) == end


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_epsilon_falls_monotonically_between_its_ends(schedule):
    config = CraftConfig(epsilon_schedule=schedule, epsilon_start=1.0, epsilon_end=0.1, epsilon_decay_steps=50)
    values = [epsilon_schedule(t, config) for t in range(60)]
    assert all(a >= b for a, b in itertools.pairwise(values))
    assert max(values) == 1.0
    assert min(values) == 0.1


def test_the_logged_example_of_the_contract():
    config = CraftConfig(epsilon_start=1.0, epsilon_end=0.5)
    logged = [f"{epsilon_schedule(t, config, decay_steps=3):.3f}" for t in range(3)]
    assert logged == ["1.000", "0.833", "0.667"]


def test_halfway_values():
    def half(schedule):
        config = CraftConfig(epsilon_schedule=schedule, epsilon_start=1.0, epsilon_end=0.1, epsilon_decay_steps=10)
        return epsilon_schedule(5, config)

    assert half("linear") == pytest.approx(0.55, rel=1e-15)
    assert half("cosine") == pytest.approx(0.55, rel=1e-15)
    assert half("exponential") == pytest.approx(math.sqrt(0.1), rel=1e-15)


def test_without_a_length_epsilon_stays_at_its_start():
    assert epsilon_schedule(10**6, CraftConfig(epsilon_start=0.4, epsilon_decay_steps=0)) == 0.4


def test_negative_time_is_refused():
    with pytest.raises(ValueError, match="-1"):
        epsilon_schedule(-1, CraftConfig())


def test_lambda_is_projected_on_its_interval():
    config = CraftConfig(lambda_lr=1.0, lambda_max=2.0)
    assert update_lambda(1.9, 5.0, 1.0, config) == 2.0
    assert update_lambda(0.1, 0.0, 1.0, config) == 0.0
    assert update_lambda(1.0, 1.25, 1.0, config) == 1.25


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_leaves_lambda(bad):
    assert update_lambda(1.5, bad, 1.0, CraftConfig()) == 1.5


def test_lambda_reaches_the_multiplier_of_a_quadratic_program():
    # min ½(x-3)²  s.t.  ½x² <= ½.  At the optimum x = 1 and (x - 3) + λ x = 0, so λ = 2 exactly.
    config = CraftConfig(lambda_lr=0.05, lambda_max=10.0)
    x = torch.tensor(0.0, dtype=torch.float64)
    lam = torch.tensor(1.0, dtype=torch.float64)
    for _ in range(4000):
        x = x - 0.05 * ((x - 3.0) + lam * x)
        lam = update_lambda(lam, 0.5 * x * x, 0.5, config)
    assert lam.item() == pytest.approx(2.0, abs=1e-6)
    assert x.item() == pytest.approx(1.0, abs=1e-6)


def test_dual_state_round_trips():
    config = CraftConfig()
    state = DualState(torch.tensor([3.25, 17.0, 2.0, 0.5, -0.25], dtype=torch.float64))
    other = DualState.create(config, "cpu")
    other.load_state_dict(state.state_dict(), config)
    assert torch.equal(other.vector, state.vector)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lam": torch.tensor(11.0)}, "lambda_max = 10"),
        ({"lam": torch.tensor(-1.0)}, "lambda_max = 10"),
        ({"lam": torch.tensor(math.nan)}, "lambda_max = 10"),
        ({"lam": torch.ones(2)}, "scalar"),
        ({"t": torch.tensor(-1)}, "whole numbers"),
        ({"skipped": torch.tensor(0.5)}, "whole numbers"),
    ],
)
def test_a_dual_state_out_of_range_is_refused_and_changes_nothing(change, match):
    config = CraftConfig()
    state = DualState.create(config, "cpu")
    before = state.vector.clone()
    with pytest.raises(ValueError, match=match):
        state.load_state_dict({**state.state_dict(), **change}, config)
    assert torch.equal(state.vector.nan_to_num(-7.0), before.nan_to_num(-7.0))


def test_a_dual_state_with_a_missing_entry_is_refused():
    config = CraftConfig()
    with pytest.raises(ValueError, match="no entry 't'"):
        DualState.create(config, "cpu").load_state_dict({"lam": torch.tensor(1.0)}, config)
