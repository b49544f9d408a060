"""Property-based fuzzing of what reads a stranger's files: manifests, shards, CRaFT's state of a checkpoint.

    python -m tests.bridge.fuzz --cases 10000 [--output benchmarks/results]

Every case damages one file of a real cache or checkpoint and reads it. What may come out: a ValueError or
FileNotFoundError that names the file, or a load that equals the original; where the case also made the checksums right
again (how is public), a load that says by its digest that it is another cache. Everything else (another exception, more
than five seconds, more than a GiB of memory, a different load under the same digest) is a failure.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from craft_opt.bridge.anchor_cache import AnchorBatch, AnchorCache
from craft_opt.bridge.checkpoint import CraftState

SECONDS, MEMORY = 5, 2**30
MANIFEST = "manifest.json"

HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**60, 10**400, -(2**63), 0.0, -0.0, 1.0, 1e308, "", " ", "\0", "..", ".", "/",
    "../../x", "/etc/passwd", "a" * 300, "x" * 100_000, "é", "\u202e", "\ud800", "\x1b[2J", "$(touch x)", "NaN",
    "float32", "object", "manifest.json", "shard-00000.safetensors", [], {}, [[]], [None], {"": None}, [1] * 1000,
    {"file": "x"}, [0], [-1], [2**40, 2**40],
]  # fmt: skip
# What JSON's text may hold and Python's numbers may not be.
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 5000 + "]" * 5000, '{"a":' * 3000 + "1" + "}" * 3000]
_MARK = "@raw@"


@dataclass(frozen=True, repr=False)
class Base:
    """A real file's folder: its name, its files, and what reads it."""

    name: str
    folder: Path
    files: dict[str, bytes]
    read: Callable[[Path], tuple[str, Any]]


def base_of(name: str, folder: Path, read: Callable[[Path], tuple[str, Any]]) -> Base:
    return Base(name, folder, {file.name: file.read_bytes() for file in sorted(folder.iterdir())}, read)


def read_cache(folder: Path) -> tuple[str, AnchorBatch]:
    """Digest and content of a cache: everything that training would take from it."""
    cache = AnchorCache.open(folder)
    assert len(cache.task_texts()) == len(cache)
    return cache.manifest.digest, cache.gather(list(range(len(cache))))


def read_state(folder: Path) -> tuple[str, CraftState]:
    """A state carries no checksum: what it says is its digest."""
    state = CraftState.read(folder / "craft_state.safetensors")
    return repr(state), state


# -- what a case does --------------------------------------------------------------------------------------------


def paths_of(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, the whole left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*before, key)
        yield from paths_of(inner, (*before, key))


def damage_json(draw: Any, content: Any) -> str:
    """Change one to three places of a JSON value; the text of it."""
    raw = None
    for _ in range(draw(st.integers(1, 3))):
        places = list(paths_of(content))
        if not places:
            break
        *above, last = draw(st.sampled_from(places))
        parent = content
        for key in above:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "replace", "replace", "drop", "add", "nudge", "raw", "swap"]))
        if how == "drop":
            del parent[last]
        elif how == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(["x", "", "__class__", "file", "samples"]))] = hostile(draw)
        elif how == "add":
            parent.insert(0, parent[last] if draw(st.booleans()) else hostile(draw))
        elif how == "nudge" and isinstance(parent[last], int):
            parent[last] += draw(st.sampled_from([-1, 1, 2**16, 0.5]))
        elif how == "swap":
            other = content
            for key in draw(st.sampled_from(places)):
                other = other[key] if isinstance(other, (dict, list)) and _has(other, key) else other
            parent[last] = json.loads(json.dumps(other))
        elif how == "raw":
            parent[last], raw = _MARK, RAW[draw(st.integers(0, len(RAW) - 1))]
        else:
            parent[last] = (
                hostile(draw)
                if draw(st.booleans())
                else draw(st.one_of(st.integers(), st.floats(), st.text(max_size=20)))
            )
    text = json.dumps(content)
    return text.replace(f'"{_MARK}"', raw) if raw is not None else text


def hostile(draw: Any) -> Any:
    # By number, since some are too long to be shown; a copy, since it is damaged further in its place.
    return copy.deepcopy(HOSTILE[draw(st.integers(0, len(HOSTILE) - 1))])


def _has(container: Any, key: Any) -> bool:
    return key in container if isinstance(container, dict) else isinstance(key, int) and key < len(container)


