"""``craft-anchors``: build an anchor cache from a teacher and its old skills' datasets, look at it, verify it."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from craft_opt.bridge.anchor_manifest import KINDS, SELECTIONS, STORAGES
from craft_opt.bridge.run_guard import describe, exit_code, remedy, sigterm_as_interrupt

EXIT_REFUSED = 1
EXIT_USER_ERROR = 2
_TRUST_HELP = "true lets the policy's tokenizers run code that lies beside them, with your rights"


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors and the closest known flag."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``craft-anchors``.

    Args:
        argv: Arguments without the program's name; None takes ``sys.argv``.

    Returns:
        Exit code: 0, 1 where ``verify`` refuses a cache, 2 for a command that cannot be carried out, 130 after Ctrl-C,
        143 after SIGTERM.
    """
    parser, commands = _parsers()
    argv = sys.argv[1:] if argv is None else argv
    command = commands.get(argv[0]) if argv else None
    if command is not None:
        known = {name for action in command._actions for name in action.option_strings}
        # Before argparse: it would name the flag that is missing, not the one that was mistyped.
        for flag in (token.split("=")[0] for token in argv if token.startswith("--")):
            if flag not in known:
                close = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
                parser.error(f"unknown flag {flag}{f'; did you mean {close[0]}?' if close else ''}")
    args = parser.parse_args(argv)
    again = "; the same command goes on where it was" if args.command == "build" else ""
    with sigterm_as_interrupt():
        try:
            return {"build": _build, "inspect": _inspect, "verify": _verify}[args.command](args)
        except (ValueError, OSError) as error:
            told = f"; {remedy(error)}{again}" if remedy(error) else ""
            print(f"error: {error}{told}", file=sys.stderr)
            return EXIT_USER_ERROR
        except KeyboardInterrupt as interrupt:
            print(f"{describe(interrupt)}{again}", file=sys.stderr)
            return exit_code(interrupt)


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(prog="craft-anchors", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="build|inspect|verify")
    helps = {
        "build": "build a cache; killed, the same command goes on where it was",
        "inspect": "print what a cache holds, with a histogram of its features and a picture of sample frames",
        "verify": "check that a cache is whole and, given a policy, that the policy is its teacher",
    }
    parsers = {
        name: commands.add_parser(
            name, allow_abbrev=False, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        for name, text in helps.items()
    }
    _add_build_flags(parsers["build"])
    for name in ("inspect", "verify"):
        parsers[name].add_argument("folder", type=Path, help="the cache")
    parsers["inspect"].add_argument("--output", type=Path, help="the picture, a PNG file; none without it")
    parsers["inspect"].add_argument("--num-frames", type=int, default=8, help="sample frames in the picture")
    verify = parsers["verify"].add_argument
    verify("--policy.path", dest="policy", help="a policy that is to be the cache's teacher")
    verify("--policy.device", dest="device", help="cpu, cuda; by default LeRobot's choice")
    verify("--policy.dtype", dest="policy_dtype", help="dtype that it computes in; as at the build")
    verify("--stats.repo_id", dest="stats_repo_id", help="for a cache with the new skill's statistics: its dataset")
    verify("--stats.root", dest="stats_root", help="its folder")
    for command in (parsers["build"], parsers["verify"]):
        command.add_argument("--trust_remote_code", type=_truth, default=False, metavar="true", help=_TRUST_HELP)
    return parser, parsers


def _add_build_flags(build: argparse.ArgumentParser) -> None:
    add = build.add_argument
    add("--policy.path", dest="policy", required=True, help="the teacher: a folder or a name on the hub")
    add("--policy.device", dest="device", help="cpu, cuda; by default LeRobot's choice")
    add("--policy.dtype", dest="policy_dtype", help="dtype that the teacher computes in; as the fine-tuning run will")
    add("--dataset.repo_id", dest="repo_ids", action="append", required=True, help="old skills; may be repeated")
    add("--dataset.root", dest="roots", action="append", default=[], help="folder of each dataset, in the same order")
    add("--dataset.revision", dest="revisions", action="append", default=[], help="revision of each, in the same order")
    add(
        "--prompt",
        dest="prompts",
        action="append",
        default=[],
        help="asks for an old skill on the frames of datasets that do not show it; may be repeated",
    )
    add("--prompts-of", type=Path, help="a cache of the old skills: asks for each of them, as --prompt would")
    add("--episodes", type=_episodes, help="episodes to draw from, such as 0-9,12 (one dataset only)")
    add("--output", "--output_dir", dest="output", required=True, help="folder of the cache")
    add("--num-samples", "--num_samples", dest="num_samples", type=int, help="anchors in all; this or --fraction")
    add("--fraction", type=float, help="share of the chosen episodes' frames that become anchors")
    add(
        "--balance", choices=("tasks", "none"), default="tasks", help="as many anchors of every task, or of every frame"
    )
    add("--selection", default="random", choices=SELECTIONS, help="which of a task's frames; coverage: unlike ones")
    add("--kind", default="hidden", choices=KINDS, help="what is cached: features, or what the teacher says of tokens")
    add("--storage", default="self_contained", choices=STORAGES, help="copy the frames, or refer to the datasets'")
    add("--layers", type=_numbers, help="for hidden: decoder layers, from 1, or from the last as -1; unset is -2,-1")
    add("--pooling", help="for hidden: where the features are taken; unset is action_tokens")
    add("--top-k", dest="top_k", type=int, help="for token_ce: most probable tokens kept a position; unset is 8")
    add("--dtype", default="auto", help="for hidden: of the features, auto, float32, bfloat16 or float16")
    add("--action-tokens", help="whose tokens are forced: demonstrated (unset, for hidden) or teacher (for token_ce)")
    add("--seed", type=int, default=0, help="seed of the selection")
    add("--shard-size", type=int, default=64, help="anchors per file")
    add("--batch-size", type=int, default=16, help="anchors per forward of the teacher")
    add("--num-workers", type=int, default=0, help="processes that read frames, for videos; 0 is a thread")
    add("--normalization_stats", default="teacher", help="teacher or dataset; as the fine-tuning run will")
    add("--stats.repo_id", dest="stats_repo_id", help="for --normalization_stats=dataset: the new skill's dataset")
    add("--stats.root", dest="stats_root", help="its folder")
    add("--rename_map", type=json.loads, default={}, help="dataset's keys to the policy's, as JSON")


def _build(args: argparse.Namespace) -> int:
    for flag, values in (("root", args.roots), ("revision", args.revisions)):
        if values and len(values) != len(args.repo_ids):
            raise ValueError(
                f"{len(args.repo_ids)} --dataset.repo_id and {len(values)} --dataset.{flag} were given; give a {flag} "
                f"for each dataset, in the same order, or none"
            )
    if args.episodes is not None and len(args.repo_ids) > 1:
        raise ValueError("--episodes goes with one --dataset.repo_id only")
    _set_up()
    from craft_opt.bridge.anchor_cache import AnchorCache
    from craft_opt.bridge.anchors import AnchorSource, build_cache
    from craft_opt.bridge.logs import say

    prompts = args.prompts
    if args.prompts_of is not None:
        prompts = list(dict.fromkeys([*prompts, *AnchorCache.open(args.prompts_of).task_texts()]))
    nothing = [None] * len(args.repo_ids)
    places = zip(args.repo_ids, args.roots or nothing, args.revisions or nothing, strict=True)
    sources = [
        AnchorSource(repo_id, root, args.episodes, revision, prompt)
        for repo_id, root, revision in places
        for prompt in prompts or [None]
    ]
    manifest = build_cache(
        Path(args.output),
        args.policy,
        sources,
        kind=args.kind,
        storage=args.storage,
        num_samples=args.num_samples,
        fraction=args.fraction,
        balance=args.balance == "tasks",
        selection=args.selection,
        layers=args.layers,
        pooling=args.pooling,
        top_k=args.top_k,
        dtype=args.dtype,
        seed=args.seed,
        shard_size=args.shard_size,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        token_source=args.action_tokens,
        normalization_stats=args.normalization_stats,
        stats_source=AnchorSource(args.stats_repo_id, args.stats_root) if args.stats_repo_id else None,
        rename_map=args.rename_map,
        policy_overrides=_overrides(args),
        trust_remote_code=args.trust_remote_code,
    )
    say(f"Anchor cache: {args.output} ({manifest.samples} anchors of {len(manifest.tasks)} tasks, {manifest.content})")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    _set_up()
    from craft_opt.bridge.anchors_inspect import inspect_cache

    print("\n".join(inspect_cache(args.folder, args.output, args.num_frames)))
    return 0


def _verify(args: argparse.Namespace) -> int:
    _set_up()
    from craft_opt.bridge.anchors import AnchorSource
    from craft_opt.bridge.anchors_verify import verify_cache

    stats = AnchorSource(args.stats_repo_id, args.stats_root) if args.stats_repo_id else None
    try:
        print(verify_cache(args.folder, args.policy, _overrides(args), stats, trust_remote_code=args.trust_remote_code))
    except (ValueError, OSError) as error:
        print(f"not verified: {error}", file=sys.stderr)
        return EXIT_REFUSED
    return 0


def _set_up() -> None:
    """What LeRobot's ten seconds of import are spent for: called once the flags are known to be right."""
    from craft_opt.bridge import shorten_codec_warning

    shorten_codec_warning()
    from craft_opt.bridge.logs import set_up_logging

    set_up_logging()


def _overrides(args: argparse.Namespace) -> list[str]:
    given = {"device": args.device, "dtype": args.policy_dtype}
    return [f"--{name}={value}" for name, value in given.items() if value]


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text == "true"


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.strip("[]").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between, such as -2,-1; got {text!r}") from None


def _episodes(text: str) -> tuple[int, ...]:
    found: list[int] = []
    try:
        for part in text.strip("[]").split(","):
            first, separator, last = part.strip().partition("-")
            run = range(int(first), int(last if separator else first) + 1)
            if not run:
                raise ValueError
            found += run
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers and ranges, such as 0-9,12; got {text!r}") from None
    return tuple(dict.fromkeys(found))


if __name__ == "__main__":
    sys.exit(main())
