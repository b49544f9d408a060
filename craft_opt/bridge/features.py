"""Hidden features and token logits of pi0_fast under teacher forcing: prefix and action positions, at chosen layers.

The sequence is LeRobot's own, made by the functions that its token loss uses: [images, prompt, action tokens], images
and prompt seeing each other, action tokens seeing them and the action tokens before. Hidden state k is what decoder
layer k (counted from 1) gives; the last layer's is taken after the final norm, as the token loss reads it. The forward
stops at the deepest layer that is asked for: what is deeper cannot change it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from lerobot.policies.common.vla_utils import prepare_attention_masks_4d
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from lerobot.utils.constants import (
    ACTION_TOKEN_MASK,
    ACTION_TOKENS,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
)
from torch import Tensor, nn
from torch.nn import functional

from craft_opt.retention import POOLINGS, feature_loss, pool_features

# Two layers at the positions that predict the action tokens: PLATFORM.md's pilot kept .97 of the old skills with them
# and .17 with pooled image tokens.
DEFAULT_LAYERS = (-2, -1)
DEFAULT_POOLING = "action_tokens"


@dataclass(frozen=True)
class FeatureSpec:
    """Which hidden states are anchored.

    Attributes:
        layers: Ascending decoder layers, 1 to depth; depth is the last, after the final norm.
        pooling: One of :data:`craft_opt.retention.POOLINGS`.
    """

    layers: tuple[int, ...]
    pooling: str

    @classmethod
    def resolve(cls, layers: Sequence[int], pooling: str, depth: int) -> FeatureSpec:
        """Turn layers counted from either end (-1 is the last) into absolute ones.

        Raises:
            ValueError: A layer is outside the model, named twice, or the pooling is unknown.
        """
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        absolute = [depth + 1 + layer if layer < 0 else layer for layer in layers]
        if not absolute or any(not 1 <= layer <= depth for layer in absolute):
            raise ValueError(
                f"layers must lie in 1..{depth} (or -{depth}..-1, counted from the last), got {list(layers)}"
            )
        if len(set(absolute)) != len(absolute):
            raise ValueError(f"layers name one layer twice: {list(layers)}")
        return cls(tuple(sorted(absolute)), pooling)

    @property
    def needs_actions(self) -> bool:
        """Whether the action tokens must be in the sequence; prefix positions never see them."""
        return self.pooling in ("action_tokens", "none")


@dataclass(frozen=True)
class Features:
    """Features of a batch.

    Attributes:
        by_layer: Layer → (batch, features), or (batch, positions, features) for ``action_tokens`` and ``none``.
        mask: (batch,) or (batch, positions); True where a feature counts.
    """

    by_layer: dict[int, Float[Tensor, "batch *positions features"]]
    mask: Bool[Tensor, "batch *positions"]


def pi0_fast_of(policy: nn.Module) -> PI0FastPolicy:
    """The pi0_fast policy itself, out of a PEFT wrapper if there is one.

    Raises:
        ValueError: The policy is of another kind.
    """
    unwrap: Any = getattr(policy, "get_base_model", None)
    base: Any = policy if unwrap is None else unwrap()
    if not isinstance(base, PI0FastPolicy):
        found = getattr(getattr(base, "config", None), "type", type(base).__name__)
        raise ValueError(
            f"hidden retention is built for pi0_fast policies, and this one is {found!r}; "
            f"train it with --retention-mode none, or take a pi0_fast policy"
        )
    return base


def language_model_of(policy: nn.Module) -> Any:
    """The decoder whose layers are counted."""
    return pi0_fast_of(policy).model.paligemma_with_expert.paligemma.model.language_model


def depth_of(policy: nn.Module) -> int:
    """Number of decoder layers."""
    return len(language_model_of(policy).layers)


def predicting_positions(action_mask: Bool[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
    """Positions of the action segment whose hidden state predicts a token of the loss.

    The token loss shifts by one: the state at token i predicts token i+1. So the start token counts, and the last
    token, whose state nothing reads, does not.
    """
    return torch.cat([action_mask[:, 1:], torch.zeros_like(action_mask[:, :1])], dim=1)


def hidden_features(policy: nn.Module, batch: Mapping[str, Any], spec: FeatureSpec) -> Features:
    """Compute the features of a processed batch, with gradients where they are switched on.

    Args:
        policy: A pi0_fast policy, in PEFT or not.
        batch: What the policy's preprocessor gives; with action token ids where the pooling needs them.
        spec: Layers and pooling.

    Returns:
        Features in the dtype that the model computes in.
    """
    return _pooled(_states(policy, batch, spec.layers, with_actions=spec.needs_actions), spec.pooling)


def features_and_token_loss(
    policy: nn.Module, batch: Mapping[str, Any], spec: FeatureSpec
) -> tuple[Features, Float[Tensor, ""]]:
    """Compute features and the policy's own token loss of a processed batch in one forward.

    Args:
        policy: A pi0_fast policy, in PEFT or not.
        batch: What the policy's preprocessor gives, with action token ids.
        spec: Layers and pooling.

    Returns:
        What :func:`hidden_features` gives, and the mean cross-entropy of the action tokens in nats, fp32.
    """
    depth = depth_of(policy)
    states = _states(policy, batch, sorted({*spec.layers, depth}), with_actions=True)
    predicting, mask = _predicting(states.by_layer[depth], batch)
    head = pi0_fast_of(policy).model.paligemma_with_expert.paligemma.lm_head
    # Only the positions that count: the vocabulary's width makes logits the largest tensor of the forward.
    loss = functional.cross_entropy(head(predicting[mask]).float(), batch[ACTION_TOKENS][mask].long())
    if not spec.needs_actions:
        states = states.without_actions()
    return _pooled(states.at(spec.layers), spec.pooling), loss


@dataclass(frozen=True)
class _States:
    """Hidden states of a sequence of images, prompt and perhaps action tokens.

    Attributes:
        by_layer: Layer → (batch, positions, features).
        valid: (batch, positions), False on padding.
        n_image: Positions of images, the first.
        n_action: Positions of action tokens, the last.
    """

    by_layer: dict[int, Tensor]
    valid: Tensor
    n_image: int
    n_action: int

    def at(self, layers: Sequence[int]) -> _States:
        """Some of the layers."""
        return replace(self, by_layer={layer: self.by_layer[layer] for layer in layers})

    def without_actions(self) -> _States:
        """Images and prompt alone; they never see the action tokens."""
        kept = self.valid.shape[1] - self.n_action
        by_layer = {layer: states[:, :kept] for layer, states in self.by_layer.items()}
        return _States(by_layer, self.valid[:, :kept], self.n_image, 0)


def _states(policy: nn.Module, batch: Mapping[str, Any], layers: Sequence[int], *, with_actions: bool) -> _States:
    base = pi0_fast_of(policy)
    core = base.model
    # LeRobot's own image path (resizing, range, masks of absent cameras): shared with the token loss, not repeated.
    images, image_masks = base._preprocess_images(dict(batch))
    tokens = batch[ACTION_TOKENS] if with_actions else None
    token_mask = batch[ACTION_TOKEN_MASK] if with_actions else None
    embeddings, valid, attention, n_image, n_action = core.embed_prefix_fast(
        images,
        image_masks,
        batch[OBS_LANGUAGE_TOKENS],
        batch[OBS_LANGUAGE_ATTENTION_MASK],
        fast_action_tokens=tokens,
        fast_action_masks=token_mask,
    )
    language = language_model_of(policy)
    compute_dtype = language.layers[0].self_attn.q_proj.weight.dtype
    if compute_dtype == torch.bfloat16:
        embeddings = embeddings.to(compute_dtype)
    with _collected(language, layers) as hidden:
        (last, _), _ = core.paligemma_with_expert.forward(
            attention_mask=prepare_attention_masks_4d(attention, dtype=embeddings.dtype),
            position_ids=torch.cumsum(valid, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embeddings, None],
            use_cache=False,
            adarms_cond=[None, None],
        )
    if len(language.layers) in layers:
        hidden[len(language.layers)] = last
    return _States(hidden, valid, n_image, n_action)


def action_logits(
    policy: nn.Module, batch: Mapping[str, Any]
) -> tuple[Float[Tensor, "batch tokens vocabulary"], Bool[Tensor, "batch tokens"]]:
    """Compute what the policy predicts for each action token from those before it, as its own token loss does.

    Args:
        policy: A pi0_fast policy, in PEFT or not.
        batch: What the policy's preprocessor gives, with action token ids.

    Returns:
        Logits, of which [:, i] predict action token i, in the dtype that the model computes in; and the mask of the
        tokens that the token loss counts: the real ones without the start token, which is given and never predicted.
    """
    depth = depth_of(policy)
    predicting, mask = _predicting(_states(policy, batch, (depth,), with_actions=True).by_layer[depth], batch)
    return pi0_fast_of(policy).model.paligemma_with_expert.paligemma.lm_head(predicting), mask


def _predicting(last: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The states that predict the action tokens, and which of these the token loss counts."""
    mask = batch[ACTION_TOKEN_MASK].clone()
    mask[:, 0] = False
    # One to the left: the state before token i predicts it.
    return last[:, -mask.shape[1] - 1 : -1], mask


