"""Fingerprints: which teacher and which preprocessor made a cache, in 16 hexadecimal digits each."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from lerobot.processor import (
    ActionTokenizerProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    PolicyProcessorPipeline,
    ProcessorStep,
    RenameObservationsProcessorStep,
    TokenizerProcessorStep,
)
from torch import Tensor, nn

from craft_opt.bridge.features import pi0_fast_of

# Where a tokenizer was loaded from says nothing about what it does; its content is hashed instead.
_LOCATION_KEYS = ("tokenizer_name", "action_tokenizer_name", "paligemma_tokenizer_name")
_DIGITS = 16


def digest(value: Any) -> str:
    """Fingerprint of anything that JSON can hold, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def teacher_fingerprint(policy: nn.Module) -> str:
    """Fingerprint of every weight (name, dtype, shape, bytes) and of the settings that change the forward.

    In PEFT it is the base's as long as the adapters are off or still change nothing, and another one after that.
    """
    base = pi0_fast_of(policy)
    sha = hashlib.sha256()
    for name, tensor in sorted(_weights_at_work(base).items()):
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        sha.update(_bytes_of(tensor))
    settings = (base.config.type, base.config.dtype, list(base.config.image_resolution))
    sha.update(json.dumps([*settings, sorted(base.config.image_features)]).encode())
    return sha.hexdigest()[:_DIGITS]


def preprocessor_fingerprint(preprocessor: PolicyProcessorPipeline) -> str:
    """Fingerprint of what the preprocessor does to a sample: order, settings, statistics, tokenizers.

    The device and the renaming of dataset keys are left out: anchors are stored under the policy's own keys.
    """
    skipped = (DeviceProcessorStep, RenameObservationsProcessorStep)
    return digest([_describe(step) for step in preprocessor.steps if not isinstance(step, skipped)])


def _weights_at_work(base: nn.Module) -> dict[str, Tensor]:
    """Weights under the names that they have without PEFT, and those of adapters that change the forward."""
    idle: list[str] = []
    for name, module in base.named_modules():
        parts: tuple[str, ...] = getattr(module, "adapter_layer_names", ())
        if hasattr(module, "original_module") and hasattr(module, "modules_to_save"):
            parts = ("modules_to_save",)
        if parts and (module.disable_adapters or _changes_nothing(module)):
            idle += [f"{name}.{part}." for part in parts]
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in base.state_dict().items()
        if not name.startswith(tuple(idle))
    }


def _changes_nothing(module: Any) -> bool:
    """Whether an adapter is as PEFT began it: LoRA's second factor zero, a module to save equal to the original."""
    if hasattr(module, "original_module"):
        original = module.original_module.state_dict()
        copies = [module.modules_to_save[name].state_dict() for name in module.active_adapters]
        return all(torch.equal(copy[name], tensor) for copy in copies for name, tensor in original.items())
    seconds = [p for n, p in module.named_parameters() if n.startswith(("lora_B.", "lora_embedding_B."))]
    # Adapters of other kinds have no such factor: taken to change something.
    return bool(seconds) and not any(torch.count_nonzero(p) for p in seconds)


def _describe(step: ProcessorStep) -> dict[str, Any]:
    described: dict[str, Any] = {"step": type(step).__name__}
    if isinstance(step, NormalizerProcessorStep):
        modes = {kind.value: mode.value for kind, mode in step.norm_map.items()}
        used = {key: modes.get(feature.type.value, "IDENTITY") for key, feature in step.features.items()}
        # Statistics of features that are passed through (and of bookkeeping columns) change nothing.
        described["modes"] = {key: mode for key, mode in used.items() if mode != "IDENTITY"}
        described["statistics"] = {
            name: tensor.float().flatten().tolist()
            for name, tensor in step.state_dict().items()
            if name.rsplit(".", 1)[0] in described["modes"]
        }
        described["eps"] = step.eps
        return described
    described["config"] = {key: value for key, value in step.get_config().items() if key not in _LOCATION_KEYS}
    described["state"] = {name: tensor.flatten().tolist() for name, tensor in step.state_dict().items()}
    if isinstance(step, TokenizerProcessorStep):
        described["tokenizer"] = _describe_tokenizer(step.input_tokenizer)
    if isinstance(step, ActionTokenizerProcessorStep):
        described["tokenizer"] = _describe_tokenizer(step.action_tokenizer)
        described["text_tokenizer"] = _describe_tokenizer(step._paligemma_tokenizer)
        described["skip"] = [step.fast_skip_tokens, step.max_action_tokens]
    return described


def _describe_tokenizer(tokenizer: Any) -> Any:
    """Vocabulary and rules of a text tokenizer; the numbers and the inner tokenizer of a FAST one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # Calls leave these two behind in the tokenizer: they are settings of the last call.
        content.pop("truncation", None)
        content.pop("padding", None)
        return digest(content)
    if hasattr(tokenizer, "get_vocab"):
        return digest(tokenizer.get_vocab())
    plain = {
        name: value for name, value in sorted(vars(tokenizer).items()) if isinstance(value, int | float | str | bool)
    }
    inner = getattr(tokenizer, "bpe_tokenizer", None)
    return [plain, _describe_tokenizer(inner) if inner is not None else None]


def _bytes_of(tensor: Tensor) -> memoryview:
    # bf16 has no numpy type; any dtype can be viewed as bytes.
    return memoryview(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
