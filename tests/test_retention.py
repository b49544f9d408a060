import pytest
import torch

from craft_opt.retention import POOLINGS, feature_loss, pool_features

KINDS = ("nmse", "mse", "cosine", "l1")


@pytest.fixture
def features():
    gen = torch.Generator().manual_seed(0)
    return torch.randn(4, 6, 8, generator=gen), torch.randn(4, 6, 8, generator=gen)


@pytest.mark.parametrize("kind", KINDS)
def test_no_drift_is_zero_and_drift_is_positive(kind, features):
    student, teacher = features
    assert feature_loss(teacher, teacher, kind=kind, teacher_var=1.0).abs().item() < 1e-6
    assert feature_loss(student, teacher, kind=kind, teacher_var=1.0).item() > 0.1


def test_losses_are_their_definitions(features):
    s, t = features
    torch.testing.assert_close(feature_loss(s, t, kind="mse"), torch.nn.functional.mse_loss(s, t))
    torch.testing.assert_close(feature_loss(s, t, kind="l1"), torch.nn.functional.l1_loss(s, t))
    torch.testing.assert_close(feature_loss(s, t, kind="nmse", teacher_var=4.0), torch.nn.functional.mse_loss(s, t) / 4)
    torch.testing.assert_close(
        feature_loss(s, t, kind="cosine"), 1 - torch.nn.functional.cosine_similarity(s, t, dim=-1).mean()
    )


def test_nmse_does_not_depend_on_the_unit_of_the_features(features):
    s, t = features
    var = t.var().item()
    one = feature_loss(s, t, kind="nmse", teacher_var=var)
    thousand = feature_loss(1e3 * s, 1e3 * t, kind="nmse", teacher_var=1e6 * var)
    torch.testing.assert_close(one, thousand)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_positions_do_not_count_even_when_not_finite(kind, features):
    s, t = features
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:, :3] = True
    expected = feature_loss(s[:, :3], t[:, :3], kind=kind, teacher_var=2.0)
    dirty = s.clone()
    dirty[:, 3:] = torch.inf
    torch.testing.assert_close(feature_loss(dirty, t, mask, kind, 2.0), expected)


def test_gradients_of_masked_positions_are_zero(features):
    s, t = features
    s = s.clone().requires_grad_()
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, 0] = True
    feature_loss(s, t, mask, "nmse", 1.0).backward()
    assert s.grad[0, 0].abs().sum() > 0
    assert s.grad[1:].abs().sum() == 0


def test_the_teacher_gets_no_gradient(features):
    s, t = features
    t = t.clone().requires_grad_()
    feature_loss(s.clone().requires_grad_(), t, kind="mse").backward()
    assert t.grad is None


def test_half_precision_features_give_a_fp32_loss(features):
    s, t = features
    assert feature_loss(s.bfloat16(), t.bfloat16(), kind="mse").dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "l2"}, "nmse, mse, cosine, l1"),
        ({"teacher": torch.zeros(4, 6, 9)}, r"\(4, 6, 9\)"),
        ({"mask": torch.ones(4, 5, dtype=torch.bool)}, r"\(4, 6\)"),
        ({"kind": "nmse"}, "needs teacher_var"),
        ({"kind": "nmse", "teacher_var": 0.0}, "above 0"),
    ],
)
def test_bad_input_is_refused(change, match, features):
    s, t = features
    with pytest.raises(ValueError, match=match):
        feature_loss(**{"student": s, "teacher": t, "kind": "mse", **change})


@pytest.fixture
def sequence():
    hidden = torch.arange(2 * 5 * 3, dtype=torch.float32).reshape(2, 5, 3)
    valid = torch.tensor([[True] * 5, [True, True, True, False, False]])
    image = torch.tensor([[True, True, False, False, False]] * 2)
    action = torch.tensor([[False, False, False, True, True], [False, False, True, True, True]])
    return hidden, valid, image, action


def test_poolings_pick_the_positions_that_they_name(sequence):
    h, valid, image, action = sequence

    def pool(kind):
        return pool_features(h, kind, valid, image, action)

    torch.testing.assert_close(pool("mean_image_tokens")[0], h[:, :2].mean(dim=1))
    torch.testing.assert_close(pool("mean_masked")[0], torch.stack([h[0].mean(0), h[1, :3].mean(0)]))
    torch.testing.assert_close(pool("last_token")[0], torch.stack([h[0, 4], h[1, 2]]))
    torch.testing.assert_close(pool("cls_token")[0], h[:, 0])
    assert torch.equal(pool("none")[1], valid)
    assert torch.equal(pool("action_tokens")[1], valid & action)
    assert torch.equal(pool("action_tokens")[0], h)


@pytest.mark.parametrize("kind", POOLINGS)
def test_padding_never_reaches_the_loss(kind, sequence):
    h, valid, image, action = sequence
    clean, mask = pool_features(h, kind, valid, image, action)
    dirty, _ = pool_features(h.masked_fill(~valid.unsqueeze(-1), torch.nan), kind, valid, image, action)
    assert torch.equal(clean[mask], dirty[mask])


@pytest.mark.parametrize("kind", ["mean_image_tokens", "mean_masked", "last_token"])
def test_a_sample_with_nothing_to_pool_is_masked_out(kind, sequence):
    h, valid, image, action = sequence
    valid = valid.clone()
    valid[1] = False
    features, mask = pool_features(h, kind, valid, image, action)
    assert mask.tolist() == [True, False]
    assert features.isfinite().all()


def test_unknown_pooling_and_missing_masks_are_refused(sequence):
    h, valid, _, _ = sequence
    with pytest.raises(ValueError, match="mean_image_tokens"):
        pool_features(h, "mean", valid)
    with pytest.raises(ValueError, match="image_mask must have shape"):
        pool_features(h, "mean_image_tokens", valid)
    with pytest.raises(ValueError, match="action_mask must have shape"):
        pool_features(h, "action_tokens", valid, action_mask=torch.ones(2, 4, dtype=torch.bool))