def retention_loss(
    student: Features,
    teacher: Features,
    kind: str,
    teacher_variance: Mapping[int, float],
) -> Float[Tensor, ""]:
    """Mean over the layers of the distance between student and teacher, fp32."""
    losses = [
        feature_loss(features, teacher.by_layer[layer], teacher.mask, kind=kind, teacher_var=teacher_variance[layer])
        for layer, features in student.by_layer.items()
    ]
    return torch.stack(losses).mean()


@torch.no_grad()
def generated_tokens(
    policy: nn.Module, batch: Mapping[str, Any]
) -> tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
    """The teacher's own action tokens, framed as the preprocessor frames the demonstrated ones.

    Returns:
        Ids of ``max_action_tokens`` positions, the start token first and 0 after the end marker, and their mask.
    """
    base = pi0_fast_of(policy)
    tokenizer = base._paligemma_tokenizer
    images, image_masks = base._preprocess_images(dict(batch))
    length = base.config.max_action_tokens
    generated = base.model.sample_actions_fast_kv_cache(
        images,
        image_masks,
        batch[OBS_LANGUAGE_TOKENS],
        batch[OBS_LANGUAGE_ATTENTION_MASK],
        max_decoding_steps=length - 1,
        temperature=0.0,
    )
    start = torch.full_like(generated[:, :1], tokenizer.bos_token_id)
    ids = torch.cat([start, generated], dim=1)
    is_end = ids == tokenizer.convert_tokens_to_ids("|")
    mask = torch.cumsum(is_end, dim=1) - is_end.long() == 0
    return ids * mask, mask


