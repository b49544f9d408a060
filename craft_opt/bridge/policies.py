"""Loading a policy and its processors, and checking what LeRobot would let pass."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from draccus.utils import DecodingError, ParsingError
from httpx import HTTPError
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from lerobot.configs import FeatureType, NormalizationMode, PreTrainedConfig
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies import PreTrainedPolicy, make_policy, make_pre_post_processors
from lerobot.processor import NormalizerProcessorStep, PolicyProcessorPipeline, RenameObservationsProcessorStep
from lerobot.processor.pipeline import ProcessorMigrationError
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

# Makes --policy.type=pi0_fast_tiny and saved tiny policies known to LeRobot.
import craft_opt.bridge.quickstart.configuration_pi0_fast_tiny  # noqa: F401
from craft_opt.bridge.fingerprints import teacher_fingerprint
from craft_opt.bridge.seals import check_seal
from craft_opt.bridge.untrusted import brief, read_json
from craft_opt.bridge.untrusted_policy import (
    check_adapter,
    check_policy_config,
    check_processor,
    check_ranks,
    remote_code,
)

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_OTHER_POLICY = "take another checkpoint, or restore it from a copy"
_MIGRATION = "lerobot.processor.migrate_policy_normalization"
_FORMER_ACTION_TOKENIZER, _ACTION_TOKENIZER = "physical-intelligence/fast", "lerobot/fast-action-tokenizer"
_LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
_EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"


def read_policy_config(path: str | Path, overrides: tuple[str, ...] = ()) -> PreTrainedConfig:
    """Read a policy's configuration from a folder or the hub and point it at its weights.

    Raises:
        FileNotFoundError: There is no configuration there.
        ValueError: It is damaged, or none of a policy.
    """
    check_policy_config(path)
    _check_place(path)
    try:
        config = PreTrainedConfig.from_pretrained(path, cli_overrides=list(overrides))
    except (OSError, HTTPError) as error:
        raise FileNotFoundError(
            f"--policy.path={path} is no folder of a saved policy, and could not be fetched from the hub ({error})"
        ) from error
    except (DecodingError, ParsingError) as error:
        why = f"{error} {error.__cause__ or ''}".strip()
        raise ValueError(f"--policy.path={path} has settings that its policy type has not: {brief(why)}") from error
    config.pretrained_path = Path(path)
    return config


def _check_place(path: str | Path) -> None:
    # Of what can be no name either, the hub's client would tell which characters a name may have.
    if not Path(path).is_dir() and (Path(path).is_absolute() or str(path).startswith(".") or str(path).count("/") > 1):
        raise FileNotFoundError(
            f"--policy.path={path} does not exist; give the folder of a saved policy, or a name on the hub"
        )


def load_policy(
    config: PreTrainedConfig,
    ds_meta: LeRobotDatasetMetadata,
    rename_map: Mapping[str, str] | None = None,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedPolicy:
    """Build the policy through LeRobot, checked before (cameras, weights file) and after (every weight).

    Args:
        config: The policy's configuration.
        ds_meta: Metadata of the dataset that gives the features.
        rename_map: Names of the dataset's keys → the policy's.
        trust_remote_code: Whether tokenizers may run code that lies beside them.

    Raises:
        FileNotFoundError: The path holds no weights.
        ValueError: The dataset does not fit the policy, or a weight was not loaded.
    """
    check_cameras(config, ds_meta, rename_map or {})
    weights = find_weights(config)
    _check_seals(config)
    try:
        with remote_code(trust_remote_code):
            policy = make_policy(cfg=config, ds_meta=ds_meta, rename_map=dict(rename_map or {}))
    except (RuntimeError, SafetensorError) as error:  # for missing, unexpected and misshapen tensors, and damaged files
        if "tokenizers" in str(error):  # pi0_fast, which says no more than that
            raise ValueError(f"{config.pretrained_path or config.type}: {error.__cause__}{_remedy(config)}") from error
        if weights is None:
            raise
        raise ValueError(
            f"{weights} did not load every weight ({error}); take a complete checkpoint of this policy type and size"
        ) from error
    if weights is not None:
        verify = verify_adapters if config.use_peft else verify_weights
        verify(policy, weights)
    return policy


def _check_seals(config: PreTrainedConfig) -> None:
    """Of a local policy: its own, or that of the checkpoint it lies in."""
    folder = Path(str(config.pretrained_path or ""))
    if config.pretrained_path and folder.is_dir():
        check_seal(folder, _OTHER_POLICY)
        check_seal(folder.resolve().parent, _OTHER_POLICY, f"{folder.resolve().name}/")


def find_weights(config: PreTrainedConfig) -> Path | None:
    """The weights file of a policy that is loaded, in PEFT the adapter's; None for one that starts from scratch.

    Raises:
        FileNotFoundError: The path holds no weights, or an adapter's base is not there.
    """
    if not config.pretrained_path:
        return None
    path, revision = str(config.pretrained_path), config.pretrained_revision
    if not config.use_peft:
        return _file_at(path, WEIGHTS_FILE, revision)
    weights = _file_at(path, ADAPTER_FILE, revision)
    _base_weights(weights)
    return weights


def _file_at(path: str, name: str, revision: str | None) -> Path:
    if Path(path).is_dir():
        weights = Path(path) / name
        if not weights.is_file():
            raise FileNotFoundError(
                f"--policy.path={path} holds no {name}, so no weight would be loaded; "
                f"point it at a folder written by save_pretrained (a checkpoint's pretrained_model folder)"
            )
    else:
        try:
            weights = Path(hf_hub_download(path, name, revision=revision))
        except (OSError, HTTPError, HFValidationError) as error:
            raise FileNotFoundError(
                f"--policy.path={path} is no local folder, and {name} could not be fetched from the hub ({error}); "
                f"check the name, the connection and the access rights"
            ) from error
    return weights


def _base_weights(adapter: Path) -> Path:
    """The weights file of the base that an adapter was trained on.

    Raises:
        FileNotFoundError: It is not there.
    """
    settings = check_adapter(adapter.parent / ADAPTER_CONFIG)
    check_ranks(settings, adapter.parent / ADAPTER_CONFIG, adapter)
    base = settings.get("base_model_name_or_path")
    try:
        return _file_at(str(base), WEIGHTS_FILE, settings.get("revision"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{adapter} was trained on {base}, which is not there ({error}); put the base back, or write its new place "
            f"into base_model_name_or_path of {adapter.parent / ADAPTER_CONFIG}"
        ) from error


def has_adapters(policy: nn.Module) -> bool:
    """Whether PEFT has wrapped the policy."""
    return hasattr(policy, "disable_adapter") and hasattr(policy, "get_base_model")


def merged_fingerprint(policy: nn.Module) -> str:
    """Fingerprint of the policy with its adapters merged into the weights.

    The policy is merged for good (taking a delta off again would not restore every bit): for the way out with an error.
    """
    model: Any = policy
    return teacher_fingerprint(model.merge_and_unload())


def verify_adapters(policy: nn.Module, adapter: Path) -> None:
    """Check that an adapter and the base under it hold what their files have for them.

    PEFT warns where a tensor of an adapter is missing, and pi0_fast's loader where one of the base is.

    Args:
        policy: The loaded policy, in PEFT.
        adapter: The adapter's safetensors file.

    Raises:
        ValueError: A weight is missing in its file, has another shape or another value.
    """
    # Imported where it is used: an optional package of LeRobot's.
    from peft import PeftModel, get_peft_model_state_dict

    assert isinstance(policy, PeftModel)
    # PEFT saves with the embeddings left out, and would ask the hub for the base's to see whether they changed.
    _compare(get_peft_model_state_dict(policy, save_embedding_layers=False), adapter)
    base: Any = policy.get_base_model()
    _compare(_without_adapters(base.state_dict(), str(policy.base_model.prefix)), _base_weights(adapter))


def verify_weights(policy: nn.Module, weights: Path) -> None:
    """Check that every weight of the policy holds what the file has for it.

    LeRobot's pi0_fast loader prints a warning and goes on with random weights when a file is missing or a shape
    differs, so nothing short of comparing the values tells.

    Args:
        policy: The loaded policy.
        weights: Its safetensors file.

    Raises:
        ValueError: A weight is missing in the file, has another shape or another value.
    """
    _compare(policy.state_dict(), weights)


def _compare(state: Mapping[str, Tensor], weights: Path) -> None:
    missing: list[str] = []
    different: list[str] = []
    shared: dict[int, list[str]] = {}
    for name, tensor in state.items():
        shared.setdefault(tensor.data_ptr(), []).append(name)
    with safe_open(weights, framework="pt") as file:
        available = set(file.keys())
        for name, tensor in state.items():
            # A tensor shared by two names is stored under one of them.
            stored = next((s for n in shared[tensor.data_ptr()] for s in _stored_names(n) if s in available), None)
            if stored is None:
                missing.append(name)
                continue
            value = file.get_tensor(stored)
            if value.shape != tensor.shape:
                different.append(f"{name}: {tuple(value.shape)} in the file, {tuple(tensor.shape)} in the policy")
            elif not torch.equal(value.to(tensor.dtype), tensor.cpu()):
                different.append(f"{name}: other values")
    unexpected = sorted(available - {stored for name in state for stored in _stored_names(name)})
    if missing or different or unexpected:
        examples = [*(f"{name}: missing" for name in missing), *different, *(f"{n}: unexpected" for n in unexpected)]
        raise ValueError(
            f"{weights} did not load every weight: of {len(state)} tensors {len(missing)} are missing and "
            f"{len(different)} differ, and {len(unexpected)} in the file have no place ({'; '.join(examples[:3])}); "
            f"take a complete checkpoint of this policy type and size"
        )


def make_processors(
    config: PreTrainedConfig,
    *,
    stats: Mapping[str, Any] | None,
    rename_map: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Build a policy's pre- and postprocessor, with the statistics saved beside it or with given ones.

    Args:
        config: The policy's configuration, features filled in (LeRobot's ``make_policy`` does that).
        stats: Statistics to normalise with; None keeps the saved ones.
        rename_map: Names of the dataset's keys → the policy's.
        trust_remote_code: Whether tokenizers may run code that lies beside them.

    Raises:
        ValueError: There is nothing to normalise with, or a saved processor does not load or names what it must not.
    """
    with remote_code(trust_remote_code):
        return _make_processors(config, stats, rename_map)


