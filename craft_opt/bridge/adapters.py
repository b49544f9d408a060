"""PEFT adapters (LoRA) on the policy: the base with its adapters off is the teacher, so that no second model is needed.

LeRobot freezes the base and trains what PEFT injected into it. With the adapters off the forward is the base's, bit for
bit; :class:`OnTheFlyTeacher` takes the teacher's features from it at every retention step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lerobot.processor import PolicyProcessorPipeline
from torch import Tensor, nn

from craft_opt.bridge.anchor_cache import AnchorBatch, AnchorCache
from craft_opt.bridge.features import (
    DEFAULT_LAYERS,
    DEFAULT_POOLING,
    Features,
    FeatureSpec,
    depth_of,
    hidden_features,
    retention_loss,
)
from craft_opt.bridge.policies import has_adapters
from craft_opt.bridge.retention_term import (
    DRIFT_ANCHORS,
    DRIFT_TOLERANCE,
    CacheRetention,
    ExpectedFeatures,
    MakeTerm,
    student_of,
)
from craft_opt.config import CraftConfig

# What PEFT puts beside the base's weights and switches off together with the adapters.
_SWITCHED_PARTS = ("modules_to_save", "trainable_tokens")


@contextmanager
def adapters_off(policy: nn.Module) -> Iterator[None]:
    """Let the policy compute what its base computes, for a while.

    Raises:
        ValueError: It has no adapters, or trains weights that switching them off would not undo.
    """
    check_base_is_frozen(policy)
    model: Any = policy
    with model.disable_adapter():
        yield


def check_base_is_frozen(policy: nn.Module) -> None:
    """Check that the base cannot move: then the policy with its adapters off stays the teacher.

    Raises:
        ValueError: The policy has no adapters, or a weight of the base is trained too.
    """
    if not has_adapters(policy):
        raise ValueError(
            "the policy has no adapters, so there is no teacher in it to switch them off for; train adapters with "
            "--peft.method_type=LORA --peft.target_modules=<modules>, or take the teacher's features from a cache"
        )
    model: Any = policy
    parts = (*_SWITCHED_PARTS, getattr(model.base_model, "prefix", "lora_"))
    moving = [n for n, p in policy.named_parameters() if p.requires_grad and not any(part in n for part in parts)]
    if moving:
        raise ValueError(
            f"{len(moving)} weights of the base are trained beside the adapters ({', '.join(moving[:3])}), so with the "
            f"adapters off the policy would no longer be the teacher; freeze them (bias='none' in the adapter's "
            f"settings), or take the teacher's features from a cache"
        )


@torch.no_grad()
def teacher_features(policy: nn.Module, batch: dict[str, Any], spec: FeatureSpec) -> Features:
    """Features of a processed batch with the adapters off, without a graph: the base's, bit for bit.

    Args:
        policy: A pi0_fast policy in PEFT.
        batch: What the policy's preprocessor gives; with action token ids where the pooling needs them.
        spec: Layers and pooling.

    Raises:
        ValueError: The policy has no adapters, or its base is trained.
    """
    with adapters_off(policy):
        return hidden_features(policy, batch, spec)


class OnTheFlyTeacher(CacheRetention):
    """The distance of the student's hidden features to those of its own base, computed at every retention step.

    ``L = retention_loss(f(anchors; adapters on), f(anchors; adapters off))``; it needs the anchors' samples (images,
    prompt, state, action tokens) and none of their stored features, so a cache of either kind serves, at any layers and
    pooling, for one more forward without a graph. The interface is :class:`HiddenRetention`'s.

    Args:
        cache: The anchor cache.
        preprocessor: The run's preprocessor.
        config: Settings of the method.
        seed: Seed of the order of anchors.
        spec: Layers and pooling; None takes those of a cache of features, or else the builder's defaults.
    """

    tolerance = DRIFT_TOLERANCE

    def __init__(
        self,
        cache: AnchorCache,
        preprocessor: PolicyProcessorPipeline,
        config: CraftConfig,
        seed: int,
        spec: FeatureSpec | None = None,
    ) -> None:
        super().__init__(cache, preprocessor, config, seed)
        manifest = cache.manifest
        if spec is None and manifest.kind == "hidden":
            spec = FeatureSpec(tuple(manifest.layers), manifest.pooling)
        self.spec = spec or FeatureSpec.resolve(DEFAULT_LAYERS, DEFAULT_POOLING, manifest.depth)
        self._variance: dict[int, float] = {}

    def _loss(self, policy: nn.Module, anchors: AnchorBatch, kind: str = "") -> Tensor:
        if not self._variance:
            self._variance = self._teacher_variance(policy)
        batch = self._batch(policy, anchors)
        teacher = teacher_features(policy, batch, self.spec)
        student, replay = student_of(policy, batch, self.spec, 0.0 if kind else self._config.replay_weight)
        return retention_loss(student, teacher, kind or self._config.retention_loss, self._variance) + replay

    def _drift(self, policy: nn.Module, anchors: AnchorBatch) -> float:
        return self._loss(policy, anchors, "nmse").item()

    def _teacher_variance(self, policy: nn.Module) -> dict[int, float]:
        """Mean over features of the base's variance over the positions of the first anchors: the same on resume."""
        count = min(len(self.cache), DRIFT_ANCHORS)
        collected: dict[int, list[Tensor]] = {layer: [] for layer in self.spec.layers}
        for start in range(0, count, self._config.anchor_batch_size):
            indices = list(range(start, min(start + self._config.anchor_batch_size, count)))
            found = teacher_features(policy, self._batch(policy, self.cache.gather(indices)), self.spec)
            for layer, values in found.by_layer.items():
                collected[layer].append(values[found.mask].double())
        return {layer: torch.cat(rows).var(dim=0, correction=0).mean().item() for layer, rows in collected.items()}


def teacher_within(policy: nn.Module, expected: ExpectedFeatures) -> MakeTerm:
    """What makes :class:`OnTheFlyTeacher` of a cache, at the layers and pooling that the run asks for.

    Raises:
        ValueError: The policy has no adapters, or its base is trained.
    """
    check_base_is_frozen(policy)
    spec = None
    if expected != ExpectedFeatures():
        spec = FeatureSpec.resolve(
            DEFAULT_LAYERS if expected.layers is None else expected.layers,
            DEFAULT_POOLING if expected.pooling is None else expected.pooling,
            depth_of(policy),
        )
    return functools.partial(OnTheFlyTeacher, spec=spec)
