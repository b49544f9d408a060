"""``craft-anchors build``: make an anchor cache from a teacher and the datasets of its old skills."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


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
        Exit code: 0, 2 for a command that cannot be carried out, 130 after Ctrl-C.
    """
    parser, build = _parsers()
    argv = sys.argv[1:] if argv is None else argv
    known = {name for action in build._actions for name in action.option_strings}
    # Before argparse: it would name the flag that is missing, not the one that was mistyped.
    for flag in (token.split("=")[0] for token in argv if token.startswith("--")):
        if flag not in known:
            close = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
            parser.error(f"unknown flag {flag}{f'; did you mean {close[0]}?' if close else ''}")
    args = parser.parse_args(argv)
    try:
        return _build(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parsers() -> tuple[_Parser, argparse.ArgumentParser]:
    parser = _Parser(prog="craft-anchors", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="build")
    build = commands.add_parser(
        "build",
        allow_abbrev=False,
        help="build a cache; killed, the same command goes on where it was",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = build.add_argument
    add("--policy.path", dest="policy", required=True, help="the teacher: a folder or a name on the hub")
    add("--policy.device", dest="device", help="cpu, cuda; by default LeRobot's choice")
    add("--policy.dtype", dest="policy_dtype", help="dtype that the teacher computes in; as the fine-tuning run will")
    add("--dataset.repo_id", dest="repo_ids", action="append", required=True, help="old skills; may be repeated")
    add("--dataset.root", dest="roots", action="append", default=[], help="folder of each dataset, in the same order")
    add("--episodes", type=_episodes, help="episodes to draw from, such as 0-9,12 (one dataset only)")
    add("--output", "--output_dir", dest="output", required=True, help="folder of the cache")
    add("--num-samples", "--num_samples", dest="num_samples", type=int, required=True, help="anchors in all")
    add("--kind", default="hidden", choices=("hidden", "token_ce"), help="what is cached")
    add("--layers", type=_numbers, default=(-2, -1), help="decoder layers, from 1, or from the last as -1")
    add("--pooling", default="action_tokens", help="where the features are taken")
    add("--dtype", default="auto", help="of the stored features: auto, float32, bfloat16 or float16")
    add("--action-tokens", default="demonstrated", help="whose tokens are forced: demonstrated or teacher")
    add("--seed", type=int, default=0, help="seed of the selection")
    add("--shard-size", type=int, default=64, help="anchors per file")
    add("--batch-size", type=int, default=16, help="anchors per forward of the teacher")
    add("--normalization_stats", default="teacher", help="teacher or dataset; as the fine-tuning run will")
    add("--stats.repo_id", dest="stats_repo_id", help="for --normalization_stats=dataset: the new skill's dataset")
    add("--stats.root", dest="stats_root", help="its folder")
    add("--rename_map", type=json.loads, default={}, help="dataset's keys to the policy's, as JSON")
    return parser, build


def _build(args: argparse.Namespace) -> int:
    if args.kind == "token_ce":
        raise ValueError("--kind=token_ce is not built yet; use --kind=hidden")
    if args.roots and len(args.roots) != len(args.repo_ids):
        raise ValueError(
            f"{len(args.repo_ids)} --dataset.repo_id and {len(args.roots)} --dataset.root were given; give a root for "
            f"each dataset, in the same order, or none"
        )
    if args.episodes is not None and len(args.repo_ids) > 1:
        raise ValueError("--episodes goes with one --dataset.repo_id only")
    # Imported when the flags are known to be right: LeRobot takes ten seconds.
    from craft_opt.bridge import shorten_codec_warning

    shorten_codec_warning()
    from craft_opt.bridge.anchors import AnchorSource, build_cache
    from craft_opt.bridge.logs import say, set_up_logging

    set_up_logging()
    roots = args.roots or [None] * len(args.repo_ids)
    overrides = {"device": args.device, "dtype": args.policy_dtype}
    manifest = build_cache(
        Path(args.output),
        args.policy,
        [AnchorSource(repo_id, root, args.episodes) for repo_id, root in zip(args.repo_ids, roots, strict=True)],
        num_samples=args.num_samples,
        layers=args.layers,
        pooling=args.pooling,
        dtype=args.dtype,
        seed=args.seed,
        shard_size=args.shard_size,
        batch_size=args.batch_size,
        token_source=args.action_tokens,
        normalization_stats=args.normalization_stats,
        stats_source=AnchorSource(args.stats_repo_id, args.stats_root) if args.stats_repo_id else None,
        rename_map=args.rename_map,
        policy_overrides=[f"--{name}={value}" for name, value in overrides.items() if value],
    )
    say(
        f"Anchor cache: {args.output} ({manifest.samples} anchors of {len(manifest.tasks)} tasks, "
        f"{manifest.pooling} of layers {', '.join(map(str, manifest.layers))})"
    )
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.strip("[]").split(","))


def _episodes(text: str) -> tuple[int, ...]:
    found: list[int] = []
    for part in text.strip("[]").split(","):
        first, separator, last = part.strip().partition("-")
        found += range(int(first), int(last) + 1) if separator else [int(first)]
    return tuple(dict.fromkeys(found))


if __name__ == "__main__":
    sys.exit(main())