@contextmanager
def _collected(language: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Run the decoder only as deep as the layers ask, and collect what they give (the last one aside).

    Hooks, not ``output_hidden_states``: that would give the deepest layer after the final norm only.
    """
    depth = len(language.layers)
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            found[layer] = output

        return hook

    handles = [language.layers[k - 1].register_forward_hook(keep(k)) for k in layers if k < depth]
    before = language.config.num_hidden_layers
    language.config.num_hidden_layers = max(layers)
    try:
        yield found
    finally:
        language.config.num_hidden_layers = before
        for handle in handles:
            handle.remove()


def _pooled(states: _States, pooling: str) -> Features:
    hidden, valid, n_image, n_action = states.by_layer, states.valid, states.n_image, states.n_action
    image_mask = torch.zeros_like(valid)
    image_mask[:, :n_image] = True
    action_mask = torch.zeros_like(valid)
    if n_action:
        action_mask[:, -n_action:] = predicting_positions(valid[:, -n_action:])
    start = valid.shape[1] - n_action if pooling == "action_tokens" else 0
    by_layer: dict[int, Tensor] = {}
    mask = valid
    for layer in sorted(hidden):
        by_layer[layer], mask = pool_features(
            hidden[layer][:, start:],
            pooling,
            valid[:, start:],
            image_mask=image_mask[:, start:],
            action_mask=action_mask[:, start:],
        )
    return Features(by_layer, mask)
