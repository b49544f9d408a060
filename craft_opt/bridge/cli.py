"""The command line of ``train.py``: what the flags mean, which of them contradict each other, where they go.

Everything that can be told without LeRobot is told before LeRobot is imported (that takes ten seconds): CRaFT's own
flags and their values, contradictions, what the quickstart takes. Names of LeRobot's flags are checked right after,
against its configuration classes, so that a mistyped flag never trains.
"""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from craft_opt.bridge import shorten_codec_warning
from craft_opt.bridge.processes import is_main, world_size
from craft_opt.bridge.run_guard import describe, exit_code, how_to_go_on, remedy, sigterm_as_interrupt
from craft_opt.config import CraftConfig

if TYPE_CHECKING:
    from craft_opt.bridge.loop import TrainSummary

EXIT_USER_ERROR = 2
_TIME_TO_TELL = 10.0  # seconds
RETENTION_CHOICES = ("hidden", "token_ce", "none")
QUICKSTART_FLAGS = ("seed", "output_dir", "steps")
# What makes a command line the real training and not the quickstart.
_TRAINING_PREFIXES = ("policy.", "dataset.", "reward_model.")
_TRAINING_FLAGS = ("config_path", "resume")
_FORMER_NAMES = {"eval_freq": "env_eval_freq", "dry-run": "dry_run", "retention-mode": "retention_mode"}
_SWITCHES = ("dry_run", "help")
_CRAFT_FIELDS = {f.name: f for f in fields(CraftConfig)}

HELP = """\
Fine-tune a robot policy on a new skill and keep the old ones.

The quickstart, offline, on two CPU cores or a GPU (MetaWorld demonstrations, a tiny pi0_fast):
  python train.py --retention-mode hidden|token_ce|none [--seed N] [--output_dir DIR] [--steps N] [--craft.x=v ...]
                  [--dry-run]

Your own policy and data:
  python train.py --policy.path=lerobot/pi0fast-base --dataset.repo_id=NAME --steps=N \\
      --craft.anchor_cache_dir=DIR [LeRobot's flags] [--craft.x=v ...] [--dry-run]
  with an anchor cache from: craft-anchors build --help

Go on from a checkpoint:
  python train.py --resume=true --config_path=DIR/checkpoints/last/pretrained_model/train_config.json

Flags of this program:
  --retention-mode MODE         hidden (the teacher's features), token_ce (its action tokens) or none
  --dry-run                     three steps, no checkpoint
  --normalization_stats=WHOSE   teacher (default: keeps the policy's own) or dataset (needs a cache built with them)
  --gradient_accumulation_steps=N   batches to a step; --policy.gradient_checkpointing=true saves memory as well
  --anchor_layers=[-2,-1]       refuse a cache of other layers;  --anchor_pooling=NAME: of another pooling
Settings of the method (--craft.x=v or craft.x=v), with their defaults:
"""


class UsageError(ValueError):
    """The command line cannot be carried out; the message says why and what to do."""


@dataclass(frozen=True)
class Command:
    """A command line, taken apart and checked as far as that needs no LeRobot.

    Attributes:
        kind: ``help``, ``quickstart`` or ``train``.
        flags: Every flag but CRaFT's settings, name → value, in order.
        craft: CRaFT's settings that were given, typed.
        dry_run: Three steps, no checkpoint.
    """

    kind: str
    flags: dict[str, str] = field(default_factory=dict)
    craft: dict[str, Any] = field(default_factory=dict)
    dry_run: bool = False

    @property
    def retention_mode(self) -> str:
        """``hidden``, ``token_ce`` or ``none``."""
        if not self.craft.get("enabled", CraftConfig.enabled):
            return "none"
        return str(self.craft.get("retention_mode", CraftConfig.retention_mode))


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``train.py``.

    Args:
        argv: Arguments without the program's name; None takes ``sys.argv``.

    Returns:
        Exit code: 0, 2 for a command that cannot be carried out, 130 after Ctrl-C, 143 after SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    with sigterm_as_interrupt():
        try:
            command = read_command(argv)
            if command.kind == "help":
                return show_help(command)
            return _quickstart(command) if command.kind == "quickstart" else _train(command)
        except UsageError as error:
            return report_error(error)
        except KeyboardInterrupt as interrupt:
            if is_main():
                print(describe(interrupt), file=sys.stderr)
            return exit_code(interrupt)


