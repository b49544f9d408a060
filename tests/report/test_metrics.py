"""The metrics against values worked out by hand, and the identities that hold between them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import binomtest

from craft_opt.bridge.report import metrics
from craft_opt.bridge.report.metrics import Difference, PairedBootstrap, percentile_interval, wilson

# Four skills, two of them pre-trained, in three stages.
LEARNED = (0, 0, 1, 2)
R = np.array(
    [
        [1.0, 0.8, 0.0, 0.1],
        [0.6, 0.9, 1.0, 0.0],
        [0.5, 0.4, 0.7, 0.9],
    ]
)
CURVES = {2: (0.0, 0.5, 1.0), 3: (0.0, 0.3, 0.9)}


def test_values_worked_out_by_hand():
    assert metrics.average_success(R) == pytest.approx((0.5 + 0.4 + 0.7 + 0.9) / 4)
    assert metrics.old_success(R, LEARNED) == pytest.approx(0.45)
    assert metrics.new_success(R, LEARNED) == pytest.approx(0.8)
    assert metrics.kept_of_before(R, LEARNED) == pytest.approx(0.45 / 0.9)
    # Best before the last stage: 1.0, 0.9 (which came after it was learned), 1.0; the last skill does not count.
    assert metrics.forgetting(R, LEARNED) == pytest.approx((0.5 + 0.5 + 0.3) / 3)
    # 1.0 − mean(0.6, 0.5), 0.8 − mean(0.9, 0.4), 1.0 − 0.7
    assert metrics.nbt(R, LEARNED) == pytest.approx((0.45 + 0.15 + 0.3) / 3)
    assert metrics.fwt(CURVES) == pytest.approx((0.5 + 0.4) / 2)
    # (1.0 + 0.6 + 0.5)/3, (0.8 + 0.9 + 0.4)/3, (0.5 + 0.7)/2, 0.4/1
    assert metrics.auc(R, LEARNED, CURVES) == pytest.approx((0.7 + 0.7 + 0.6 + 0.4) / 4)


def matrices(stages=3, skills=4):
    return hnp.arrays(np.float64, (2, stages, skills), elements=st.floats(0, 1))


@given(matrices())
def test_leading_axes_give_each_matrix_its_own_value(success):
    for function in (
        metrics.average_success,
        lambda r: metrics.old_success(r, LEARNED),
        lambda r: metrics.new_success(r, LEARNED),
        lambda r: metrics.kept_of_before(r, LEARNED),
        lambda r: metrics.forgetting(r, LEARNED),
        lambda r: metrics.nbt(r, LEARNED),
        lambda r: metrics.auc(r, LEARNED, CURVES),
    ):
        together = function(success)
        assert together.shape == (2,)
        np.testing.assert_array_equal(together, [function(success[0]), function(success[1])])


@given(matrices())
def test_nothing_is_forgotten_where_nothing_changes_after_it_was_learned(success):
    for k, stage in enumerate(LEARNED):
        success[:, stage:, k] = success[:, stage : stage + 1, k]
        success[:, :stage, k] = 0
    np.testing.assert_allclose(metrics.nbt(success, LEARNED), 0, atol=1e-12)
    np.testing.assert_allclose(metrics.forgetting(success, LEARNED), 0, atol=1e-12)
    np.testing.assert_allclose(
        metrics.average_success(success), np.stack([success[:, s, k] for k, s in enumerate(LEARNED)]).mean(axis=0)
    )


@given(matrices(stages=2, skills=3))
def test_with_two_stages_forgetting_and_nbt_are_the_loss_of_the_old_skills(success):
    learned = (0, 0, 1)
    lost = success[:, 0, :2].mean(axis=-1) - success[:, 1, :2].mean(axis=-1)
    np.testing.assert_allclose(metrics.nbt(success, learned), lost, atol=1e-12)
    np.testing.assert_allclose(metrics.forgetting(success, learned), lost, atol=1e-12)
    np.testing.assert_allclose(
        3 * metrics.average_success(success),
        2 * metrics.old_success(success, learned) + metrics.new_success(success, learned),
        atol=1e-12,
    )


@given(matrices())
def test_the_area_is_the_average_of_success_where_learning_takes_no_time(success):
    """With a curve that is at its end throughout, AUC_k is the mean of skill k's success from its stage on."""
    first = success[0]
    curves = {k: [first[stage, k]] * 3 for k, stage in enumerate(LEARNED) if stage > 0}
    expected = np.mean([first[stage:, k].mean() for k, stage in enumerate(LEARNED)])
    assert metrics.auc(first, LEARNED, curves) == pytest.approx(expected)


def test_what_has_no_value_is_refused():
    with pytest.raises(ValueError, match="no skill was learned before the last of 1 stages"):
        metrics.nbt(R[:1], (0, 0, 0, 0))
    with pytest.raises(ValueError, match="no skill was learned before the last"):
        metrics.forgetting(R, (2, 2, 2, 2))
    with pytest.raises(ValueError, match="there is none"):
        metrics.fwt({})
    with pytest.raises(ValueError, match=r"missing: \[2\]"):
        metrics.auc(R, LEARNED, {3: (0.0, 1.0)})


