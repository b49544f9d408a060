"""The retention loss of a run: a checked cache, its anchors through the run's preprocessor, the student's features."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import ACTION_TOKEN_MASK, ACTION_TOKENS
from torch import Tensor, nn

from craft_opt.bridge.anchor_cache import AnchorBatch, AnchorCache, AnchorOrder, rebuild_hint
from craft_opt.bridge.anchors import process_anchors
from craft_opt.bridge.features import (
    Features,
    FeatureSpec,
    depth_of,
    hidden_features,
    language_model_of,
    pi0_fast_of,
    retention_loss,
)
from craft_opt.bridge.fingerprints import preprocessor_fingerprint, teacher_fingerprint
from craft_opt.bridge.policies import without_renaming
from craft_opt.config import CraftConfig

logger = logging.getLogger(__name__)

# Largest drift (squared error over the teacher's variance) that rounding explains, by the coarsest dtype between the
# stored features and the computation. Relative rounding 2^-24, 2^-11, 2^-8 a sum, squared, times a few hundred for
# depth, another batch size, and (fp32) a GPU's TF32 products at 2^-11 against a cache built without them.
DRIFT_TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}
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


class HiddenRetention:
    """Draws anchors and computes L_ret, the distance of the student's features to the teacher's.

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
        manifest = cache.manifest
        self._spec = FeatureSpec(tuple(manifest.layers), manifest.pooling)
        self._variance = {int(layer): value for layer, value in manifest.teacher_variance.items()}

    def loss(self, policy: nn.Module) -> Tensor:
        """L_ret on the next batch of anchors, fp32 with a graph."""
        anchors = self.cache.gather(self.order.draw(self._config.anchor_batch_size))
        student, teacher = self._both(policy, anchors)
        return retention_loss(student, teacher, self._config.retention_loss, self._variance)

    @torch.no_grad()
    def drift(self, policy: nn.Module) -> float:
        """Squared error over the teacher's variance on the first anchors, whatever the run's loss is."""
        total, count = 0.0, min(len(self.cache), DRIFT_ANCHORS)
        for start in range(0, count, self._config.anchor_batch_size):
            indices = list(range(start, min(start + self._config.anchor_batch_size, count)))
            student, teacher = self._both(policy, self.cache.gather(indices))
            total += retention_loss(student, teacher, "nmse", self._variance).item() * len(indices)
        return total / count

    def _both(self, policy: nn.Module, anchors: AnchorBatch) -> tuple[Features, Features]:
        batch = process_anchors(self._preprocessor, anchors.images, anchors.state, anchors.tasks)
        device = next(policy.parameters()).device
        batch[ACTION_TOKENS] = anchors.action_tokens.to(device)
        batch[ACTION_TOKEN_MASK] = anchors.action_token_mask.to(device)
        student = hidden_features(policy, batch, self._spec)
        teacher = {layer: value.to(device) for layer, value in anchors.features.items()}
        return student, Features(teacher, anchors.feature_mask.to(device))


def open_cache(config: CraftConfig) -> AnchorCache:
    """Open the run's cache and check what needs no policy.

    Raises:
        FileNotFoundError: There is none.
        ValueError: None was named, it is damaged, of the other kind, or too small.
    """
    if not config.anchor_cache_dir:
        raise ValueError(
            "CRaFT is on and craft.anchor_cache_dir is empty; name a cache with --craft.anchor_cache_dir=<folder> "
            "(build it with: craft-anchors build --policy.path=<teacher> --dataset.repo_id=<old skills> "
            "--num-samples=<n> --output=<folder>), or train without retention: --retention-mode none"
        )
    cache = AnchorCache.open(config.anchor_cache_dir)
    if cache.manifest.kind != config.retention_mode:
        raise ValueError(
            f"{cache.folder} is a {cache.manifest.kind!r} cache, and craft.retention_mode is "
            f"{config.retention_mode!r}; {rebuild_hint(cache.folder)}"
        )
    if len(cache) < config.anchor_batch_size:
        raise ValueError(
            f"{cache.folder} has {len(cache)} anchors, and craft.anchor_batch_size is {config.anchor_batch_size}; "
            f"set --craft.anchor_batch_size={len(cache)} or less, or build a larger cache with --num-samples"
        )
    return cache


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
    depth = depth_of(policy)
    if manifest.normalization_stats != normalization_stats:
        raise ValueError(
            f"{folder} was built with the {manifest.normalization_stats}'s normalisation statistics, and this run "
            f"takes the {normalization_stats}'s; pass --normalization_stats={manifest.normalization_stats}, or build "
            f"a cache with craft-anchors build --normalization_stats={normalization_stats}"
        )
    if manifest.depth != depth or any(not 1 <= layer <= depth for layer in manifest.layers):
        raise ValueError(
            f"{folder} holds layers {manifest.layers} of a decoder with {manifest.depth}, and this policy has {depth}; "
            f"{rebuild_hint(folder)}"
        )
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
        raise ValueError(
            f"{folder} was made by teacher {manifest.teacher_fingerprint} ({manifest.teacher}, "
            f"{manifest.compute_dtype}), and this policy is {fingerprint} ({path}, {dtype}); "
            f"pass --policy.{remedy}={value}, or {rebuild_hint(folder)}"
        )


def check_drift(term: HiddenRetention, policy: nn.Module, config: PreTrainedConfig) -> float:
    """Check once, before step 0 of a fresh run, that the student gives the teacher's features.

    Returns:
        The drift that was found.

    Raises:
        ValueError: It is more than rounding explains: cache and policy do not belong together.
    """
    manifest = term.cache.manifest
    was_training = policy.training
    policy.eval()
    drift = term.drift(policy)
    policy.train(was_training)
    dtypes = {manifest.feature_dtype, manifest.compute_dtype, str(getattr(config, "dtype", "float32"))}
    tolerance = max(DRIFT_TOLERANCE.get(dtype, 0.0) for dtype in dtypes)
    if not drift <= tolerance:
        raise ValueError(
            f"before step 0 the policy's features are {drift:.2e} away from the teacher's in {term.cache.folder} "
            f"(allowed: {tolerance:.0e}, in units of their variance), so cache and policy do not belong together; "
            f"{rebuild_hint(term.cache.folder)}"
        )
    return drift