def read_command(argv: Sequence[str]) -> Command:
    """Take the arguments apart.

    Raises:
        UsageError: An argument is malformed, unknown or contradicts another.
    """
    given = _tokens(argv)
    flags: dict[str, str] = {}
    for spelled, value in given:
        name = _FORMER_NAMES.get(spelled, spelled)
        if name in flags and flags[name] != value:
            raise UsageError(f"contradictory flags: --{spelled} is given twice, as {flags[name]!r} and as {value!r}")
        flags[name] = value
    wants_help = _switch(flags, "help")
    dry_run = _switch(flags, "dry_run")
    craft = _craft_settings(flags)
    kind = "train" if any(_is_training(name) for name in flags) else "quickstart"
    if wants_help:
        return Command("help", flags, craft, dry_run)
    if kind == "quickstart":
        _check_quickstart(flags, craft, given=bool(argv))
    else:
        _check_training(flags, dry_run)
    return Command(kind, flags, craft, dry_run)


def _tokens(argv: Sequence[str]) -> list[tuple[str, str]]:
    """``--name=value``, ``--name value``, ``name.x=value`` for CRaFT's settings, and bare switches."""
    found: list[tuple[str, str]] = []
    position = 0
    while position < len(argv):
        token = argv[position]
        position += 1
        if token in ("-h", "--help"):
            found.append(("help", "true"))
            continue
        if token.startswith("craft.") and "=" in token:
            token = f"--{token}"
        if not token.startswith("--") or token == "--":
            hint = f"; did you mean --{token}" if "=" in token else ""
            raise UsageError(f"unknown argument {token!r}{hint}; flags are written --name=value")
        name, separator, value = token[2:].partition("=")
        if not separator:
            follows = position < len(argv) and not argv[position].startswith(("--", "craft."))
            if _FORMER_NAMES.get(name, name) in _SWITCHES and not (
                follows and argv[position].lower() in ("true", "false")
            ):
                value = "true"
            elif follows:
                value = argv[position]
                position += 1
            else:
                raise UsageError(f"--{name} needs a value: --{name}=<value>")
        found.append((name, value))
    return found


def _switch(flags: dict[str, str], name: str) -> bool:
    value = flags.pop(name, "false").lower()
    if value not in ("true", "false"):
        raise UsageError(f"--{name} must be true or false, got {value!r}")
    return value == "true"


def _craft_settings(flags: dict[str, str]) -> dict[str, Any]:
    """Take CRaFT's settings out of the flags, typed, checked, and with ``--retention-mode`` folded in."""
    settings: dict[str, Any] = {}
    for flag in [name for name in flags if name == "craft" or name.startswith("craft.")]:
        name = flag.removeprefix("craft").removeprefix(".")
        if name not in _CRAFT_FIELDS:
            raise unknown_flag(flag, [f"craft.{known}" for known in _CRAFT_FIELDS])
        settings[name] = _typed(flag, flags.pop(flag), type(_CRAFT_FIELDS[name].default))
    mode = flags.pop("retention_mode", None)
    if mode is not None:
        if mode not in RETENTION_CHOICES:
            raise UsageError(f"--retention-mode must be one of {', '.join(RETENTION_CHOICES)}, got {mode!r}")
        meant: dict[str, Any] = {"enabled": mode != "none"}
        if mode != "none":
            meant["retention_mode"] = mode
        for name, value in meant.items():
            if settings.get(name, value) != value:
                raise UsageError(
                    f"contradictory flags: --retention-mode {mode} means craft.{name}={_text(value)}, and "
                    f"--craft.{name}={_text(settings[name])} is given; drop one of them"
                )
        if mode == "none" and "retention_mode" in settings:
            raise UsageError(
                f"contradictory flags: --retention-mode none switches retention off, and "
                f"--craft.retention_mode={settings['retention_mode']} is given; drop one of them"
            )
        settings |= meant
    if settings.get("epsilon") == "auto" and (ends := [n for n in ("epsilon_start", "epsilon_end") if n in settings]):
        raise UsageError(
            f"contradictory flags: --craft.epsilon=auto measures what --craft.{ends[0]} says; drop one of them, or set "
            f"--craft.epsilon_auto_fraction"
        )
    try:
        CraftConfig(**settings)
    except ValueError as error:
        raise UsageError(f"craft.{error}") from error
    return settings


