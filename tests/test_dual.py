import itertools
import math

import cooper.optim
import pytest
import torch

from craft_opt import CraftConfig
from craft_opt.dual import DualState, Multiplier, advance, epsilon_schedule, update_lambda

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


def _overshoot(config):
    """How far λ passes the multiplier of the quadratic program above, and where it ends."""
    x, state, top = 0.0, Multiplier(0.0), 0.0
    for _ in range(6000):
        x = x - 0.02 * ((x - 3.0) + state.lam * x)
        state = advance(state, 0.5 * x * x, 0.5, config)
        top = max(top, state.lam)
    return top - 2.0, state.lam, x


def test_the_proportional_gain_damps_what_plain_ascent_overshoots():
    ascent, lam_ascent, _ = _overshoot(CraftConfig(lambda_lr=0.1))
    nupi, lam_nupi, x = _overshoot(CraftConfig(lambda_lr=0.1, lambda_controller="nupi", nupi_kp=2.0, nupi_nu=0.5))
    assert lam_ascent == pytest.approx(2.0, abs=1e-6)
    assert lam_nupi == pytest.approx(2.0, abs=1e-6)
    assert x == pytest.approx(1.0, abs=1e-6)
    assert ascent > 0.2
    assert nupi < 0.1 * ascent


def _sequence(seed, count=60):
    gen = torch.Generator().manual_seed(seed)
    losses = (torch.randn(count, generator=gen, dtype=torch.float64).exp() * 0.8).tolist()
    return losses, (torch.rand(count, generator=gen) < 0.7).tolist(), gen


@pytest.mark.parametrize("seed", range(20))
def test_nupi_is_coopers(seed):
    losses, measured, gen = _sequence(seed)
    kp, ki, nu = torch.rand(3, generator=gen, dtype=torch.float64).tolist()
    config = CraftConfig(lambda_controller="nupi", lambda_lr=ki, nupi_kp=3 * kp, nupi_nu=0.95 * nu, lambda_max=2.5)
    # Cooper's gains are fp64 tensors here: as numbers they would be rounded to fp32.
    theirs = torch.nn.Parameter(torch.tensor(config.initial_lambda, dtype=torch.float64))
    gains = {
        "Kp": torch.tensor(config.nupi_kp, dtype=torch.float64),
        "Ki": torch.tensor(config.lambda_lr, dtype=torch.float64),
    }
    controller = cooper.optim.nuPI([theirs], lr=1.0, ema_nu=config.nupi_nu, maximize=True, **gains)
    ours = Multiplier(config.initial_lambda)
    met = set()
    for t, (loss, moves) in enumerate(zip(losses, measured, strict=True)):
        epsilon = 1.0 - 0.005 * t
        ours = advance(ours, loss, epsilon, config, moves)
        if moves:
            theirs.grad = torch.tensor(loss - epsilon, dtype=torch.float64)
            controller.step()
            with torch.no_grad():
                theirs.clamp_(0.0, config.lambda_max)
            # A dozen fp64 operations a step, on numbers up to 10, over 60 steps.
            assert ours.xi == pytest.approx(controller.state[theirs]["xi"].item(), abs=1e-12)
        assert ours.lam == pytest.approx(theirs.item(), abs=1e-12)
        met.add(ours.lam in (0.0, 2.5))
    assert False in met