def _make_processors(
    config: PreTrainedConfig, stats: Mapping[str, Any] | None, rename_map: Mapping[str, str] | None
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    features = {**(config.input_features or {}), **(config.output_features or {})}
    if not config.pretrained_path:
        return make_pre_post_processors(config, dataset_stats=stats)
    _check_processors(str(config.pretrained_path), config.pretrained_revision)
    normalizer: dict[str, Any] = {"features": features, "norm_map": config.normalization_mapping}
    unnormalizer: dict[str, Any] = {**normalizer, "features": config.output_features}
    if stats is not None:
        normalizer["stats"] = unnormalizer["stats"] = stats
    overrides: dict[str, dict[str, Any]] = {
        "device_processor": {"device": torch.device(config.device).type},
        "normalizer_processor": normalizer,
        "rename_observations_processor": {"rename_map": dict(rename_map or {})},
    }
    post_overrides: dict[str, dict[str, Any]] = {"unnormalizer_processor": unnormalizer}
    if config.type == "pi0_fast":
        overrides["tokenizer_processor"] = {"tokenizer_name": config.text_tokenizer_name}
        overrides["action_tokenizer_processor"] = {
            "action_tokenizer_name": config.action_tokenizer_name,
            # The saved step forgets these two and would fall back on its defaults (a gated tokenizer and 128).
            "paligemma_tokenizer_name": config.text_tokenizer_name,
            "fast_skip_tokens": config.fast_skip_tokens,
        }
    if getattr(config, "use_relative_actions", False):
        overrides["relative_actions_processor"] = {
            "enabled": True,
            "exclude_joints": config.relative_exclude_joints,
            "action_names": config.action_feature_names,
        }
        post_overrides["absolute_actions_processor"] = {"enabled": True}
    try:
        pre, post = make_pre_post_processors(
            config,
            pretrained_path=str(config.pretrained_path),
            pretrained_revision=config.pretrained_revision,
            preprocessor_overrides=overrides,
            postprocessor_overrides=post_overrides,
        )
    except ProcessorMigrationError as error:
        raise ValueError(
            f"{config.pretrained_path} was saved before LeRobot had processors, and its statistics lie among its "
            f"weights; convert it once with: python -m {_MIGRATION} --pretrained-path={config.pretrained_path}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, SafetensorError, HTTPError) as error:
        raise ValueError(
            f"the processors saved with {config.pretrained_path} do not load: {error}{_remedy(config)}"
        ) from error
    _check_statistics(config, pre)
    return pre, post


def _check_processors(path: str, revision: str | None) -> None:
    """Of a folder, or of the files that LeRobot is about to fetch from the hub."""
    for name in (f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json", f"{POLICY_POSTPROCESSOR_DEFAULT_NAME}.json"):
        file = Path(path) / name
        if not Path(path).is_dir():
            try:
                file = Path(hf_hub_download(path, name, revision=revision))
            except (OSError, HTTPError, HFValidationError):
                continue  # LeRobot says so
        if file.is_file():
            check_processor(file)


def _remedy(config: PreTrainedConfig) -> str:
    """How to give pi0_fast other tokenizers than those that its checkpoint names."""
    if config.type != "pi0_fast":
        return ""
    given = {"text": config.text_tokenizer_name, "action": config.action_tokenizer_name}
    return (
        "; its tokenizers are "
        + " and ".join(f"--policy.{kind}_tokenizer_name={name}" for kind, name in given.items())
        + f", and another name or a local folder can be given with these flags ({_FORMER_ACTION_TOKENIZER} does not "
        f"load with transformers 5, {_ACTION_TOKENIZER} does; the text tokenizer is gated, huggingface-cli login)"
    )


def without_renaming(preprocessor: PolicyProcessorPipeline) -> PolicyProcessorPipeline:
    """The same steps for samples that already have the policy's own keys; shares every step."""
    return PolicyProcessorPipeline(
        steps=[step for step in preprocessor.steps if not isinstance(step, RenameObservationsProcessorStep)],
        name=preprocessor.name,
        to_transition=preprocessor.to_transition,
        to_output=preprocessor.to_output,
    )


def check_cameras(config: PreTrainedConfig, ds_meta: LeRobotDatasetMetadata, rename_map: Mapping[str, str]) -> None:
    """Check the cameras before anything is built.

    Raises:
        ValueError: The dataset has none of the policy's cameras.
    """
    renamed = {rename_map.get(key, key): feature for key, feature in ds_meta.features.items()}
    cameras = [key for key in config.image_features if not key.rsplit(".", 1)[-1].startswith("empty_camera")]
    present = [key for key in cameras if key in renamed]
    if cameras and not present:
        theirs = ", ".join(ds_meta.camera_keys) or "no camera"
        raise ValueError(
            f"dataset {ds_meta.repo_id} has {theirs}, and the policy needs {', '.join(cameras)}; "
            f'name the matching ones with --rename_map=\'{{"<dataset camera>": "{cameras[0]}"}}\''
        )
    for key in set(cameras) - set(present):
        logger.warning("camera %s of the policy is not in the dataset; the policy masks it out", key)


def check_widths(
    preprocessor: PolicyProcessorPipeline, ds_meta: LeRobotDatasetMetadata, rename_map: Mapping[str, str]
) -> None:
    """Check that the statistics that normalise state and action are as wide as the dataset's.

    Raises:
        ValueError: They are not, or the dataset lacks a key that is normalised.
    """
    shapes = {rename_map.get(key, key): tuple(feature["shape"]) for key, feature in ds_meta.features.items()}
    for key, width in _normalised_widths(preprocessor).items():
        if key not in shapes:
            raise ValueError(f"dataset {ds_meta.repo_id} has no {key!r}, which the policy's preprocessor normalises")
        if width != math.prod(shapes[key]):
            raise ValueError(
                f"dataset {ds_meta.repo_id} has {key!r} of shape {shapes[key]}, and the teacher's statistics have "
                f"{width} values; take a dataset of the same robot, or the dataset's own statistics with "
                f"--normalization_stats=dataset and an anchor cache built with the same flag"
            )


def precision_context(config: PreTrainedConfig) -> AbstractContextManager[Any]:
    """The autocast that LeRobot's trainer would run this policy in."""
    device = torch.device(config.device).type
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(getattr(config, "dtype", ""))
    if dtype is not None:
        return torch.autocast(device, dtype=dtype)
    if not hasattr(config, "dtype") and config.use_amp:
        return torch.autocast(device)
    return nullcontext()


def policy_type_at(path: str | Path) -> str | None:
    """The policy type named in a local folder's config.json, None where there is none to read."""
    file = Path(path) / "config.json"
    if not file.is_file():
        return None
    content = read_json(file, "take a policy written by save_pretrained, or restore it from a copy")
    found = content.get("type") if isinstance(content, dict) else None
    return found if isinstance(found, str) else None


def _without_adapters(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The base's own weights under its own names, out of what PEFT made of it."""
    injected = (prefix, ".modules_to_save.", ".trainable_tokens_")
    own = {name: tensor for name, tensor in state.items() if not any(part in name for part in injected)}
    return {name.replace(".base_layer.", ".").replace(".original_module.", "."): own[name] for name in own}


def _stored_names(name: str) -> tuple[str, ...]:
    plain = name.removeprefix("model.")
    if plain.removeprefix("model.") == _EMBEDDING:
        # pi0_fast fills the embedding from the head where a checkpoint has the head alone.
        return (name, plain, f"model.{_LM_HEAD}", _LM_HEAD)
    return (name, plain)


def _normalised_widths(preprocessor: PolicyProcessorPipeline) -> dict[str, int]:
    """State and action keys that are normalised → width of their statistics, 0 without any."""
    found: dict[str, int] = {}
    for step in preprocessor.steps:
        if not isinstance(step, NormalizerProcessorStep):
            continue
        widths: dict[str, int] = {}
        for name, tensor in step.state_dict().items():
            key = name.rsplit(".", 1)[0]
            widths[key] = max(widths.get(key, 0), tensor.numel())  # the statistic "count" is one number wide
        for key, feature in step.features.items():
            mode = step.norm_map.get(feature.type, NormalizationMode.IDENTITY)
            if mode is not NormalizationMode.IDENTITY and feature.type is not FeatureType.VISUAL:
                found[key] = widths.get(key, 0)
    return found


def _check_statistics(config: PreTrainedConfig, preprocessor: PolicyProcessorPipeline) -> None:
    """A normaliser without statistics for a feature passes it through unchanged and says nothing."""
    if missing := sorted(key for key, width in _normalised_widths(preprocessor).items() if width == 0):
        raise ValueError(
            f"the preprocessor saved with {config.pretrained_path} has no normalisation statistics for "
            f"{', '.join(missing)}; take the dataset's with --normalization_stats=dataset and an anchor cache built "
            f"with the same flag"
        )
