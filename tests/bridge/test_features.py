"""Features: the positions and layers are those of the policy's own token loss, and stopping early changes nothing."""

import pytest
import torch
from lerobot.utils.constants import ACTION_TOKEN_MASK, ACTION_TOKENS
from torch.utils.data import default_collate

from craft_opt.bridge.features import (
    FeatureSpec,
    action_logits,
    features_and_token_loss,
    generated_tokens,
    hidden_features,
    language_model_of,
    predicting_positions,
)
from craft_opt.retention import POOLINGS
from tests.quickstart.support import make_tiny_dataset, make_tiny_policy

DEPTH = 3


@pytest.fixture(scope="module")
def policy_and_batch(tmp_path_factory):
    dataset = make_tiny_dataset(tmp_path_factory.mktemp("features") / "data", episodes=2, frames=6)
    torch.manual_seed(3)
    policy, preprocessor, _ = make_tiny_policy(dataset, depth=DEPTH)
    policy.eval()
    # Frame 4 is near an episode's end: its chunk is padded.
    batch = preprocessor(default_collate([dataset[i] for i in (0, 4, 7, 9)]))
    return policy, batch


@pytest.fixture(scope="module")
def own_forward(policy_and_batch):
    """Hidden states of the policy's own loss forward: after every layer, and after the final norm."""
    policy, batch = policy_and_batch
    language = language_model_of(policy)
    seen = []
    handles = [layer.register_forward_hook(lambda m, i, output: seen.append(output)) for layer in language.layers]
    handles.append(language.norm.register_forward_hook(lambda m, i, output: seen.append(output[0])))
    with torch.no_grad():
        policy(batch)
    for handle in handles:
        handle.remove()
    after = dict(enumerate(seen[:DEPTH], start=1))
    after[DEPTH] = seen[DEPTH]
    return after


def test_action_positions_are_bitwise_those_of_the_token_loss(policy_and_batch, own_forward):
    policy, batch = policy_and_batch
    length = batch[ACTION_TOKENS].shape[1]
    with torch.no_grad():
        features = hidden_features(policy, batch, FeatureSpec((1, 2, 3), "action_tokens"))
    for layer in (1, 2, 3):
        assert torch.equal(features.by_layer[layer], own_forward[layer][:, -length:])


def test_the_mask_marks_what_the_token_loss_reads(policy_and_batch):
    policy, batch = policy_and_batch
    with torch.no_grad():
        features = hidden_features(policy, batch, FeatureSpec((DEPTH,), "action_tokens"))
        loss, _ = policy(batch)
        # The policy's loss from the features alone: logits of the marked positions against the tokens after them.
        head = policy.model.paligemma_with_expert.paligemma.lm_head
        logits = head(features.by_layer[DEPTH])[features.mask]
        targets = batch[ACTION_TOKENS][:, 1:][batch[ACTION_TOKEN_MASK][:, 1:]]
    assert not features.mask.all(), "padding must occur for the test to say something"
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, targets), loss, rtol=1e-6, atol=0)


def test_action_logits_give_the_policys_own_loss(policy_and_batch):
    policy, batch = policy_and_batch
    with torch.no_grad():
        logits, mask = action_logits(policy, batch)
        loss, _ = policy(batch)
    assert logits.shape[:2] == mask.shape == batch[ACTION_TOKENS].shape
    assert not mask.all(dim=1).any(), "the start token is never predicted"
    own = torch.nn.functional.cross_entropy(logits[mask], batch[ACTION_TOKENS][mask])
    # The same sum of at most 56 fp32 terms in another order.
    torch.testing.assert_close(own, loss, rtol=1e-6, atol=0)
    shifted = torch.nn.functional.cross_entropy(logits.roll(1, dims=1)[mask], batch[ACTION_TOKENS][mask])
    assert abs(shifted - loss) > 1e-3, "the test must see a shift by one"


@pytest.mark.parametrize("pooling", POOLINGS)
def test_features_and_token_loss_are_those_of_two_forwards(policy_and_batch, pooling):
    policy, batch = policy_and_batch
    spec = FeatureSpec((2, DEPTH), pooling)
    with torch.no_grad():
        together, loss = features_and_token_loss(policy, batch, spec)
        alone = hidden_features(policy, batch, spec)
        own, _ = policy(batch)
    torch.testing.assert_close(loss, own, rtol=1e-6, atol=0)
    assert torch.equal(together.mask, alone.mask)
    for layer in (2, DEPTH):
        # The prefix is computed beside the action tokens here and without them there: rounding.
        torch.testing.assert_close(together.by_layer[layer], alone.by_layer[layer], rtol=1e-4, atol=1e-5)


