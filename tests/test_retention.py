import pytest
import torch

from craft_opt.retention import POOLINGS, feature_loss, pool_features, token_ce_above, token_kl

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


# -- tokens ----------------------------------------------------------------------------------------------------------

VOCABULARY = 11
# log_softmax, exp and the sum of the teacher's stored probabilities round at 6e-8 each, a few of them a position.
AT_TEACHER = 1e-6


def token_problem(scale=1.0, top=3, seed=0):
    """Student and teacher logits, the teacher's top tokens, hard tokens, a ragged mask."""
    gen = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(4, 6, VOCABULARY, generator=gen) for _ in range(2))
    logprobs, ids = teacher.log_softmax(-1).topk(top, dim=-1)
    tokens = torch.randint(VOCABULARY, (4, 6), generator=gen)
    mask = torch.arange(6) < torch.tensor([6, 4, 1, 0])[:, None]
    return student, teacher, ids, logprobs, tokens, mask


def merged_kl(student, teacher, ids):
    """The definition in fp64: the tail of the vocabulary is one outcome."""
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    tail = torch.ones_like(p, dtype=torch.bool).scatter(-1, ids, False)
    p, q = (torch.cat([d.gather(-1, ids), (d * tail).sum(-1, keepdim=True)], -1) for d in (p, q))
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("top", [1, 3, VOCABULARY - 1])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 5.0])
def test_token_kl_is_its_definition(scale, top):
    student, teacher, ids, logprobs, _, mask = token_problem(scale, top)
    expected = merged_kl(student, teacher, ids)[mask].mean()
    # atol: each of k + 1 terms rounds at 6e-8 of a probability.
    torch.testing.assert_close(token_kl(student, ids, logprobs, mask).double(), expected, rtol=1e-5, atol=1e-6)


def test_token_kl_over_the_whole_vocabulary_is_torchs():
    student, teacher, ids, logprobs, _, mask = token_problem(top=VOCABULARY)
    expected = torch.nn.functional.kl_div(
        student.log_softmax(-1)[mask], teacher.log_softmax(-1)[mask], log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(token_kl(student, ids, logprobs, mask), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0, 300.0])
def test_token_kl_is_never_negative_and_zero_at_the_teacher(scale, seed):
    student, teacher, ids, logprobs, _, mask = token_problem(scale, seed=seed)
    drift = token_kl(student, ids, logprobs, mask).item()
    assert drift >= -AT_TEACHER
    assert drift != pytest.approx(0.0, abs=0.1) or scale < 1
    assert token_kl(teacher, ids, logprobs, mask).item() == pytest.approx(0.0, abs=AT_TEACHER)


@pytest.mark.parametrize("top", [2, VOCABULARY])
def test_the_gradient_of_token_kl_is_right_and_zero_at_the_teacher(top):
    student, teacher, ids, logprobs, _, mask = token_problem(top=top)
    student = student.requires_grad_()
    token_kl(student, ids, logprobs, mask).backward()
    exact = student.detach().double().requires_grad_()
    merged_kl(exact, teacher, ids)[mask].mean().backward() if top < VOCABULARY else torch.nn.functional.kl_div(
        exact.log_softmax(-1)[mask], teacher.double().log_softmax(-1)[mask], log_target=True, reduction="batchmean"
    ).backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)
    at_teacher = teacher.clone().requires_grad_()
    token_kl(at_teacher, ids, logprobs, mask).backward()
    assert at_teacher.grad.abs().max() < 1e-7, "nothing pulls the teacher away from itself"


def test_a_certain_teacher_gives_finite_numbers():
    """Probabilities that are 0 in fp32, in the top tokens and in the tail, on either side."""
    student, teacher, *_, mask = token_problem(scale=1.0)
    teacher = teacher.masked_fill(torch.arange(VOCABULARY) > 0, -torch.inf)
    logprobs, ids = teacher.log_softmax(-1).topk(2, dim=-1)
    student = (1e3 * student).requires_grad_()
    loss = token_kl(student, ids, logprobs, mask)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_ce_above_is_its_definition_and_zero_at_the_teacher():
    student, teacher, *_, tokens, mask = token_problem()
    entropies = {}
    for name, logits in (("student", student), ("teacher", teacher)):
        each = torch.nn.functional.cross_entropy(logits.mT, tokens, reduction="none") * mask
        entropies[name] = each.sum(-1) / mask.sum(-1).clamp(min=1)
    expected = (entropies["student"] - entropies["teacher"])[:3].mean()
    torch.testing.assert_close(token_ce_above(student, tokens, mask, entropies["teacher"]), expected)
    assert token_ce_above(teacher, tokens, mask, entropies["teacher"]).item() == pytest.approx(0.0, abs=AT_TEACHER)


@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_tokens_that_do_not_count_do_not_count_even_when_not_finite(kind):
    student, _, ids, logprobs, tokens, mask = token_problem()

    def loss(logits, logprobs, tokens):
        return (
            token_kl(logits, ids, logprobs, mask)
            if kind == "kl"
            else token_ce_above(logits, tokens, mask, torch.zeros(4))
        )

    clean = loss(student, logprobs, tokens)
    dirty = student.masked_fill(~mask[..., None], torch.inf).requires_grad_()
    found = loss(dirty, logprobs.masked_fill(~mask[..., None], torch.nan), tokens.masked_fill(~mask, -1))
    assert torch.equal(found, clean)
    found.backward()
    assert dirty.grad[~mask].abs().sum() == 0
    assert dirty.grad[mask].abs().sum() > 0


def test_no_token_that_counts_is_no_loss():
    student, _, ids, logprobs, tokens, mask = token_problem()
    nothing = torch.zeros_like(mask)
    assert token_kl(student, ids, logprobs, nothing).item() == 0
    assert token_ce_above(student, tokens, nothing, torch.zeros(4)).item() == 0


def test_tokens_of_other_shapes_are_refused():
    student, _, ids, logprobs, tokens, mask = token_problem()
    with pytest.raises(ValueError, match=r"mask of shape \(4, 5\)"):
        token_kl(student, ids, logprobs, mask[:, :5])
    with pytest.raises(ValueError, match=r"must have shape \(4, 6, k\), got \(4, 6, 3\) and \(4, 6, 2\)"):
        token_kl(student, ids, logprobs[..., :2], mask)
    with pytest.raises(ValueError, match=r"teacher_ce \(4,\), got \(4, 6\) and \(3,\)"):
        token_ce_above(student, tokens, mask, torch.zeros(3))