def damage_bytes(draw: Any, content: bytes, others: Sequence[bytes]) -> bytes:
    """Flip, cut, insert, overwrite or splice."""
    place = draw(st.one_of(st.integers(0, len(content)), st.integers(0, min(len(content), 2500))))
    how = draw(st.sampled_from(["flip", "flips", "cut", "insert", "overwrite", "splice", "length", "random", "repeat"]))
    changed = bytearray(content)
    if how in ("flip", "flips"):
        for _ in range(1 if how == "flip" else draw(st.integers(2, 20))):
            changed[min(place, len(content) - 1)] ^= 1 << draw(st.integers(0, 7))
            place = draw(st.integers(0, len(content) - 1))
    elif how == "cut":
        del changed[place : draw(st.sampled_from([len(content), place + 1, place + 8, place + 1000]))]
    elif how == "insert":
        changed[place:place] = draw(st.binary(min_size=1, max_size=64))
    elif how == "overwrite":
        piece = draw(st.binary(min_size=1, max_size=64))
        changed[place : place + len(piece)] = piece
    elif how == "splice":
        other = draw(st.sampled_from(others))
        start = draw(st.integers(0, len(other)))
        changed[place:] = other[start:]
    elif how == "length":
        length = draw(st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 4096), st.just(len(content) - 8)))
        changed[:8] = length.to_bytes(8, "little")
    elif how == "repeat":
        changed[place:place] = content[place : place + 500] * draw(st.integers(1, 50))
    else:
        changed = bytearray(draw(st.binary(max_size=300)))
    return bytes(changed)


def damage_header(draw: Any, content: bytes) -> bytes:
    """Lie in a safetensors header."""
    length = int.from_bytes(content[:8], "little")
    text = damage_json(draw, json.loads(content[8 : 8 + length])).encode(errors="surrogatepass")
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def resealed(files: dict[str, bytes]) -> dict[str, bytes]:
    """Checksums and sizes made right again, as far as the manifest can still be read."""
    try:
        content = json.loads(files[MANIFEST])
        for shard in content["shards"]:
            if shard["file"] in files:
                held = files[shard["file"]]
                shard |= {"bytes": len(held), "sha256": hashlib.sha256(held).hexdigest()}
        return files | {MANIFEST: _sealed(content)}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return files


def _sealed(content: dict[str, Any]) -> bytes:
    plain = {name: value for name, value in content.items() if name not in ("format", "version", "manifest_sha256")}
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False)
    sha = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return json.dumps(content | {"manifest_sha256": sha}).encode()


@st.composite
def cases(draw: Any, bases: Sequence[Base]) -> tuple[Base, str, bool, dict[str, bytes]]:
    """A base, what is done to it, whether its checksums are made right again, and its files afterwards."""
    base = draw(st.sampled_from(bases))
    name = draw(st.sampled_from([*base.files, *([MANIFEST] * 3 if MANIFEST in base.files else [])]))
    content = base.files[name]
    how = draw(st.sampled_from(["structure", "structure", "bytes"]))
    if how == "bytes":
        changed = damage_bytes(draw, content, list(base.files.values()))
    elif name == MANIFEST:
        changed = damage_json(draw, json.loads(content)).encode(errors="surrogatepass")
    else:
        changed = damage_header(draw, content)
    files = base.files | {name: changed}
    seal = MANIFEST in files and draw(st.booleans())
    return base, f"{how} of {'manifest' if name == MANIFEST else 'tensors'}", seal, resealed(files) if seal else files


# -- what may come of it -----------------------------------------------------------------------------------------


class Hang(Exception):
    """A case took too long."""


@contextmanager
def watched() -> Iterator[None]:
    """At most five seconds a case, and a GiB above what the process has."""

    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Let an allocation of more than a GiB fail: the address space is limited."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(base: Base, files: dict[str, bytes], seal: bool, folder: Path, original: tuple[str, Any]) -> str:
    """Read the case's files, and say what came of it.

    Raises:
        AssertionError: Something that must not.
    """
    for old in folder.iterdir():
        old.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        with watched():
            digest, found = base.read(folder)
    except (ValueError, FileNotFoundError) as error:
        assert str(folder) in str(error), f"an error that does not name the file: {error!r}"
        assert len(str(error)) < 4000, "an error as long as what it complains of"
        assert "$(" not in str(error).partition("craft-anchors build")[2], "a command with a stranger's words in it"
        return "refused"
    if base.read is read_state or seal:
        # Nothing tells a state or a sealed cache that somebody made from one that a program made: it says what it is.
        same = digest == original[0]
        assert not same or equal(found, original[1]), "another load under the same digest"
        return "equal" if same else "another one, by its digest"
    assert digest == original[0] and equal(found, original[1]), "a damaged file was taken for a whole one"
    return "equal"


