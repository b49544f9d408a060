import dataclasses
import math

import pytest

from craft_opt import CraftConfig


def test_defaults_are_valid_and_frozen():
    config = CraftConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.enabled = False


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("retention_mode", "hiden", "hidden, token_ce"),
        ("retention_loss", "l2", "nmse, mse, cosine, l1"),
        ("epsilon_schedule", "step", "linear, cosine, exponential"),
        ("projection_mode", "sum", "weighted, equal, task_priority"),
        ("anchor_batch_size", 0, "at least 1"),
        ("retention_freq", 0, "at least 1"),
        ("epsilon_decay_steps", -1, "at least 0"),
        ("lambda_lr", -0.01, "at least 0"),
        ("lambda_lr", math.nan, "at least 0"),
        ("lambda_max", -1.0, "at least 0"),
        ("lambda_max", math.inf, "finite"),
        ("initial_lambda", -1.0, "lambda_max = 10"),
        ("initial_lambda", 10.5, "lambda_max = 10"),
        ("epsilon_start", -0.1, "at least 0"),
        ("epsilon_end", math.inf, "finite"),
        ("conflict_threshold", -1.01, "[-1, 1]"),
        ("conflict_threshold", 1.01, "[-1, 1]"),
        ("retention_freq", 2.5, "int"),
        ("anchor_batch_size", True, "int"),
        ("enabled", 1, "bool"),
        ("anchor_cache_dir", None, "str"),
    ],
)
def test_bad_value_is_refused_with_name_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError) as caught:
        CraftConfig(**{name: value})
    message = str(caught.value)
    assert name in message
    assert repr(value) in message
    assert allowed in message


def test_exponential_schedule_needs_positive_ends():
    with pytest.raises(ValueError, match="epsilon_end=0"):
        CraftConfig(epsilon_schedule="exponential", epsilon_end=0.0)


def test_replay_goes_with_features():
    with pytest.raises(ValueError, match=r"replay_weight=0\.3 adds to the features' gradient"):
        CraftConfig(retention_mode="token_ce", replay_weight=0.3)
    with pytest.raises(ValueError, match="replay_weight must be finite and at least 0"):
        CraftConfig(replay_weight=-1.0)


def test_an_int_serves_as_a_float():
    assert CraftConfig(initial_lambda=2).initial_lambda == 2
