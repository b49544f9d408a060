"""The anchor cache: what it holds, its order, and that nothing damaged, foreign or half-built ever loads."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lerobot.datasets import LeRobotDataset
from safetensors.torch import load_file, save_file

from craft_opt.bridge.anchor_cache import AnchorCache, AnchorOrder
from craft_opt.bridge.anchor_manifest import FEATURE_MASK, AnchorManifest, partial_folder, sha256_of_file
from craft_opt.bridge.anchors import AnchorSource, build_cache
from craft_opt.bridge.anchors_cli import main as anchors_main
from tests.bridge.conftest import CACHE_SIZE, SHARD_SIZE
from tests.quickstart.support import TASKS, make_tiny_dataset


def build(world, output, **settings):
    defaults = {"num_samples": CACHE_SIZE, "shard_size": SHARD_SIZE, "batch_size": 4, "progress": False}
    defaults |= {"policy_overrides": ["--device=cpu"]}
    return build_cache(output, world.teacher, [world.source()], **(defaults | settings))


def test_samples_are_the_datasets_own(world):
    cache = AnchorCache.open(world.cache)
    dataset = LeRobotDataset("local/tiny", root=world.old)
    frames = torch.cat([load_file(world.cache / s.file)["source_frame"] for s in cache.manifest.shards])
    batch = cache.gather(list(range(len(cache))))
    for k, frame in enumerate(frames.tolist()):
        item = dataset[frame]
        assert torch.equal(batch.images["observation.image"][k].float() / 255, item["observation.image"])
        assert torch.equal(batch.state[k], item["observation.state"])
        assert batch.tasks[k] == item["task"]


def test_anchors_are_balanced_over_tasks_and_not_repeated(world, tmp_path):
    cache = AnchorCache.open(world.cache)
    assert Counter(cache.gather(list(range(CACHE_SIZE))).tasks) == dict.fromkeys(TASKS, CACHE_SIZE // 2)
    # A second dataset with a third skill and fewer frames than its share: the others make up for it.
    make_tiny_dataset(tmp_path / "third", tasks=(TASKS[0] + " press",), episodes=1, frames=5, seed=9)
    sources = [world.source(), AnchorSource("local/tiny", tmp_path / "third")]
    manifest = build_cache(
        tmp_path / "out", world.teacher, sources, num_samples=25, policy_overrides=["--device=cpu"], progress=False
    )
    batch = AnchorCache.open(tmp_path / "out").gather(list(range(25)))
    assert sorted(Counter(batch.tasks).values()) == [5, 10, 10]
    assert len(manifest.sources) == 2
    assert len({image.numpy().tobytes() for image in batch.images["observation.image"]}) == 25


def test_episodes_limit_the_selection(world, tmp_path):
    source = replace(world.source(), episodes=(1, 3))
    build_cache(
        tmp_path / "out", world.teacher, [source], num_samples=6, policy_overrides=["--device=cpu"], progress=False
    )
    assert set(AnchorCache.open(tmp_path / "out").gather(list(range(6))).tasks) == {TASKS[1]}


def test_variance_of_the_teacher_is_that_of_all_valid_features(world):
    manifest = AnchorManifest.read(world.cache)
    shards = [load_file(world.cache / shard.file) for shard in manifest.shards]
    mask = torch.cat([shard[FEATURE_MASK] for shard in shards])
    for layer in manifest.layers:
        values = torch.cat([shard[f"features/{layer}"] for shard in shards])[mask].double()
        expected = values.var(dim=0, unbiased=False).mean().item()
        assert manifest.teacher_variance[str(layer)] == pytest.approx(expected, rel=1e-12)


def test_the_same_call_again_returns_the_cache_and_another_one_is_refused(world):
    before = {path: path.stat().st_mtime_ns for path in world.cache.iterdir()}
    assert build(world, world.cache).digest == AnchorManifest.read(world.cache).digest
    assert {path: path.stat().st_mtime_ns for path in world.cache.iterdir()} == before
    with pytest.raises(FileExistsError, match=r"holds another anchor cache \(layers: \[1, 2\] there, \[2\] asked for"):
        build(world, world.cache, layers=(-1,))


@pytest.mark.parametrize("pooling", ["mean_image_tokens", "mean_masked", "last_token", "cls_token", "none"])
def test_every_pooling_can_be_cached(world, tmp_path, pooling):
    manifest = build(world, tmp_path / "out", pooling=pooling, num_samples=4, layers=(-1,), dtype="bfloat16")
    assert manifest.tensors["features/2"].dtype == "bfloat16"
    assert len(manifest.tensors["features/2"].shape) == (2 if pooling == "none" else 1)
    assert AnchorCache.open(tmp_path / "out").gather([3, 0]).features[2].shape[0] == 2


def test_teacher_tokens_can_replace_demonstrated_ones(world, tmp_path):
    build(world, tmp_path / "out", token_source="teacher", num_samples=4)
    batch = AnchorCache.open(tmp_path / "out").gather([0, 1, 2, 3])
    assert batch.action_token_mask.any(dim=1).all()


# -- order -----------------------------------------------------------------------------------------------------------


def test_order_visits_every_anchor_once_an_epoch():
    drawn = AnchorOrder(7, seed=3).draw(14)
    assert sorted(drawn[:7]) == sorted(drawn[7:]) == list(range(7))
    assert drawn[:7] != drawn[7:]


def test_order_depends_on_the_seed_and_resumes_at_any_position():
    whole = AnchorOrder(11, seed=1)
    drawn = [whole.draw(4) for _ in range(9)]
    assert drawn != [AnchorOrder(11, seed=2).draw(4) for _ in range(9)]
    for done in range(9):
        resumed = AnchorOrder(11, seed=1, position=4 * done)
        assert [resumed.draw(4) for _ in range(9 - done)] == drawn[done:]
        assert resumed.position == whole.position


def test_order_ignores_the_global_generators():
    torch.manual_seed(0)
    first = AnchorOrder(9, seed=5).draw(9)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert AnchorOrder(9, seed=5).draw(9) == first
    assert torch.equal(torch.get_rng_state(), state)


# -- damage ----------------------------------------------------------------------------------------------------------


def test_a_missing_cache_names_the_command_that_builds_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist; build it with: craft-anchors build --policy.path"):
        AnchorCache.open(tmp_path / "nothing")


def test_a_folder_without_manifest_is_no_cache(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no manifest.json; build it with"):
        AnchorCache.open(tmp_path)


def test_a_missing_shard_is_refused(cache_copy):
    (cache_copy / "shard-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001.safetensors is missing .* craft-anchors build"):
        AnchorCache.open(cache_copy)


def test_a_truncated_shard_is_refused(cache_copy):
    file = cache_copy / "shard-00000.safetensors"
    size = file.stat().st_size
    with file.open("rb+") as stream:
        stream.truncate(size - 1)
    with pytest.raises(ValueError, match=rf"truncated or changed: {size - 1} bytes instead of {size}; delete it"):
        AnchorCache.open(cache_copy)


@pytest.mark.parametrize("position", [9, 0.5, -1], ids=["header", "middle", "last byte"])
def test_a_flipped_bit_is_refused(cache_copy, position):
    file = cache_copy / "shard-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[int(position * len(content)) if position == 0.5 else position] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00002.safetensors is damaged: its checksum differs"):
        AnchorCache.open(cache_copy)


def edit_manifest(folder: Path, **changes):
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [2]}, "was changed after it was written"),
        ({"teacher_fingerprint": "0" * 16}, "was changed after it was written"),
        ({"extra": 1}, "was changed after it was written"),
        ({"version": 3}, "format version 3, and this program reads version 2"),
        ({"format": "other"}, "is no manifest of an anchor cache"),
    ],
)
def test_a_changed_manifest_is_refused(cache_copy, changes, message):
    edit_manifest(cache_copy, **changes)
    with pytest.raises(ValueError, match=message):
        AnchorCache.open(cache_copy)


def test_a_manifest_cut_in_half_is_refused(cache_copy):
    file = cache_copy / "manifest.json"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        AnchorCache.open(cache_copy)


def test_a_shard_with_another_content_than_the_manifest_says_is_refused(cache_copy):
    """Even one whose checksums were made to fit."""
    file = cache_copy / "shard-00000.safetensors"
    tensors = load_file(file)
    tensors["state"] = tensors["state"][:, :2].contiguous()
    save_file(tensors, file)
    manifest = AnchorManifest.read(cache_copy)
    shards = [
        replace(s, sha256=sha256_of_file(file), bytes=file.stat().st_size) if s.file == file.name else s
        for s in manifest.shards
    ]
    replace(manifest, shards=shards).write(cache_copy)
    with pytest.raises(ValueError, match=r"shard-00000.safetensors holds .* instead of"):
        AnchorCache.open(cache_copy)


# -- interrupted builds ----------------------------------------------------------------------------------------------

KILLED_BUILD = """
import sys, time
from craft_opt.bridge import anchor_shards
write = anchor_shards._write_shard
def slow(file, tensors):
    # Dies while the second shard is being written, half of it on disk.
    if file.name.endswith("1.safetensors"):
        anchor_shards.save_file(tensors, str(file) + ".tmp")
        print("half", flush=True)
        time.sleep(60)
    return write(file, tensors)
