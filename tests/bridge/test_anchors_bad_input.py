"""Caches that lie: older formats, edited manifests, files that were moved, datasets that changed underneath."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from lerobot.datasets.dataset_tools import delete_episodes
from safetensors.torch import load_file, save_file

from craft_opt.bridge.anchor_cache import AnchorCache
from craft_opt.bridge.anchor_manifest import AnchorManifest, is_plain_name
from craft_opt.bridge.anchors import AnchorSource, build_cache
from tests.quickstart.support import TASKS, make_tiny_dataset


def reseal(folder: Path, **changes) -> None:
    """Edit a manifest and make its checksum right again: how is public, so a right one proves nothing."""
    file = folder / "manifest.json"
    content = json.loads(file.read_text()) | changes
    plain = {name: value for name, value in content.items() if name not in ("format", "version", "manifest_sha256")}
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False)
    file.write_text(json.dumps(content | {"manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}))


def content_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def with_first_shard(folder: Path, **changes) -> list[dict]:
    first, *rest = content_of(folder)["shards"]
    return [first | changes, *rest]


def test_resealing_unchanged_is_accepted(cache_copy):
    """The other tests of this file fail for what they change, not for how they change it."""
    reseal(cache_copy)
    assert len(AnchorCache.open(cache_copy)) == 20


def test_a_cache_of_format_version_1_names_the_command_that_rebuilds_it(tmp_path):
    """The manifest is one that version 1 of this program wrote."""
    shutil.copy(Path(__file__).parent / "data" / "manifest_version_1.json", tmp_path / "manifest.json")
    with pytest.raises(ValueError, match="has format version 1, and this program reads version 2") as refused:
        AnchorCache.open(tmp_path)
    command = f"craft-anchors build --policy.path=t --dataset.repo_id=local/tiny --num-samples=20 --output={tmp_path}"
    assert str(refused.value).endswith(f"delete it and build it again: {command}")


@pytest.mark.parametrize("name", ["../shard-00000.safetensors", "/etc/passwd", "sub/x", "..", ".", "", "a\\b", "x\0y"])
def test_a_manifest_that_names_a_file_outside_the_folder_is_refused(cache_copy, name):
    # There is such a file, and it is the right one: the name alone must not get there.
    shutil.copy(cache_copy / "shard-00000.safetensors", cache_copy.parent)
    (cache_copy / "sub").mkdir()
    shutil.copy(cache_copy / "shard-00000.safetensors", cache_copy / "sub" / "x")
    reseal(cache_copy, shards=with_first_shard(cache_copy, file=name))
    with pytest.raises(ValueError, match="which is no file name inside the folder; delete it and build it again"):
        AnchorCache.open(cache_copy)


def test_plain_names_are_plain():
    assert is_plain_name("shard-00000.safetensors")
    assert not is_plain_name("shards/0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "logits"}, "kind is 'logits' instead of one of hidden, token_ce"),
        ({"storage": "cloud"}, "storage is 'cloud' instead of one of self_contained, reference"),
        ({"samples": 21}, "it names 21 anchors, and its shards hold 20"),
        ({"samples": "20"}, "is no whole number"),
        ({"samples": True}, "is no whole number"),
        ({"depth": 0}, "is no whole number above 0"),
        ({"layers": [1, -2]}, "is no whole number above 0"),
        ({"layers": [1, 2, 3]}, "a hidden cache needs features/3, which it does not name"),
        ({"kind": "token_ce"}, "a token_ce cache needs teacher_ce, which it does not name"),
        ({"kind": "token_ce", "top_k": 4}, "needs teacher_ce, top_ids, top_logprobs"),
        ({"storage": "reference"}, "needs episode_index, frame_index, identity"),
        ({"shards": [{"file": "x"}]}, "does not describe an anchor cache"),
        ({"shards": 3}, "does not describe an anchor cache"),
        ({"tensors": []}, "does not describe an anchor cache"),
    ],
)
def test_a_resealed_manifest_that_makes_no_sense_is_refused(cache_copy, changes, message):
    reseal(cache_copy, **changes)
    with pytest.raises(ValueError, match=message):
        AnchorCache.open(cache_copy)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"dtype": "float32", "shape": [2**31, 2**31]}, "the shapes that the manifest declares need"),
        ({"dtype": "float32", "shape": [5]}, r"'state': \('float32', \[8, 5\]\)"),
        ({"dtype": "int32", "shape": [4]}, r"'state': \('int32', \[8, 4\]\)"),
        ({"dtype": "float32", "shape": [-4]}, "is no whole number above 0"),
        ({"dtype": "object", "shape": [4]}, "'object' is no dtype of a cache"),
    ],
    ids=["absurd", "wider", "other dtype", "negative", "no dtype"],
)
def test_a_declared_shape_is_compared_with_the_file_before_anything_is_made_of_it(cache_copy, info, message):
    reseal(cache_copy, tensors=content_of(cache_copy)["tensors"] | {"state": info})
    with pytest.raises(ValueError, match=message):
        AnchorCache.open(cache_copy)


def test_swapped_shards_are_refused(cache_copy):
    first, second = cache_copy / "shard-00000.safetensors", cache_copy / "shard-00001.safetensors"
    assert first.stat().st_size == second.stat().st_size, "their sizes do not tell"
    aside = first.rename(cache_copy / "aside")
    second.rename(first)
    aside.rename(second)
    with pytest.raises(ValueError, match=r"shard-00000.safetensors is damaged: its checksum differs"):
        AnchorCache.open(cache_copy)


def test_a_shard_named_twice_is_refused(cache_copy):
    shards = content_of(cache_copy)["shards"]
    reseal(cache_copy, shards=[shards[0], shards[0], shards[2]])
    with pytest.raises(ValueError, match="it names a shard twice"):
        AnchorCache.open(cache_copy)


def test_a_shard_that_is_no_safetensors_file_is_refused(cache_copy):
    """Even one with its own checksum: a header that promises more than the file holds."""
    file = cache_copy / "shard-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[:8] = (2**40).to_bytes(8, "little")
    file.write_bytes(content)
    reseal(cache_copy, shards=with_first_shard(cache_copy, sha256=hashlib.sha256(content).hexdigest()))
    with pytest.raises(ValueError, match="is no safetensors file"):
        AnchorCache.open(cache_copy)


# -- both kinds, both storage forms ----------------------------------------------------------------------------------


@pytest.fixture(
    params=[("token_ce", "self_contained"), ("hidden", "reference"), ("token_ce", "reference")], ids="-".join
)
def other_form(request, world, tmp_path):
    """A cache of another form than the world's, and a copy of the dataset that it came from."""
    kind, storage = request.param
    data = Path(shutil.copytree(world.old, tmp_path / "data"))
    build_cache(
        tmp_path / "cache",
        world.teacher,
        [AnchorSource("local/tiny", data)],
        kind=kind,
        storage=storage,
        num_samples=12,
        shard_size=6,
        policy_overrides=["--device=cpu"],
        progress=False,
    )
    return tmp_path / "cache"