def _typed(flag: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UsageError(f"--{flag} must be true or false, got {text!r}")
    try:
        return kind(text)
    except ValueError as error:
        name = {int: "a whole number", float: "a number"}[kind]
        raise UsageError(f"--{flag} must be {name}, got {text!r}") from error


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_training(name: str) -> bool:
    return name in _TRAINING_FLAGS or name.startswith(_TRAINING_PREFIXES)


def unknown_flag(flag: str, known: Collection[str], extra: str = "") -> UsageError:
    """The error for a flag that nothing reads, with the closest one that something does."""
    close = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
    hint = f"; did you mean --{close[0]}?" if close else ""
    return UsageError(f"unknown flag --{flag}{hint}{extra}")


def _check_quickstart(flags: dict[str, str], craft: dict[str, Any], *, given: bool) -> None:
    allowed = ("retention-mode", "dry-run", *QUICKSTART_FLAGS)
    for flag in flags:
        if flag not in QUICKSTART_FLAGS:
            raise unknown_flag(
                flag,
                allowed,
                f" (the quickstart takes {', '.join(f'--{name}' for name in allowed)} and --craft.*; training on your "
                f"own data needs --policy.path and --dataset.repo_id)",
            )
    for flag in ("seed", "steps"):
        if flag in flags and (not flags[flag].isdecimal() or (flag == "steps" and int(flags[flag]) < 1)):
            raise UsageError(f"--{flag} must be a whole number{' above 0' * (flag == 'steps')}, got {flags[flag]!r}")
    if "anchor_cache_dir" in craft:
        raise UsageError(
            "contradictory flags: the quickstart builds its own anchor cache, and --craft.anchor_cache_dir is given; "
            "drop it, or train on your own data with --policy.path and --dataset.repo_id"
        )
    if "enabled" not in craft and "retention_mode" not in craft:
        begin = "no training was asked for" if given else "no flags"
        raise UsageError(
            f"{begin}: say --retention-mode hidden (or none) for the quickstart, or --policy.path and "
            f"--dataset.repo_id for your own data; --help tells more"
        )


def _check_training(flags: dict[str, str], dry_run: bool) -> None:
    resume = flags.get("resume", "false").lower() == "true"
    if resume and "config_path" not in flags:
        raise UsageError(
            "--resume=true needs --config_path=<output_dir>/checkpoints/last/pretrained_model/train_config.json"
        )
    contradictions = [
        (
            resume and "policy.path" in flags,
            "--resume=true takes the policy of the checkpoint, and --policy.path names one",
        ),
        (resume and dry_run, "--dry-run writes no checkpoint and --resume=true goes on with one"),
        (
            "policy.path" in flags and "policy.type" in flags,
            "--policy.path brings its type, and --policy.type names one",
        ),
        (dry_run and flags.get("save_checkpoint", "false").lower() == "true", "--dry-run writes no checkpoint"),
        (
            "scheduler.type" in flags
            and flags.get("use_policy_training_preset", "true").lower() == "true"
            and not resume,
            "--scheduler.* has no effect beside the policy's preset; add --use_policy_training_preset=false",
        ),
    ]
    for is_so, why in contradictions:
        if is_so:
            raise UsageError(f"contradictory flags: {why}; drop one of them")
    path = flags.get("policy.path", "")
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise UsageError(
            f"--policy.path={path} does not exist; give the folder of a saved policy, or a name on the hub"
        )
    if "config_path" not in flags:
        if "dataset.repo_id" not in flags:
            raise UsageError(
                "training needs a dataset: --dataset.repo_id=<name> (with --dataset.root=<folder> if local)"
            )
        if not any(name in flags for name in ("policy.path", "policy.type", "reward_model.path", "reward_model.type")):
            raise UsageError("training needs a policy: --policy.path=<folder or hub name>")
    elif resume and not Path(flags["config_path"]).exists() and flags["config_path"].startswith((".", "/")):
        raise UsageError(f"--config_path={flags['config_path']} does not exist")


def show_help(command: Command) -> int:
    """Print the help that the command asks for and return 0."""
    if any(_is_training(name) for name in command.flags):
        from craft_opt.bridge.config import parse_config

        try:
            parse_config([*arguments_of(command), "--help"])
        except SystemExit:
            return 0
    print(HELP, end="")
    for name, known in _CRAFT_FIELDS.items():
        default = known.default if known.default is not MISSING else ""
        print(f"  craft.{name:<24}{_text(default)}")
    print("\nLeRobot's flags: add --help to a command with --policy.type or --policy.path.")
    return 0


def _quickstart(command: Command) -> int:
    shorten_codec_warning()
    if (count := world_size()) > 1:
        return report_error(
            UsageError(
                f"the quickstart runs in one process, and the launcher started {count}: python train.py "
                f"--retention-mode hidden; several train your own policy: --policy.path and --dataset.repo_id"
            )
        )
    from craft_opt.bridge.quickstart.run import run_quickstart

    output_dir, seed, steps = (command.flags.get(name) for name in ("output_dir", "seed", "steps"))
    folded = ("enabled", "retention_mode")
    try:
        return run_quickstart(
            retention_mode=command.retention_mode,
            craft_overrides={name: value for name, value in command.craft.items() if name not in folded},
            seed=None if seed is None else int(seed),
            output_dir=None if output_dir is None else Path(output_dir),
            steps=None if steps is None else int(steps),
            dry_run=command.dry_run,
        )
    except (ValueError, OSError) as error:
        return report_error(error)


def _train(command: Command) -> int:
    shorten_codec_warning()
    from craft_opt.bridge import flags as lerobot_flags
    from craft_opt.bridge.config import parse_config
    from craft_opt.bridge.logs import set_up_logging
    from craft_opt.bridge.loop import prepare, run_steps

    set_up_logging()
    try:
        lerobot_flags.check_names(command.flags)
        run = prepare(parse_config(arguments_of(command)))
    except SystemExit as stopped:  # LeRobot's parser, which has said why
        return EXIT_USER_ERROR if stopped.code else 0
    except (ValueError, OSError, NotImplementedError) as error:
        return report_error(error)
    except lerobot_flags.PARSER_ERRORS as error:
        return report_error(error)
    assert run.cfg.output_dir is not None
    try:
        code = show_summary(run_steps(run))
        run.ranks.close()
        return code
    except OSError as error:
        told = (str(error), remedy(error), how_to_go_on(run.cfg.output_dir))
        return report_error(OSError("; ".join(filter(None, told))), by_one=True)
    except KeyboardInterrupt:
        if is_main():
            print(how_to_go_on(run.cfg.output_dir), file=sys.stderr)
        raise


def show_summary(summary: TrainSummary) -> int:
    """Say where the results of a finished run are and return 0."""
    if not is_main():
        return 0
    if summary.checkpoint is not None:
        print(f"Trained policy: {summary.checkpoint / 'pretrained_model'}")
    print(f"Metrics: {summary.metrics_file}")
    return 0


def arguments_of(command: Command) -> list[str]:
    """The command as LeRobot's parser takes it."""
    flags = dict(command.flags)
    starts_policy = any(name in flags for name in ("policy.path", "policy.type"))
    if starts_policy and not {"policy.push_to_hub", "policy.repo_id", "config_path"} & flags.keys():
        # LeRobot pushes by default, and then refuses to start without a name to push to.
        flags["policy.push_to_hub"] = "false"
    flags |= {f"craft.{name}": _text(value) for name, value in command.craft.items()}
    if command.dry_run:
        flags["dry_run"] = "true"
        if starts_policy:
            flags["policy.push_to_hub"] = "false"
    return [f"--{name}={value}" for name, value in flags.items()]


def report_error(error: Exception, *, by_one: bool = False) -> int:
    """Say what is wrong, and what to do where the disk is at fault, and return the exit code for it.

    Of several processes the first one speaks for all, or, with ``by_one``, the one that it happened to.
    """
    told = f"; {remedy(error)}, and give the same command again" if remedy(error) else ""
    if is_main():
        print(f"error: {error}{told}", file=sys.stderr)
    elif by_one:
        print(f"error in process {os.environ['RANK']}: {error}{told}", file=sys.stderr)
    else:
        # A launcher ends the others as soon as one is gone: the first one must have spoken before.
        with suppress(KeyboardInterrupt):
            time.sleep(_TIME_TO_TELL)
    return EXIT_USER_ERROR
