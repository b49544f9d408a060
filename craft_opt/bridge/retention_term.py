"""The retention loss of a run: checked caches, their anchors through the run's preprocessor, L_ret of the student.

A run draws from one cache or from several, each of old skills of its own. One :class:`CacheRetention` stands for a
cache, of the kind that it holds; :class:`Retention` is their weighted mean and what the training loop sees.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import ACTION_TOKEN_MASK, ACTION_TOKENS
from torch import Tensor, nn

from craft_opt.bridge import features
from craft_opt.bridge.anchor_cache import AnchorBatch, AnchorCache, AnchorOrder
from craft_opt.bridge.anchor_manifest import build_command, rebuild_hint
from craft_opt.bridge.anchor_shards import process_anchors
from craft_opt.bridge.features import (
    Features,
    FeatureSpec,
    depth_of,
    features_and_token_loss,
    hidden_features,
    language_model_of,
    pi0_fast_of,
    retention_loss,
)
from craft_opt.bridge.fingerprints import preprocessor_fingerprint, teacher_fingerprint
from craft_opt.bridge.policies import has_adapters, merged_fingerprint, without_renaming
from craft_opt.config import CraftConfig
from craft_opt.retention import token_ce_above, token_kl

logger = logging.getLogger(__name__)

# Largest drift that rounding explains, by the coarsest dtype between what is stored and the computation. Squared error
# of features over the teacher's variance, or a KL of tokens, both quadratic in the rounding: relative rounding 2^-24,
# 2^-11, 2^-8 a sum, squared, times a few hundred for depth, another batch size, and (fp32) a GPU's TF32 products at
# 2^-11 against a cache built without them.
DRIFT_TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}
# A cross-entropy is linear in it: logits of 10 with an error of 2^-11 (TF32) or 2^-8.
CE_TOLERANCE = {"float32": 5e-3, "float16": 2e-2, "bfloat16": 1e-1}
DRIFT_ANCHORS = 64


@dataclass(frozen=True)
class ExpectedFeatures:
    """What the run demands of its cache beyond fitting the policy.

    Attributes:
        layers: Decoder layers, counted from either end; None takes the cache's.
        pooling: Pooling; None takes the cache's.
    """

    layers: Sequence[int] | None = None
    pooling: str | None = None


class CacheRetention(ABC):
    """Draws anchors of one cache and computes their loss.

    Args:
        cache: The anchor cache.
        preprocessor: The run's preprocessor.
        config: Settings of the method.
        seed: Seed of the order of anchors.
    """

    def __init__(
        self, cache: AnchorCache, preprocessor: PolicyProcessorPipeline, config: CraftConfig, seed: int
    ) -> None:
        self.cache = cache
        self.order = AnchorOrder(len(cache), seed)
        self._preprocessor = without_renaming(preprocessor)
        self._config = config

    def loss(self, policy: nn.Module, count: int) -> Tensor:
        """L_ret on the next ``count`` anchors, fp32 with a graph."""
        return self._loss(policy, self.cache.gather(self.order.draw(count)))

    @torch.no_grad()
    def mean_loss(self, policy: nn.Module) -> float:
        """The run's loss on the first anchors, whatever was drawn so far."""
        return self._mean(lambda anchors: self._loss(policy, anchors).item())

    @torch.no_grad()
    def drift(self, policy: nn.Module) -> float:
        """How far the student is from the teacher on the first anchors, at least 0, whatever the run's loss is."""
        return self._mean(lambda anchors: self._drift(policy, anchors))

    def _mean(self, value: Callable[[AnchorBatch], float]) -> float:
        total, count = 0.0, min(len(self.cache), DRIFT_ANCHORS)
        for start in range(0, count, self._config.anchor_batch_size):
            indices = list(range(start, min(start + self._config.anchor_batch_size, count)))
            total += value(self.cache.gather(indices)) * len(indices)
        return total / count

    def _batch(self, policy: nn.Module, anchors: AnchorBatch) -> dict[str, Any]:
        batch = process_anchors(self._preprocessor, anchors.images, anchors.state, anchors.tasks)
        device = next(policy.parameters()).device
        batch[ACTION_TOKENS] = anchors.action_tokens.to(device)
        batch[ACTION_TOKEN_MASK] = anchors.action_token_mask.to(device)
        return batch

    @property
    @abstractmethod
    def tolerance(self) -> dict[str, float]:
        """Dtype → largest drift that rounding explains."""

    @abstractmethod
    def _loss(self, policy: nn.Module, anchors: AnchorBatch) -> Tensor: ...

    @abstractmethod
    def _drift(self, policy: nn.Module, anchors: AnchorBatch) -> float: ...