def test_every_form_refuses_what_is_missing_cut_or_flipped(other_form):
    file = other_form / "shard-00001.safetensors"
    content = file.read_bytes()
    assert len(AnchorCache.open(other_form)) == 12
    for damaged, message in (
        (content[:-1], "is truncated or changed"),
        (content + b"\0", "is truncated or changed"),
        (content[:-9] + bytes([content[-9] ^ 16]) + content[-8:], "is damaged: its checksum differs"),
        ((other_form / "shard-00000.safetensors").read_bytes(), "is damaged|is truncated or changed"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            AnchorCache.open(other_form)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001.safetensors is missing"):
        AnchorCache.open(other_form)


def test_only_a_cache_by_reference_needs_its_dataset(other_form):
    storage = AnchorManifest.read(other_form).storage
    shutil.rmtree(other_form.parent / "data")
    if storage == "self_contained":
        assert len(AnchorCache.open(other_form).gather([0]).tasks) == 1
        return
    with pytest.raises(
        FileNotFoundError, match=r"refers to frames of dataset local/tiny .* which cannot be opened"
    ) as e:
        AnchorCache.open(other_form)
    assert "put the dataset back as it was, or build a cache that needs none with --storage=self_contained" in str(
        e.value
    )
    assert not (other_form.parent / "data").exists(), "LeRobot must not have begun one of that name"


def test_a_dataset_that_is_nowhere_is_refused(other_form):
    """One that is found by its name alone, and that neither this machine nor the hub (offline here) has."""
    if AnchorManifest.read(other_form).storage == "self_contained":
        return
    [source] = content_of(other_form)["sources"]
    reseal(other_form, sources=[source | {"root": None, "repo_id": "local/nowhere"}])
    with pytest.raises(
        FileNotFoundError, match=r"dataset local/nowhere \(LeRobot's own folder or the hub\), which cannot"
    ):
        AnchorCache.open(other_form)


# -- datasets that changed -------------------------------------------------------------------------------------------


@pytest.fixture
def referred(world, tmp_path):
    """A cache by reference and the dataset it refers to, which a test may change."""
    data = Path(shutil.copytree(world.old, tmp_path / "data"))
    build_cache(
        tmp_path / "cache",
        world.teacher,
        [AnchorSource("local/tiny", data)],
        storage="reference",
        num_samples=24,
        policy_overrides=["--device=cpu"],
        progress=False,
    )
    AnchorCache.open(tmp_path / "cache")
    return tmp_path / "cache", data


def replace_dataset(data: Path, make) -> None:
    shutil.rmtree(data)
    make(data)


CHANGED = r"dataset local/tiny was changed since .* was made by reference to it: where frame \d+ of episode \d+ was"


def test_a_dataset_whose_episodes_were_reindexed_is_refused(world, referred):
    cache, data = referred
    source = AnchorSource("local/tiny", world.old).open()
    replace_dataset(data, lambda root: delete_episodes(source, [0], output_dir=root, repo_id="local/tiny"))
    with pytest.raises(ValueError, match=CHANGED + r" \(index \d+\), now (frame|there is none|another)") as refused:
        AnchorCache.open(cache)
    assert "put the dataset back as it was, or delete it and build it again: craft-anchors build" in str(refused.value)


def test_a_dataset_with_other_values_at_the_same_places_is_refused(referred):
    cache, data = referred
    replace_dataset(data, lambda root: make_tiny_dataset(root, seed=1))
    with pytest.raises(
        ValueError, match=CHANGED + r".* now another one in its place \(other state, action or prompt\)"
    ):
        AnchorCache.open(cache)


def test_a_dataset_with_other_prompts_is_refused(referred):
    cache, data = referred
    replace_dataset(data, lambda root: make_tiny_dataset(root, tasks=(TASKS[0], "press the red button")))
    with pytest.raises(ValueError, match=CHANGED):
        AnchorCache.open(cache)


def test_a_dataset_without_the_camera_is_refused(referred):
    cache, data = referred
    replace_dataset(data, lambda root: make_tiny_dataset(root, cameras=("observation.top",)))
    with pytest.raises(ValueError, match=r"does not fit any more .*observation.image"):
        AnchorCache.open(cache)


def test_a_shorter_dataset_is_refused(world, tmp_path):
    data = Path(shutil.copytree(world.old, tmp_path / "data"))
    source = AnchorSource("local/tiny", data, episodes=(2, 3))
    settings = {"num_samples": 4, "policy_overrides": ["--device=cpu"], "progress": False}
    build_cache(tmp_path / "cache", world.teacher, [source], storage="reference", **settings)
    replace_dataset(data, lambda root: make_tiny_dataset(root, episodes=2))
    with pytest.raises(
        ValueError, match=r"does not fit any more \(dataset local/tiny has episodes 0..1, got \[2, 3\]\)"
    ):
        AnchorCache.open(tmp_path / "cache")


def test_a_dataset_that_only_grew_is_accepted(referred):
    cache, data = referred
    before = AnchorCache.open(cache).gather(list(range(24)))
    replace_dataset(data, lambda root: make_tiny_dataset(root, episodes=6))
    after = AnchorCache.open(cache).gather(list(range(24)))
    assert torch.equal(before.state, after.state) and before.tasks == after.tasks


def test_an_identity_that_was_edited_is_refused(referred):
    """A shard with right checksums that names another frame than the one it was made from."""
    cache, _ = referred
    file = cache / "shard-00000.safetensors"
    tensors = load_file(file)
    tensors["source_frame"] = tensors["source_frame"].roll(1).contiguous()
    save_file(tensors, file)
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    reseal(cache, shards=with_first_shard(cache, sha256=sha, bytes=file.stat().st_size))
    with pytest.raises(ValueError, match=CHANGED):
        AnchorCache.open(cache)


# -- the builder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "token_ce"}, "holds another anchor cache .*kind: 'hidden' there, 'token_ce' asked for"),
        ({"storage": "reference"}, "storage: 'self_contained' there, 'reference' asked for"),
    ],
)
def test_a_cache_of_another_form_is_not_taken_for_the_one_asked_for(world, settings, message):
    with pytest.raises(FileExistsError, match=message):
        build_cache(
            world.cache,
            world.teacher,
            [world.source()],
            num_samples=20,
            policy_overrides=["--device=cpu"],
            progress=False,
            **settings,
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give the number of anchors with --num-samples=<n>, or their share with --fraction"),
        ({"num_samples": 4, "fraction": 0.5}, "give the number of anchors"),
        ({"fraction": 0.0}, "--fraction must lie above 0 and at most at 1, got 0.0"),
        ({"fraction": float("nan")}, "--fraction must lie above 0"),
        ({"num_samples": 4, "top_k": 3}, "--top-k=3 goes with --kind=token_ce"),
        ({"num_samples": 4, "kind": "token_ce", "top_k": 10_000}, "--top-k must lie between 0 and the vocabulary's"),
        ({"num_samples": 4, "kind": "token_ce", "top_k": -1}, "--top-k must lie between 0"),
        ({"num_samples": 4, "kind": "token_ce", "layers": (-1,)}, "keeps no features: drop --layers, or build with"),
        ({"num_samples": 4, "kind": "token_ce", "pooling": "none", "dtype": "float16"}, "drop --pooling, --dtype"),
        ({"num_samples": 4, "kind": "logits"}, "--kind must be one of hidden, token_ce, got 'logits'"),
        ({"num_samples": 4, "storage": "cloud"}, "--storage must be one of self_contained, reference, got 'cloud'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(world, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        build_cache(
            tmp_path / "out",
            world.teacher,
            [world.source()],
            policy_overrides=["--device=cpu"],
            progress=False,
            **settings,
        )
    assert not list(tmp_path.iterdir())
