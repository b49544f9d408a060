"""What may run when a policy is loaded: installed packages, and a tokenizer's own code where a flag says so.

LeRobot 0.6 imports and calls whatever a processor's file names, runs the code that lies beside a tokenizer without
asking, and PEFT imports a module that an adapter's settings name. All three come with a folder from somebody else, so
they are looked through, or stopped, before LeRobot sees them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lerobot.processor import ProcessorStep
from safetensors import safe_open

from craft_opt.bridge.untrusted import is_plain_name, read_json, shown

TRUST_FLAG = "trust_remote_code"
# The one tokenizer whose code the installed LeRobot itself names: by its name on the hub only.
_LEROBOTS_OWN = "lerobot/fast-action-tokenizer"
_PACKAGES = ("lerobot", "craft_opt")
_REMEDY = "take a policy whose files you can read, or ask its author"


@contextmanager
def remote_code(allowed: bool) -> Iterator[None]:
    """Let transformers fetch and run code from beside a tokenizer only where that was asked for.

    LeRobot's pi0_fast asks for it on every load, so this stands at the one place where transformers gets such code.

    Args:
        allowed: Whether ``--trust_remote_code`` was given.

    Raises:
        ValueError: Code would have run.
    """
    from transformers import dynamic_module_utils

    get = dynamic_module_utils.get_cached_module_file

    def checked(repo: Any, module_file: str, *rest: Any, **named: Any) -> Any:
        own = str(repo) == _LEROBOTS_OWN and not Path(str(repo)).exists()
        if allowed or own:
            return get(repo, module_file, *rest, **named)
        raise ValueError(
            f"tokenizer {repo} brings code of its own ({shown(module_file)}), which would run with your rights; read "
            f"it, and allow it with --{TRUST_FLAG}=true"
        )

    dynamic_module_utils.get_cached_module_file = checked
    try:
        yield
    finally:
        dynamic_module_utils.get_cached_module_file = get


def check_policy_config(path: str | Path) -> None:
    """Check that a local folder's config.json, where it has one, is JSON with one meaning before LeRobot reads it.

    Raises:
        ValueError: It is not.
    """
    file = Path(path) / "config.json"
    if file.is_file() and not isinstance(read_json(file, _REMEDY), dict):
        raise ValueError(f"{file} holds no settings of a policy; {_REMEDY}")


def check_processor(file: Path) -> None:
    """Check the steps that a saved processor names.

    A step is one of LeRobot's by its registered name, or a class of steps in LeRobot, here, or in a package that was
    loaded already (a plugin's, by its flag); its state lies beside it.

    Raises:
        ValueError: It names something else, or the file is damaged.
    """
    content = read_json(file, _REMEDY)
    steps = content.get("steps") if isinstance(content, dict) else None
    for step in steps if isinstance(steps, list) else []:  # anything else LeRobot refuses itself
        if not isinstance(step, dict):
            raise ValueError(f"{file} names {shown(step)} as a step; {_REMEDY}")
        if "registry_name" not in step:
            _check_class(file, step.get("class"))
        state = step.get("state_file")
        if state is not None and not (isinstance(state, str) and is_plain_name(state)):
            raise ValueError(f"{file} has the state of a step in {shown(state)}, outside of its folder; {_REMEDY}")


def check_adapter(file: Path) -> dict[str, Any]:
    """Check the settings beside an adapter's weights: they import nothing, and ask for no more than the weights hold.

    Args:
        file: The adapter's ``adapter_config.json``.

    Returns:
        The settings.

    Raises:
        ValueError: They do, or the file is damaged.
    """
    settings = read_json(file, _REMEDY)
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no settings of an adapter; {_REMEDY}")
    if settings.get("megatron_config") is not None:
        module = shown(settings.get("megatron_core"))
        raise ValueError(f"{file} has PEFT import {module} (megatron_config), which no policy needs; {_REMEDY}")
    if settings.get("tokenizer_kwargs"):
        raise ValueError(f"{file} has PEFT load a tokenizer (tokenizer_kwargs), which no policy needs; {_REMEDY}")
    return settings


def check_ranks(settings: dict[str, Any], file: Path, weights: Path) -> None:
    """Check that the ranks of an adapter are sizes that its weights have: PEFT makes room for them first.

    Raises:
        ValueError: One is not.
    """
    pattern = settings.get("rank_pattern")
    ranks = [settings.get("r"), *(pattern.values() if isinstance(pattern, dict) else [])]
    with safe_open(weights, framework="pt") as content:
        sizes = {size for name in content.keys() for size in content.get_slice(name).get_shape()}  # noqa: SIM118
    if odd := [rank for rank in ranks if rank is not None and (type(rank) is not int or rank not in sizes)]:
        raise ValueError(f"{file} asks for rank {shown(odd[0])}, and no tensor in {weights.name} has that size")


def _check_class(file: Path, path: Any) -> None:
    module, _, name = path.rpartition(".") if isinstance(path, str) else ("", "", "")
    # Installed packages may be imported, and what a flag has loaded is there; nothing else is looked at.
    known = module in sys.modules or module.split(".")[0] in _PACKAGES
    try:
        found = getattr(importlib.import_module(module), name, None) if known else None
    except ImportError:
        found = None
    if not (isinstance(found, type) and issubclass(found, ProcessorStep)):
        raise ValueError(
            f"{file} names {shown(path)} as a step, which is no class of processor steps in LeRobot or here; load a "
            f"plugin's package with --policy.discover_packages_path=<package>, or {_REMEDY}"
        )