def test_kept_where_the_teacher_could_do_nothing():
    zero = np.zeros((2, 2))
    assert metrics.kept_of_before(zero, (0, 1)) == 1
    assert metrics.kept_of_before(np.array([[0.0, 0.0], [0.5, 0.0]]), (0, 1)) == np.inf


@pytest.mark.parametrize(("hits", "rollouts"), [(0, 50), (1, 50), (25, 50), (49, 50), (50, 50), (7, 20), (120, 150)])
def test_wilsons_interval_is_scipys(hits, rollouts):
    expected = binomtest(hits, rollouts).proportion_ci(method="wilson")
    assert wilson(hits, rollouts) == pytest.approx((expected.low, expected.high), abs=1e-12)


# -- bootstrap -------------------------------------------------------------------------------------------------------


def outcomes(rates, seeds=3, rollouts=50, seed=1):
    """[seeds, stages, skills, rollouts] with these success rates [stages, skills]."""
    rng = np.random.default_rng(seed)
    return rng.random((seeds, *np.shape(rates), rollouts)) < np.asarray(rates)[..., None]


def drawn_difference(first, second, statistic):
    seeds, _, skills, rollouts = first.shape
    bootstrap = PairedBootstrap(seeds, skills, rollouts)
    values = [bootstrap.values(bootstrap.resample(found), statistic) for found in (first, second)]
    return percentile_interval(values[0] - values[1])


def test_the_same_method_differs_from_itself_by_nothing():
    found = outcomes([[0.9, 0.2], [0.5, 0.7]])
    assert drawn_difference(found, found.copy(), metrics.average_success) == (0.0, 0.0)


def test_pairing_narrows_the_interval():
    """Two methods that succeed on the same rollouts but for a few: their difference is known far better than either."""
    first = outcomes([[0.5], [0.5]])
    second = first.copy()
    second[:, -1, :, :2] = False
    low, high = drawn_difference(first, second, metrics.average_success)
    bootstrap = PairedBootstrap(3, 1, 50)
    alone = percentile_interval(bootstrap.values(bootstrap.resample(first), metrics.average_success))
    assert high - low < 0.5 * (alone[1] - alone[0])
    assert low >= 0


def test_the_interval_of_a_mean_is_the_binomials():
    """One seed, many rollouts: ±1.96 √(p(1−p)/n)."""
    found = outcomes([[0.3], [0.3]], seeds=1, rollouts=2000)
    rate = found[:, -1].mean()
    bootstrap = PairedBootstrap(1, 1, 2000)
    low, high = percentile_interval(bootstrap.values(bootstrap.resample(found), metrics.average_success))
    half = 1.96 * np.sqrt(rate * (1 - rate) / 2000)
    # 2000 resamples know a 2.5 % quantile to about 5 % of the half width.
    assert (low, high) == pytest.approx((rate - half, rate + half), abs=0.15 * half)


def test_seeds_are_resampled_too():
    """Rollouts that all agree within a seed, and seeds that do not: the interval spans the seeds."""
    found = np.zeros((3, 2, 1, 50), dtype=bool)
    found[0, -1] = True
    bootstrap = PairedBootstrap(3, 1, 50)
    assert percentile_interval(bootstrap.values(bootstrap.resample(found), metrics.average_success)) == (0.0, 1.0)


def test_skills_and_seeds_are_drawn_apart():
    """Two skills and two seeds with the same outcomes are no less than four samples: half the spread of one."""
    found = np.tile(outcomes([[0.5], [0.5]], seeds=1, rollouts=400), (2, 1, 2, 1))
    bootstrap = PairedBootstrap(2, 2, 400)
    drawn = bootstrap.resample(found)[:, :, -1]
    spread = np.sqrt(0.25 / 400)
    # 2000 resamples know a standard deviation to 1.6 %.
    assert drawn[:, 0, 0].std() == pytest.approx(spread, rel=0.1)
    assert drawn.mean(axis=(1, 2)).std() == pytest.approx(spread / 2, rel=0.1)


def test_resamples_are_the_same_every_time_and_means_of_outcomes():
    found = outcomes([[0.5, 0.1], [0.4, 0.8]], rollouts=7)
    first, second = (PairedBootstrap(3, 2, 7).resample(found) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (metrics.RESAMPLES, 3, 2, 2)
    np.testing.assert_allclose(first.mean(axis=0), found.mean(axis=-1), atol=0.02)
    np.testing.assert_allclose(first * 7, np.round(first * 7), atol=1e-9, err_msg="seven rollouts are drawn")


def test_a_tie_holds_zero():
    assert Difference(0.1, -0.01, 0.2).is_tie
    assert Difference(0.1, 0.0, 0.2).is_tie
    assert not Difference(0.1, 0.01, 0.2).is_tie
    assert not Difference(-0.1, -0.2, -0.01).is_tie