def equal(first: Any, second: Any) -> bool:
    """Whether two loads hold the same bits."""
    if isinstance(first, torch.Tensor):
        # As bytes: NaN is equal to itself here.
        return (
            isinstance(second, torch.Tensor)
            and (first.dtype, first.shape) == (second.dtype, second.shape)
            and first.contiguous().flatten().view(torch.uint8).equal(second.contiguous().flatten().view(torch.uint8))
        )
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, AnchorBatch):
        return equal(vars(first), vars(second))
    return bool(first == second)


def fuzz(bases: Sequence[Base], count: int, scratch: Path, seed: int = 0) -> Counter[str]:
    """Run so many cases, and count what came of them.

    Raises:
        AssertionError: One failed; hypothesis shows the smallest such case.
    """
    found: Counter[str] = Counter()
    folder = scratch / "case"
    folder.mkdir()
    originals = {base.name: base.read(base.folder) for base in bases}

    # One seed, the same cases: a failure here is a failure everywhere.
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=seed == 0,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(bases))
    def run(case: tuple[Base, str, bool, dict[str, bytes]]) -> None:
        base, what, seal, files = case
        result = outcome(base, files, seal, folder, originals[base.name])
        found["cases"] += 1
        found[f"{base.name}, {what}{', resealed' if seal else ''}: {result}"] += 1
        found[result] += 1

    with bounded_memory():
        run()
    return found


# -- the command -------------------------------------------------------------------------------------------------


def make_bases(root: Path) -> list[Base]:
    """A hidden and a token_ce cache of six anchors, and the states of both formats."""
    from craft_opt.bridge.anchors import AnchorSource, build_cache
    from tests.quickstart.support import make_tiny_dataset, make_tiny_policy, save_tiny_policy

    data = make_tiny_dataset(root / "data", episodes=2, frames=4)
    torch.manual_seed(0)
    save_tiny_policy(root / "teacher", *make_tiny_policy(data))
    for kind in ("hidden", "token_ce"):
        source, device = AnchorSource("local/tiny", root / "data"), ["--device=cpu"]
        plan = {"num_samples": 6, "shard_size": 4, "progress": False, "policy_overrides": device}
        build_cache(root / kind, root / "teacher", [source], kind=kind, **plan)
    return [*(base_of(kind, root / kind, read_cache) for kind in ("hidden", "token_ce")), state_base(root / "state")]


def state_base(folder: Path) -> Base:
    folder.mkdir()
    state = CraftState(0.25, 7, 1, (12, 3), ("a" * 64, "b" * 64), "teacher", 2)
    state.write(folder / "craft_state.safetensors")
    return base_of("state", folder, read_state)


def main(argv: Sequence[str] | None = None) -> int:
    from benchmarks.harness import write_document

    parser = argparse.ArgumentParser(prog="python -m tests.bridge.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="0: the same cases every time")
    parser.add_argument("--output", type=Path, help="folder of the results file; none without it")
    options = parser.parse_args(argv)
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        bases = make_bases(root)
        started = time.perf_counter()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = fuzz(bases, options.cases, root, options.seed)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    finally:
        shutil.rmtree(root)
    print(f"{found['cases']} of {options.cases} cases: an error that names the file, or a right load")
    for name, number in sorted(found.items()):
        print(f"  {number:>6}  {name}")
    print(f"peak memory grew by {grown / 1024:.0f} MiB over the cases")
    if options.output is not None:
        file, _ = write_document(
            options.output,
            "fuzz",
            f"python -m tests.bridge.fuzz --cases {options.cases}",
            cases=found["cases"],
            failures=0,
            outcomes=dict(sorted(found.items())),
            limits={"seconds_a_case": SECONDS, "address_space_above_start_bytes": MEMORY},
            peak_memory_growth_kib=grown,
            seconds=time.perf_counter() - started,
        )
        print(f"Results: {file}")
    return 0 if found["cases"] >= options.cases else 1


if __name__ == "__main__":
    sys.exit(main())
