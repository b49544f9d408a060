"""``craft-anchors verify``: whether a cache is whole, and whether a policy is the teacher that made it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class
from lerobot.processor import PolicyProcessorPipeline
from peft import PeftConfig, PeftModel

from craft_opt.bridge.anchor_cache import AnchorCache
from craft_opt.bridge.anchor_frames import AnchorSource
from craft_opt.bridge.anchor_manifest import files_of
from craft_opt.bridge.policies import (
    find_weights,
    make_processors,
    precision_context,
    read_policy_config,
    verify_adapters,
    verify_weights,
)
from craft_opt.bridge.retention_term import (
    CE_TOLERANCE,
    DRIFT_ANCHORS,
    ExpectedFeatures,
    Retention,
    check_cache_fits,
    check_drift,
)
from craft_opt.bridge.untrusted_policy import remote_code
from craft_opt.config import CraftConfig


def verify_cache(
    folder: str | Path,
    policy_path: str | Path | None = None,
    policy_overrides: Sequence[str] = (),
    stats_source: AnchorSource | None = None,
    *,
    trust_remote_code: bool = False,
) -> str:
    """Check a cache, and the policy that is to be its teacher where one is given.

    Args:
        folder: The cache.
        policy_path: The policy, a folder or a name on the hub.
        policy_overrides: Flags of the policy without their prefix, such as ``--device=cpu``.
        stats_source: The new skill's dataset, for a cache that was processed with its statistics.
        trust_remote_code: Whether the policy's tokenizers may run code that lies beside them.

    Returns:
        A sentence that says what was checked.

    Raises:
        FileNotFoundError: The cache, a shard, a dataset that it refers to or the policy is missing.
        ValueError: The cache is damaged, or the policy is not its teacher.
    """
    cache = AnchorCache.open(folder)
    manifest = cache.manifest
    whole = f"{folder} is whole: {len(cache)} anchors in {files_of(manifest)}, all checksums right"
    if manifest.storage == "reference":
        names = ", ".join(dict.fromkeys(source.repo_id for source in manifest.sources))
        whole += f", and the frames of {names} that it refers to are the same as at the build"
    if policy_path is None:
        return whole
    statistics = "dataset" if stats_source else "teacher"
    if manifest.normalization_stats != statistics:
        remedies = {
            "dataset": "name the new skill's dataset with --stats.repo_id=<name>, and its folder with --stats.root",
            "teacher": "drop --stats.repo_id and --stats.root",
        }
        raise ValueError(
            f"{folder} was built with the {manifest.normalization_stats}'s normalisation statistics; "
            f"{remedies[manifest.normalization_stats]}"
        )
    config = read_policy_config(policy_path, tuple(policy_overrides))
    with remote_code(trust_remote_code):
        policy = _load(config)
    stats = stats_source.metadata().stats if stats_source else None
    preprocessor, _ = make_processors(config, stats=stats, trust_remote_code=trust_remote_code)
    check_cache_fits(cache, policy, preprocessor, statistics, ExpectedFeatures(), is_teacher=True)
    with precision_context(config):
        drift = check_drift(_retention(cache, preprocessor, "kl" if manifest.top_k else "ce"), policy, config)
        if manifest.kind == "token_ce":
            above = abs(_retention(cache, preprocessor, "ce").mean_loss(policy))
            if not above <= (allowed := CE_TOLERANCE.get(manifest.compute_dtype, max(CE_TOLERANCE.values()))):
                raise ValueError(
                    f"{folder} names cross-entropies of the teacher's tokens that {policy_path} misses by {above:.2e} "
                    f"nats a token on average (allowed: {allowed:.0e})"
                )
    return (
        f"{whole}; {policy_path} is its teacher: fingerprints, {manifest.depth} layers and preprocessor are the same, "
        f"and {min(len(cache), DRIFT_ANCHORS)} anchors computed again differ by {drift:.1e}"
    )


def _retention(cache: AnchorCache, preprocessor: PolicyProcessorPipeline, token_loss: str) -> Retention:
    config = CraftConfig(
        anchor_cache_dir="verified", anchor_batch_size=min(len(cache), 16), retention_mode=cache.manifest.kind,
        token_loss=token_loss,
    )  # fmt: skip
    return Retention([cache], preprocessor, config, seed=0)


def _load(config: PreTrainedConfig) -> torch.nn.Module:
    """The policy by itself: LeRobot's ``make_policy`` wants a dataset, and the cache's may be gone."""
    weights = find_weights(config)
    assert weights is not None, "the path was given"
    kind = get_policy_class(config.type)
    if config.use_peft:
        adapter = PeftConfig.from_pretrained(str(config.pretrained_path))
        base = kind.from_pretrained(adapter.base_model_name_or_path, config=config, revision=adapter.revision)
        policy = PeftModel.from_pretrained(base, str(config.pretrained_path), config=adapter)
        verify_adapters(policy, weights)
    else:
        policy = kind.from_pretrained(config.pretrained_path, config=config, revision=config.pretrained_revision)
        verify_weights(policy, weights)
    return policy.to(config.device).eval()