anchor_shards._write_shard = slow
from tests.bridge.test_anchors import build
from tests.bridge.conftest import World
from pathlib import Path
build(World(*map(Path, sys.argv[1:5])), Path(sys.argv[5]))
"""


def test_a_killed_build_leaves_nothing_that_loads_and_goes_on(world, tmp_path):
    output = tmp_path / "out"
    folders = [str(folder) for folder in (world.old, world.new, world.teacher, world.cache)]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_BUILD, *folders, str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert process.stdout is not None
    assert any(line.strip() == "half" for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with pytest.raises(FileNotFoundError, match="its build was interrupted; finish it with the same"):
        AnchorCache.open(output)
    with pytest.raises(FileNotFoundError):
        AnchorCache.open(partial_folder(output))

    first = partial_folder(output) / "shard-00000.safetensors"
    written = first.stat().st_mtime_ns
    manifest = build(world, output)
    assert (output / first.name).stat().st_mtime_ns == written, "the finished shard is kept"
    assert not partial_folder(output).exists()
    assert {path.name for path in output.iterdir()} == {"manifest.json", *(s.file for s in manifest.shards)}
    # The same cache, bit for bit, as the build that nobody killed.
    assert manifest == AnchorManifest.read(world.cache)


def test_a_build_begun_with_other_settings_starts_over(world, tmp_path):
    output = tmp_path / "out"
    partial = partial_folder(output)
    partial.mkdir()
    (partial / "plan").write_text("another plan")
    shutil.copy(world.cache / "shard-00002.safetensors", partial / "shard-00000.safetensors")
    manifest = build(world, output)
    assert manifest == AnchorManifest.read(world.cache)


# -- settings --------------------------------------------------------------------------------------------------------


def test_more_anchors_than_frames_are_refused(world, tmp_path):
    with pytest.raises(ValueError, match=r"--num-samples=49 anchors .* have 48 frames; lower --num-samples"):
        build(world, tmp_path / "out", num_samples=49)
    assert not list(tmp_path.iterdir())


def test_a_teacher_without_weights_is_refused(world, tmp_path):
    teacher = Path(shutil.copytree(world.teacher, tmp_path / "teacher"))
    (teacher / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model.safetensors, so no weight would be loaded"):
        build(replace(world, teacher=teacher), tmp_path / "out")


def test_a_dataset_that_is_not_there_is_refused(world, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no LeRobotDataset: meta/info.json is not there"):
        build(replace(world, old=tmp_path / "nothing"), tmp_path / "out")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-sample=3"], "unknown flag --num-sample; did you mean --num-samples?"),
        (["--polcy.path=x"], "unknown flag --polcy.path; did you mean --policy.path?"),
        (["--dtype=int8"], "--dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        (["--pooling=mean"], "pooling must be one of"),
        (["--layers=7"], "layers must lie in 1..2"),
        (["--layers=x"], "must be numbers with commas between, such as -2,-1; got 'x'"),
        (["--episodes=3-1"], "must be numbers and ranges, such as 0-9,12; got '3-1'"),
        (["--policy.path=/no/where"], "--policy.path=/no/where does not exist; give the folder"),
        (["--shard-size=0"], "--shard-size must be at least 1, got 0"),
        (["--action-tokens=mine"], "--action-tokens must be one of demonstrated, teacher, got 'mine'"),
        (["--normalization_stats=dataset"], "goes together with --stats.repo_id"),
        (["--episodes=9"], "has episodes 0..3, got [9]"),
        (["--dataset.root=/x", "--dataset.root=/y"], "1 --dataset.repo_id and 3 --dataset.root were given"),
    ],
)
def test_the_builder_refuses_bad_flags(world, tmp_path, capsys, flags, message):
    command = ["build", f"--policy.path={world.teacher}", "--dataset.repo_id=local/tiny", "--num-samples=4"]
    command += [f"--dataset.root={world.old}", f"--output={tmp_path / 'out'}", "--policy.device=cpu", *flags]
    try:
        code = anchors_main(command)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_the_builder_leaves_a_folder_alone_that_is_no_cache(world, capsys):
    command = ["build", f"--policy.path={world.teacher}", "--dataset.repo_id=local/tiny", "--num-samples=4"]
    assert anchors_main([*command, f"--dataset.root={world.old}", f"--output={world.old}"]) == 2
    error = f"error: --output={world.old} is there already and is no anchor cache; choose another --output"
    assert error in capsys.readouterr().err


def test_the_command_line_builds_a_cache(world, tmp_path, capsys):
    command = ["build", f"--policy.path={world.teacher}", "--policy.device=cpu", "--dataset.repo_id=local/tiny"]
    command += [f"--dataset.root={world.old}", f"--output={tmp_path / 'out'}", "--num-samples=6", "--episodes=0-1,3"]
    assert anchors_main([*command, "--layers=-1", "--seed=4"]) == 0
    manifest = AnchorManifest.read(tmp_path / "out")
    assert (manifest.samples, manifest.layers, manifest.seed) == (6, [2], 4)
    assert manifest.sources[0].episodes == [0, 1, 3]
    assert "Anchor cache:" in capsys.readouterr().out