@pytest.mark.parametrize("controller", ["ascent", "nupi"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_numbers_and_tensors_are_the_same_statement(controller, schedule):
    config = CraftConfig(
        lambda_controller=controller, lambda_lr=0.2, nupi_kp=0.7, nupi_nu=0.3, retention_ema=0.8, initial_lambda=0.5,
        epsilon_schedule=schedule, epsilon_start=1.0, epsilon_end=0.4, epsilon_decay_steps=20,
    )  # fmt: skip

    def scalar(value):
        return torch.tensor(value, dtype=torch.float64)

    losses, measured, _ = _sequence(99)
    numbers, tensors = Multiplier(0.5), Multiplier(*map(scalar, Multiplier(0.5)))
    for t, (loss, moves) in enumerate(zip(losses, measured, strict=True)):
        epsilon, epsilon_tensor = epsilon_schedule(float(t), config), epsilon_schedule(scalar(float(t)), config)
        assert type(epsilon) is float
        assert epsilon_tensor.dtype == torch.float64
        # Two libraries' powers and cosines: a unit or two in the last place.
        assert epsilon_tensor.item() == pytest.approx(epsilon, rel=1e-15)
        numbers = advance(numbers, loss, epsilon, config, moves)
        tensors = advance(tensors, scalar(loss), epsilon_tensor, config, torch.tensor(moves))
        assert all(type(x) is float for x in numbers)
        assert all(x.dtype == torch.float64 and x.shape == () for x in tensors)
        assert [x.item() for x in tensors] == pytest.approx(list(numbers), rel=1e-12, abs=1e-13, nan_ok=True)


def test_the_step_on_numbers_makes_no_tensor(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a tensor was made")

    for name in ("tensor", "as_tensor", "full_like", "where", "clamp", "isfinite"):
        monkeypatch.setattr(torch, name, refuse)
    config = CraftConfig(lambda_controller="nupi", retention_ema=0.5, epsilon_schedule="cosine", epsilon_decay_steps=9)
    state = Multiplier(1.0)
    for t in range(12):
        state = advance(state, 0.3, epsilon_schedule(t, config), config, t % 3 == 0)
    assert math.isfinite(state.lam)


def test_a_number_beside_tensors_is_read_in_full():
    config = CraftConfig(lambda_lr=0.0)
    found = advance(Multiplier(0.3, 0.1, 0.7), torch.tensor(2.0), 1.0, config)
    assert all(x.dtype == torch.float64 for x in found)
    assert (found.lam.item(), found.xi.item()) == (0.3, 0.7)


def test_the_running_average_starts_at_the_first_measurement():
    config = CraftConfig(retention_ema=0.75, lambda_lr=1.0, lambda_max=100.0)
    state = advance(Multiplier(0.0), 9.0, 1.0, config, moves=False)
    assert math.isnan(state.ema)
    state = advance(state, 4.0, 1.0, config)
    assert (state.lam, state.ema) == (3.0, 4.0)
    state = advance(state, 8.0, 1.0, config)
    assert (state.lam, state.ema) == (3.0 + 4.0, 5.0)
    assert advance(state, 8.0, 1.0, config, moves=False) == pytest.approx(state, nan_ok=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("controller", ["ascent", "nupi"])
def test_a_loss_that_is_not_finite_leaves_the_whole_state(bad, controller):
    state = Multiplier(1.5, 0.25, -0.125)
    assert advance(state, bad, 1.0, CraftConfig(lambda_controller=controller, retention_ema=0.5)) == state


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_extreme_numbers_raise_nothing(schedule):
    config = CraftConfig(
        epsilon_schedule=schedule, epsilon_start=1e-300, epsilon_end=1e300, epsilon_decay_steps=2, lambda_lr=1e300,
        lambda_controller="nupi", nupi_kp=1e10,
    )  # fmt: skip
    for t in (0, 1, 2, 10**9):
        assert 0.0 <= epsilon_schedule(float(t), config) <= 1e300 * (1 + 1e-12) or schedule == "exponential"
    state = Multiplier(1.0)
    for loss in (1e300, 0.0, 1e300, 1e-300):
        state = advance(state, loss, 1.0, config)
        assert 0.0 <= state.lam <= config.lambda_max


def test_dual_state_round_trips():
    config = CraftConfig()
    state = DualState(torch.tensor([3.25, 17.0, 2.0, 0.5, -0.25], dtype=torch.float64))
    other = DualState.create(config, "cpu")
    other.load_state_dict(state.state_dict(), config)
    assert torch.equal(other.vector, state.vector)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ema": torch.tensor(math.inf)}, "ema=inf"),
        ({"xi": torch.tensor(-math.inf)}, "xi=-inf"),
        ({"xi": torch.ones(3)}, "scalar"),
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


def test_a_dual_state_of_before_the_controllers_has_measured_nothing():
    config = CraftConfig()
    older = {"lam": torch.tensor(0.5, dtype=torch.float64), "t": torch.tensor(3), "skipped": torch.tensor(1)}
    state = DualState(torch.full((5,), 7.0, dtype=torch.float64))
    state.load_state_dict(older, config)
    assert state.vector[:3].tolist() == [0.5, 3.0, 1.0]
    assert bool(state.vector[3:].isnan().all())
    again = DualState.create(config, "cpu")
    again.load_state_dict(state.state_dict(), config)
    assert again.vector.tolist() == pytest.approx(state.vector.tolist(), nan_ok=True)
    assert {name: x.dtype for name, x in state.state_dict().items()} == {
        "lam": torch.float64,
        "t": torch.int64,
        "skipped": torch.int64,
        "ema": torch.float64,
        "xi": torch.float64,
    }