class HiddenRetention(CacheRetention):
    """The distance of the student's hidden features to the teacher's, with the anchors' replay where wanted."""

    tolerance = DRIFT_TOLERANCE

    def __init__(
        self, cache: AnchorCache, preprocessor: PolicyProcessorPipeline, config: CraftConfig, seed: int
    ) -> None:
        super().__init__(cache, preprocessor, config, seed)
        manifest = cache.manifest
        self._spec = FeatureSpec(tuple(manifest.layers), manifest.pooling)
        self._variance = {int(layer): value for layer, value in manifest.teacher_variance.items()}

    def _loss(self, policy: nn.Module, anchors: AnchorBatch, kind: str = "") -> Tensor:
        weight = 0.0 if kind else self._config.replay_weight
        student, replay = student_of(policy, self._batch(policy, anchors), self._spec, weight)
        device = student.mask.device
        assert anchors.feature_mask is not None
        teacher = Features(
            {layer: value.to(device) for layer, value in anchors.features.items()}, anchors.feature_mask.to(device)
        )
        return retention_loss(student, teacher, kind or self._config.retention_loss, self._variance) + replay

    def _drift(self, policy: nn.Module, anchors: AnchorBatch) -> float:
        return self._loss(policy, anchors, "nmse").item()


def student_of(
    policy: nn.Module, batch: dict[str, Any], spec: FeatureSpec, replay_weight: float
) -> tuple[Features, Tensor | float]:
    """The student's features, and a replay of the anchors' action tokens that is 0 in value and has a gradient.

    ``replay = w (CE − sg(CE))``: added to the drift it pulls with ``w ∇CE`` and leaves the constraint, which λ and ε
    look at, the drift alone.
    """
    if not replay_weight:
        return hidden_features(policy, batch, spec), 0.0
    features, loss = features_and_token_loss(policy, batch, spec)
    return features, replay_weight * (loss - loss.detach())


class TokenRetention(CacheRetention):
    """The divergence of the student's action tokens from the teacher's."""

    @property
    def tolerance(self) -> dict[str, float]:
        """Dtype → largest drift that rounding explains."""
        return DRIFT_TOLERANCE if self.cache.manifest.top_k else CE_TOLERANCE

    def _loss(self, policy: nn.Module, anchors: AnchorBatch) -> Tensor:
        logits, mask = features.action_logits(policy, self._batch(policy, anchors))
        return self._kl(logits, mask, anchors) if self._config.token_loss == "kl" else self._ce(logits, mask, anchors)

    def _drift(self, policy: nn.Module, anchors: AnchorBatch) -> float:
        logits, mask = features.action_logits(policy, self._batch(policy, anchors))
        if anchors.top_ids is not None:
            return self._kl(logits, mask, anchors).item()
        # One by one: above and below the teacher's would cancel in the mean.
        rows = [slice(k, k + 1) for k in range(len(mask))]
        return sum(abs(self._ce(logits[row], mask[row], anchors, row).item()) for row in rows) / len(rows)

    @staticmethod
    def _kl(logits: Tensor, mask: Tensor, anchors: AnchorBatch) -> Tensor:
        assert anchors.top_ids is not None and anchors.top_logprobs is not None
        return token_kl(logits, anchors.top_ids.to(logits.device), anchors.top_logprobs.to(logits.device), mask)

    @staticmethod
    def _ce(logits: Tensor, mask: Tensor, anchors: AnchorBatch, rows: slice = slice(None)) -> Tensor:
        assert anchors.teacher_ce is not None
        tokens, teacher_ce = (t[rows].to(logits.device) for t in (anchors.action_tokens, anchors.teacher_ce))
        return token_ce_above(logits, tokens, mask, teacher_ce)


