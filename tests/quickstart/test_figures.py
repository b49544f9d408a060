"""The table and the picture, from made-up figures."""

import json

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from craft_opt.bridge.quickstart import figures
from craft_opt.bridge.quickstart.figures import picture, table
from craft_opt.bridge.quickstart.measure import SkillScore

BEFORE = [
    SkillScore("drawer", 19, 20, 1.25),
    SkillScore("button-press", 20, 20, 0.5),
    SkillScore("window", 0, 20, 9.999),
]
AFTER = [SkillScore("drawer", 1, 20, 3.0), SkillScore("button-press", 10, 20, 12.5), SkillScore("window", 20, 20, 0.0)]


def step(number, **changes):
    values = {
        "step": number,
        "loss": 2.0 / number,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "update_s": 0.1,
        "data_s": 0.0,
        "mode": "hidden",
        "skipped": False,
        "skipped_steps": 0,
    }
    return values | changes


def retained(number, **changes):
    measured = {
        "retention_loss": 0.2 * number,
        "lambda": 1.0 + 0.1 * number,
        "epsilon": 1.0 - 0.1 * number,
        "conflict": number % 2 == 0,
        "dot": -0.1,
        "cos": -0.2 if number % 2 == 0 else 0.3,
    }
    return step(number) | measured | changes


@pytest.fixture
def draw(tmp_path):
    def drawn(name, steps):
        metrics, file = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.png"
        metrics.write_text("".join(json.dumps(values) + "\n" for values in steps))
        picture(file, metrics, BEFORE, AFTER, 2, name)
        return imread(file)[..., :3]

    return drawn


def count(pixels, colour):
    return int((np.abs(pixels - to_rgb(colour)).max(axis=-1) < 0.02).sum())


def quadrants(image):
    """Losses, λ, cosine, success."""
    middle, centre = image.shape[0] // 2, image.shape[1] // 2
    return image[:middle, :centre], image[:middle, centre:], image[middle:, :centre], image[middle:, centre:]


def test_the_table_to_the_letter():
    assert table(BEFORE, AFTER, 2).splitlines() == [
        "    | skill        | success before | success after | action CE before | action CE after",
        "----+--------------+----------------+---------------+------------------+----------------",
        "old | drawer       | 0.95 (19/20)   | 0.05 (1/20)   | 1.25             | 3.00",
        "old | button-press | 1.00 (20/20)   | 0.50 (10/20)  | 0.50             | 12.50",
        "new | window       | 0.00 (0/20)    | 1.00 (20/20)  | 10.00            | 0.00",
    ]


def test_scores_of_different_skills_are_no_table():
    with pytest.raises(ValueError, match="shorter"):
        table(BEFORE, AFTER[:2], 2)


def test_the_picture_shows_retention_where_there_was_retention(draw):
    with_retention = quadrants(draw("hidden", [retained(n) for n in range(1, 9)]))
    without = quadrants(draw("none", [step(n) for n in range(1, 9)]))
    losses, dual, cosine, success = with_retention
    assert count(losses, figures._TASK) > 50
    assert count(losses, figures._RETENTION) > 50
    assert count(dual, figures._LAMBDA) > 50
    assert count(dual, figures._RETENTION) > 50
    assert count(cosine, figures._CONFLICT) > 50
    assert count(success, figures._LAMBDA) > 1000

    losses, dual, cosine, success = without
    assert count(losses, figures._TASK) > 50
    assert count(losses, figures._RETENTION) == 0
    assert count(dual, figures._LAMBDA) == count(dual, figures._RETENTION) == 0
    assert count(cosine, figures._TASK) == count(cosine, figures._CONFLICT) == 0
    assert count(success, figures._LAMBDA) > 1000


def test_retention_now_and_then_is_drawn_where_it_was_measured(draw):
    sparse = [retained(n) if n % 4 == 1 else step(n) for n in range(1, 10)]
    assert count(quadrants(draw("sparse", sparse))[0], figures._RETENTION) > 50


@pytest.mark.parametrize(
    "steps",
    [
        [retained(1), retained(2, loss=None, skipped=True), retained(3, cos=None), retained(4, retention_loss=None)],
        [step(1, loss=None), step(2, loss=None)],
        [retained(1, loss=None, retention_loss=None, dot=None, cos=None, grad_norm=None)],
        [retained(1, retention_loss=0.0), retained(2)],
        [retained(1)],
    ],
    ids=["some", "every-loss", "every-value", "no-drift", "one-step"],
)
def test_values_that_were_not_finite_leave_gaps(draw, steps):
    assert count(draw("gaps", steps), figures._LAMBDA) > 1000, "the bars are there whatever the curves are"
