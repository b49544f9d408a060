"""What is measured is what it says: LeRobot's loss on action tokens, and success in LeRobot's environment."""

import pytest
import torch
from lerobot.processor import PolicyProcessorPipeline, policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import ACTION_TOKEN_MASK, ACTION_TOKENS
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate

from craft_opt.bridge.quickstart.env import Evaluator
from craft_opt.bridge.quickstart.measure import (
    FRAME_STRIDE,
    SkillScore,
    action_token_loss,
    load_scores,
    measure,
    save_scores,
)
from craft_opt.bridge.quickstart.simulation import BUTTON_PRESS, DRAWER_CLOSE, WINDOW_CLOSE, demonstrate
from tests.quickstart.support import make_tiny_dataset, make_tiny_policy, save_tiny_policy

# Skills that no untrained policy does by chance, as it sometimes closes the drawer.
SKILLS = (WINDOW_CLOSE, BUTTON_PRESS)
FRAMES = 12


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("dataset") / "data"
    return make_tiny_dataset(root, tasks=(BUTTON_PRESS.prompt, WINDOW_CLOSE.prompt), frames=FRAMES)


@pytest.fixture(scope="module")
def built(dataset):
    torch.manual_seed(3)
    policy, pre, post = make_tiny_policy(dataset)
    policy.eval()
    return policy, pre, post


def by_lerobots_forward(policy, batch):
    """LeRobot's own forward; its logits, read off its head, give the loss of any choice of tokens.

    Returns:
        Its loss, the loss from its logits over the tokens that it counts, and the losses of the action tokens.
    """
    seen = []
    handle = policy.model.paligemma_with_expert.paligemma.lm_head.register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    with torch.no_grad():
        loss, _ = policy(batch)
    handle.remove()
    (logits,) = seen
    targets, mask = batch[ACTION_TOKENS][:, 1:], batch[ACTION_TOKEN_MASK][:, 1:]
    each = cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    words = policy._paligemma_tokenizer.convert_ids_to_tokens(targets.flatten().tolist())
    is_action = torch.tensor([word.startswith("<act") for word in words]).view_as(targets)
    return loss, each[mask].mean(), each[is_action]


def test_action_token_loss_is_lerobots_loss_without_the_framing(dataset, built):
    policy, pre, _ = built
    batch = pre(default_collate([dataset[i] for i in (0, 7, 20, 45)]))
    whole, from_logits, actions = by_lerobots_forward(policy, batch)
    torch.testing.assert_close(from_logits, whole)
    total, count = action_token_loss(policy, batch)
    assert count == len(actions) == 4 * 2 * 4, "4 samples, 2 frequencies, 4 action dimensions"
    # Two fp32 sums of some 32 terms of about 5 nats, in different orders.
    assert total == pytest.approx(actions.sum().item(), rel=1e-5)
    assert total / count != pytest.approx(whole.item(), rel=1e-4), "the framing makes a difference"


def test_action_token_loss_leaves_no_gradient_and_no_hook(dataset, built):
    policy, pre, _ = built
    batch = pre(default_collate([dataset[0]]))
    before = policy(batch)[0]
    action_token_loss(policy, batch)
    assert torch.equal(policy(batch)[0], before)
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_scores_come_back_from_their_file(tmp_path):
    scores = [SkillScore("a", 3, 20, 1.0 / 3.0), SkillScore("b", 0, 7, 1e-12)]
    save_scores(tmp_path / "scores.json", scores)
    assert load_scores(tmp_path / "scores.json") == scores
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]
    assert scores[0].success == 3 / 20


def test_measure_loads_a_policy_and_scores_every_skill(dataset, built, tmp_path):
    policy, pre, _ = built
    folder = save_tiny_policy(tmp_path / "policy", *built)
    scores = measure(folder, SKILLS, dataset.root, "local/tiny", 1, 5, "cpu")
    assert [(score.skill, score.successes, score.rollouts) for score in scores] == [
        (WINDOW_CLOSE.name, 0, 1),
        (BUTTON_PRESS.name, 0, 1),
    ]
    for score, skill in zip(scores, SKILLS, strict=True):
        items = [dataset[i] for i in range(0, len(dataset), FRAME_STRIDE)]
        batch = pre(default_collate([item for item in items if item["task"] == skill.prompt]))
        _, _, actions = by_lerobots_forward(policy, batch)
        assert score.action_ce == pytest.approx(actions.mean().item(), rel=1e-5)
    assert scores[0].action_ce != scores[1].action_ce


def test_success_is_counted_episode_by_episode(built, monkeypatch):
    """Replaying the expert's actions, seed by seed, succeeds; doing nothing in the second episode does not."""
    policy, _, _ = built
    demo = demonstrate(DRAWER_CLOSE, 21, 0.0, side=8)
    clock = iter(range(10_000))

    def replay(observation):
        step = next(clock)
        action = torch.zeros(2, 4)
        if step < len(demo.actions):
            action[0] = torch.from_numpy(demo.actions[step])
        return action

    monkeypatch.setattr(policy, "select_action", replay)
    identity = PolicyProcessorPipeline(steps=[])
    evaluator = Evaluator(envs=2, chunk=1000)
    as_they_are = PolicyProcessorPipeline(
        steps=[], to_transition=policy_action_to_transition, to_output=transition_to_policy_action
    )
    done = evaluator.success(policy, identity, as_they_are, DRAWER_CLOSE, 2, seed=21)
    evaluator.close()
    assert done == [True, False]