MakeTerm = Callable[[AnchorCache, PolicyProcessorPipeline, CraftConfig, int], CacheRetention]
TERMS: dict[str, type[CacheRetention]] = {"hidden": HiddenRetention, "token_ce": TokenRetention}


class Retention:
    """L_ret of a run: the weighted mean over its caches.

    ``L_ret = Σ_i w_i L_i`` with ``Σ_i w_i = 1``; every batch of anchors holds some of each cache, in proportion.

    Args:
        caches: The anchor caches.
        preprocessor: The run's preprocessor.
        config: Settings of the method.
        seed: Seed of the orders of anchors.
        make_term: Makes the loss of one cache, None for what ``config.retention_mode`` says.
        rank: Number of this process; each draws ``anchor_batch_size`` anchors of its own.
        processes: How many processes draw together.
    """

    def __init__(
        self,
        caches: Sequence[AnchorCache],
        preprocessor: PolicyProcessorPipeline,
        config: CraftConfig,
        seed: int,
        make_term: MakeTerm | None = None,
        *,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.weights = cache_weights(config)
        self.counts = shares(config.anchor_batch_size, self.weights)
        make_term = make_term or TERMS[config.retention_mode]
        self.terms = [make_term(cache, preprocessor, config, seed) for cache in caches]
        for term in self.terms:
            term.order.rank, term.order.processes = rank, processes

    def loss(self, policy: nn.Module) -> Tensor:
        """L_ret on the next batch of anchors, fp32 with a graph."""
        losses = [term.loss(policy, count) for term, count in zip(self.terms, self.counts, strict=True)]
        return torch.stack([weight * loss for weight, loss in zip(self.weights, losses, strict=True)]).sum()

    def mean_loss(self, policy: nn.Module) -> float:
        """L_ret on the first anchors of every cache, whatever was drawn so far, in eval mode."""
        with _evaluated(policy):
            return sum(w * term.mean_loss(policy) for w, term in zip(self.weights, self.terms, strict=True))

    def drift(self, policy: nn.Module) -> float:
        """The largest drift of all caches, in eval mode."""
        with _evaluated(policy):
            return max(term.drift(policy) for term in self.terms)

    @property
    def positions(self) -> tuple[int, ...]:
        """Anchors drawn so far from every cache."""
        return tuple(term.order.position for term in self.terms)

    @positions.setter
    def positions(self, positions: Sequence[int]) -> None:
        for term, position in zip(self.terms, positions, strict=True):
            term.order.position = position

    @property
    def digests(self) -> tuple[str, ...]:
        """What the caches hold, to find the same ones on resume."""
        return digests_of([term.cache for term in self.terms])


def digests_of(caches: Sequence[AnchorCache]) -> tuple[str, ...]:
    """Digests of the caches' manifests, in order."""
    return tuple(cache.manifest.digest for cache in caches)


def cache_folders(config: CraftConfig) -> list[str]:
    """The folders that ``anchor_cache_dir`` names, one or several with commas between."""
    return [folder.strip() for folder in config.anchor_cache_dir.split(",") if folder.strip()]


def cache_weights(config: CraftConfig) -> list[float]:
    """Weights of the caches, equal ones where none are given, with a sum of 1.

    Raises:
        ValueError: There is not one positive number for every cache.
    """
    count = len(cache_folders(config))
    if not config.anchor_cache_weights:
        return [1.0 / count] * count
    given = config.anchor_cache_weights.split(",")
    try:
        weights = [float(part) for part in given]
    except ValueError:
        weights = []
    if len(weights) != count or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(
            f"craft.anchor_cache_weights must be {count} positive numbers with commas between, one for each folder in "
            f"craft.anchor_cache_dir, got {config.anchor_cache_weights!r}"
        )
    return [weight / sum(weights) for weight in weights]


def shares(batch_size: int, weights: Sequence[float]) -> list[int]:
    """Anchors of a batch for each cache: in proportion, at least one each, ``batch_size`` in all (largest remainders).

    Raises:
        ValueError: The batch is smaller than the number of caches.
    """
    if batch_size < len(weights):
        raise ValueError(
            f"craft.anchor_batch_size is {batch_size}, and there are {len(weights)} anchor caches, of which every "
            f"batch holds at least one anchor; set --craft.anchor_batch_size={len(weights)} or more"
        )
    exact = [batch_size * weight for weight in weights]
    counts = [max(1, math.floor(value)) for value in exact]
    while sum(counts) > batch_size:  # from the largest, which has more than one: too many were lifted to one
        counts[counts.index(max(counts))] -= 1
    by_remainder = sorted(range(len(counts)), key=lambda k: counts[k] - exact[k])
    for k in by_remainder[: batch_size - sum(counts)]:
        counts[k] += 1
    return counts


def open_caches(config: CraftConfig) -> list[AnchorCache]:
    """Open the run's caches and check what needs no policy.

    Raises:
        FileNotFoundError: There is none.
        ValueError: None was named, one is damaged, of the other kind, without what the loss needs, or too small.
    """
    folders = cache_folders(config)
    if not folders:
        raise ValueError(
            "CRaFT is on and craft.anchor_cache_dir is empty; name a cache with --craft.anchor_cache_dir=<folder> "
            "(build it with: craft-anchors build --policy.path=<teacher> --dataset.repo_id=<old skills> "
            "--num-samples=<n> --output=<folder>), or train without retention: --retention-mode none"
        )
    counts = shares(config.anchor_batch_size, cache_weights(config))
    caches = [AnchorCache.open(folder) for folder in folders]
    for cache, count in zip(caches, counts, strict=True):
        _check_kind(cache, config)
        if len(cache) < count:
            needed = "" if len(caches) == 1 else f", of which {count} come from this one of {len(caches)} caches"
            raise ValueError(
                f"{cache.folder} has {len(cache)} anchors, and craft.anchor_batch_size is "
                f"{config.anchor_batch_size}{needed}; set --craft.anchor_batch_size="
                f"{len(cache) * config.anchor_batch_size // count} or less, or build a larger cache with --num-samples"
            )
    digests = digests_of(caches)
    if len(set(digests)) < len(digests):
        raise ValueError(
            f"craft.anchor_cache_dir={config.anchor_cache_dir} names one cache twice; name each once and set its part "
            f"with --craft.anchor_cache_weights"
        )
    return caches


def _check_kind(cache: AnchorCache, config: CraftConfig) -> None:
    manifest, kind = cache.manifest, config.retention_mode
    if config.teacher == "adapters_off":
        return  # samples of any cache
    if manifest.kind != kind:
        raise ValueError(
            f"{cache.folder} is a {manifest.kind!r} cache, and craft.retention_mode is {kind!r}; pass "
            f"--retention-mode {manifest.kind}, or build another: {build_command(Path('<folder>'))} --kind={kind}"
        )
    if kind == "token_ce" and config.token_loss == "kl" and not manifest.top_k:
        raise ValueError(
            f"{cache.folder} holds the teacher's tokens without its probabilities (top_k 0), and craft.token_loss=kl "
            f"needs them; pass --craft.token_loss=ce, or build another: {build_command(Path('<folder>'))} "
            f"--kind=token_ce --top-k=8"
        )


def check_cache_fits(
    cache: AnchorCache,
    policy: nn.Module,
    preprocessor: PolicyProcessorPipeline,
    normalization_stats: str,
    expected: ExpectedFeatures,
    *,
    is_teacher: bool,
) -> None:
    """Check that a cache was made by this teacher, with this preprocessor, at the layers that the run wants.

    Args:
        cache: The cache.
        policy: The starting policy, before training.
        preprocessor: The run's preprocessor.
        normalization_stats: The run's choice of statistics.
        expected: What the run demands.
        is_teacher: Whether the policy is still the teacher; not so on resume.

    Raises:
        ValueError: It was not, with both sides named.
    """
    manifest, folder = cache.manifest, cache.folder
    if manifest.normalization_stats != normalization_stats:
        raise ValueError(
            f"{folder} was built with the {manifest.normalization_stats}'s normalisation statistics, and this run "
            f"takes the {normalization_stats}'s; pass --normalization_stats={manifest.normalization_stats}, or build "
            f"a cache with craft-anchors build --normalization_stats={normalization_stats}"
        )
    depth = depth_of(policy)
    if manifest.depth != depth or any(not 1 <= layer <= depth for layer in manifest.layers):
        raise ValueError(
            f"{folder} holds layers {manifest.layers} of a decoder with {manifest.depth}, and this policy has {depth}; "
            f"{rebuild_hint(folder)}"
        )
    _check_features(cache, depth, expected)
    if (fingerprint := preprocessor_fingerprint(preprocessor)) != manifest.preprocessor_fingerprint:
        raise ValueError(
            f"{folder} was made with preprocessor {manifest.preprocessor_fingerprint}, and this run's is {fingerprint} "
            f"(statistics, tokenizers or their settings differ); {rebuild_hint(folder)}"
        )
    if is_teacher and (fingerprint := teacher_fingerprint(policy)) != manifest.teacher_fingerprint:
        dtype = str(language_model_of(policy).layers[0].self_attn.q_proj.weight.dtype).removeprefix("torch.")
        path = pi0_fast_of(policy).config.pretrained_path
        remedy = "dtype" if dtype != manifest.compute_dtype else "path"
        value = manifest.compute_dtype if remedy == "dtype" else manifest.teacher
        if has_adapters(policy) and merged_fingerprint(policy) == manifest.teacher_fingerprint:
            raise ValueError(
                f"{folder} was made by this policy with its adapters merged into the weights, and this run starts from "
                f"{path} with its adapters beside them, which computes other bits; pass --policy.path="
                f"{manifest.teacher} to start from the merged one, or {rebuild_hint(folder)} with "
                f"--policy.path={path}"
            )
        raise ValueError(
            f"{folder} was made by teacher {manifest.teacher_fingerprint} ({manifest.teacher}, "
            f"{manifest.compute_dtype}), and this policy is {fingerprint} ({path}, {dtype}); "
            f"pass --policy.{remedy}={value}, or {rebuild_hint(folder)}"
        )


def _check_features(cache: AnchorCache, depth: int, expected: ExpectedFeatures) -> None:
    manifest, folder = cache.manifest, cache.folder
    if manifest.kind == "token_ce":
        if expected != ExpectedFeatures():
            raise ValueError(
                f"{folder} holds tokens, which have no layers and no pooling; drop --anchor_layers and "
                f"--anchor_pooling, or take a cache of features and --retention-mode hidden"
            )
        return
    wanted = FeatureSpec.resolve(
        expected.layers if expected.layers is not None else manifest.layers,
        expected.pooling if expected.pooling is not None else manifest.pooling,
        depth,
    )
    if (found := FeatureSpec(tuple(manifest.layers), manifest.pooling)) != wanted:
        raise ValueError(
            f"{folder} holds {found.pooling} features of layers {list(found.layers)}, and this run asks for "
            f"{wanted.pooling} of layers {list(wanted.layers)}; drop --anchor_layers and --anchor_pooling to take the "
            f"cache's, or build one with craft-anchors build --layers={','.join(map(str, wanted.layers))} "
            f"--pooling={wanted.pooling}"
        )


def check_drift(retention: Retention, policy: nn.Module, config: PreTrainedConfig) -> float:
    """Check once, before step 0 of a fresh run, that the student gives what the teacher gave.

    Returns:
        The largest drift that was found.

    Raises:
        ValueError: It is more than rounding explains: cache and policy do not belong together.
    """
    return max(_check_drift(term, policy, config) for term in retention.terms)


def _check_drift(term: CacheRetention, policy: nn.Module, config: PreTrainedConfig) -> float:
    manifest = term.cache.manifest
    with _evaluated(policy):
        drift = term.drift(policy)
    dtypes = {manifest.feature_dtype, manifest.compute_dtype, str(getattr(config, "dtype", "float32"))}
    tolerance = max(term.tolerance.get(dtype, 0.0) for dtype in dtypes)
    if not drift <= tolerance:
        what, unit = ("features", "of their variance") if manifest.kind == "hidden" else ("tokens", "of nats a token")
        raise ValueError(
            f"before step 0 the policy's {what} are {drift:.2e} away from the teacher's in {term.cache.folder} "
            f"(allowed: {tolerance:.0e}, in units {unit}), so cache and policy do not belong together; "
            f"{rebuild_hint(term.cache.folder)}"
        )
    return drift


@contextmanager
def _evaluated(policy: nn.Module) -> Iterator[None]:
    """Eval mode for a while."""
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)