def test_action_logits_carry_gradients_to_head_and_decoder(policy_and_batch):
    policy, batch = policy_and_batch
    logits, mask = action_logits(policy, batch)
    logits[mask].square().mean().backward()
    assert policy.model.paligemma_with_expert.paligemma.lm_head.weight.grad.abs().sum() > 0
    assert language_model_of(policy).layers[0].mlp.down_proj.weight.grad.abs().sum() > 0
    policy.zero_grad()


def test_predicting_positions_shift_by_one():
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    expected = torch.tensor([[True, True, False, False], [True, True, True, False]])
    assert torch.equal(predicting_positions(mask), expected)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_stopping_at_the_deepest_layer_is_bitwise_the_full_forward(policy_and_batch, layer, pooling):
    policy, batch = policy_and_batch
    ran = []
    handle = language_model_of(policy).layers[-1].register_forward_hook(lambda *_: ran.append(True))
    with torch.no_grad():
        stopped = hidden_features(policy, batch, FeatureSpec((layer,), pooling))
        assert not ran, "the layers behind the deepest one asked for must not run"
        full = hidden_features(policy, batch, FeatureSpec((layer, DEPTH), pooling))
    handle.remove()
    assert torch.equal(stopped.by_layer[layer], full.by_layer[layer])
    assert torch.equal(stopped.mask, full.mask)
    assert language_model_of(policy).config.num_hidden_layers == DEPTH


def test_prefix_features_do_not_depend_on_action_tokens(policy_and_batch, own_forward):
    policy, batch = policy_and_batch
    without = {key: value for key, value in batch.items() if key not in (ACTION_TOKENS, ACTION_TOKEN_MASK)}
    with torch.no_grad():
        first = hidden_features(policy, without, FeatureSpec((DEPTH,), "cls_token"))
    # The attention over a shorter sequence may sum in another order: fp32 rounding of values near 1.
    torch.testing.assert_close(first.by_layer[DEPTH], own_forward[DEPTH][:, 0], rtol=1e-5, atol=1e-5)


def test_the_last_prefix_token_is_no_padding(policy_and_batch, own_forward):
    policy, batch = policy_and_batch
    n_image = own_forward[1].shape[1] - batch[ACTION_TOKENS].shape[1] - batch["observation.language.tokens"].shape[1]
    last = n_image + batch["observation.language.attention_mask"].sum(dim=1) - 1
    with torch.no_grad():
        features = hidden_features(policy, batch, FeatureSpec((2,), "last_token"))
    expected = own_forward[2][torch.arange(len(last)), last]
    torch.testing.assert_close(features.by_layer[2], expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_layers_below_and_none_above(policy_and_batch):
    policy, batch = policy_and_batch
    policy.zero_grad()
    hidden_features(policy, batch, FeatureSpec((2,), "action_tokens")).by_layer[2].square().mean().backward()
    layers = language_model_of(policy).layers
    assert layers[1].mlp.down_proj.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in layers[2].parameters())
    policy.zero_grad()


def test_generated_tokens_are_framed_like_demonstrated_ones(policy_and_batch):
    policy, batch = policy_and_batch
    ids, mask = generated_tokens(policy, batch)
    assert ids.shape == batch[ACTION_TOKENS].shape
    assert torch.equal(ids[:, 0], batch[ACTION_TOKENS][:, 0]), "both begin with the start token"
    assert mask[:, 0].all()
    assert (ids[~mask] == 0).all()
    # Nothing counts after the end marker.
    end = policy._paligemma_tokenizer.convert_tokens_to_ids("|")
    for row, valid in zip(ids, mask, strict=True):
        assert (row[valid][:-1] != end).all()


@pytest.mark.parametrize(
    ("layers", "pooling", "message"),
    [
        ((0,), "action_tokens", r"layers must lie in 1..3 .* got \[0\]"),
        ((4,), "action_tokens", r"got \[4\]"),
        ((-4,), "action_tokens", r"got \[-4\]"),
        ((), "action_tokens", r"got \[\]"),
        ((3, -1), "action_tokens", "one layer twice"),
        ((1,), "mean", "pooling must be one of .* got 'mean'"),
    ],
)
def test_layers_outside_the_model_are_refused(layers, pooling, message):
    with pytest.raises(ValueError, match=message):
        FeatureSpec.resolve(layers, pooling, DEPTH)


def test_layers_count_from_either_end():
    assert FeatureSpec.resolve((-1, -2), "none", 18) == FeatureSpec((17, 18), "none")
