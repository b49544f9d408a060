"""``craft-anchors inspect`` and ``verify``: what they say, what they draw, and what they refuse."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from craft_opt.bridge.anchors import build_cache
from craft_opt.bridge.anchors_cli import main
from craft_opt.bridge.anchors_inspect import BINS, Distribution
from tests.bridge.test_anchors_bad_input import reseal
from tests.quickstart.support import TASKS

FORMS = [
    ("hidden", "self_contained"),
    ("hidden", "reference"),
    ("token_ce", "self_contained"),
    ("token_ce", "reference"),
]


@pytest.fixture(scope="module", params=FORMS, ids="-".join)
def cache(request, world, tmp_path_factory):
    """A cache of each form."""
    kind, storage = request.param
    folder = tmp_path_factory.mktemp("commands") / "cache"
    build_cache(
        folder,
        world.teacher,
        [world.source()],
        kind=kind,
        storage=storage,
        num_samples=12,
        shard_size=5,
        policy_overrides=["--device=cpu"],
        progress=False,
    )
    return folder


def test_inspect_tells_and_draws_what_the_cache_holds(cache, tmp_path, capsys):
    picture = tmp_path / "made" / "cache.png"
    assert main(["inspect", str(cache), f"--output={picture}", "--num-frames=3"]) == 0
    said = capsys.readouterr().out
    manifest = json.loads((cache / "manifest.json").read_text())
    for expected in (
        f"kind:          {manifest['kind']} (",
        f"storage:       {manifest['storage'].replace('_', '-')}",
        "anchors:       12 in 3 files",
        manifest["teacher_fingerprint"],
        "local/tiny",
        "     6  close the drawer",
        "     6  press the button",
        f"Picture: {picture}",
    ):
        assert expected in said
    titles = ["norms of the features at layer 1", "norms of the features at layer 2"]
    if manifest["kind"] == "token_ce":
        titles = [
            "the teacher's cross-entropy of its own tokens, nats a token: 12 values",
            "probability of the 8 stored",
        ]
    assert all(title in said for title in titles)
    drawn = np.asarray(Image.open(picture).convert("RGB"))
    assert drawn.shape[0] > 300 and drawn.shape[1] > 800
    # Frames of random pixels hold far more colours than the histograms' blue and black.
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 1000


def test_inspect_without_a_picture_draws_none(cache, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", str(cache)]) == 0
    assert "Picture" not in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_histogram_counts_every_value():
    values = np.concatenate([np.zeros(3), np.full(5, 10.0)])
    lines = Distribution("numbers", values).lines()
    assert lines[0] == "numbers: 8 values, 0 to 10, median 10"
    assert [int(line.split()[-1]) for line in lines[1:]] == [3, *[0] * (BINS - 2), 5]
    # Values that differ by rounding alone are one bar, not noise.
    alike = Distribution("norms", np.float32(5.65) * (1 + 1e-7 * np.arange(9)))
    assert sum(int(line.split()[-1]) > 0 for line in alike.lines()[1:]) <= 2


@pytest.mark.parametrize("flags", [["--output=x.jpg"], ["--output=x.png", "--num-frames=0"]])
def test_inspect_refuses_a_picture_it_cannot_make(world, flags, capsys):
    assert main(["inspect", str(world.cache), *flags]) == 2
    assert "error: --output must name a .png file and --num-frames be at least 1" in capsys.readouterr().err


def test_verify_says_that_a_cache_is_whole_and_who_made_it(cache, world, capsys):
    assert main(["verify", str(cache)]) == 0
    assert f"{cache} is whole: 12 anchors in 3 files, all checksums right" in capsys.readouterr().out
    assert main(["verify", str(cache), f"--policy.path={world.teacher}", "--policy.device=cpu"]) == 0
    said = capsys.readouterr().out
    assert f"{world.teacher} is its teacher: fingerprints, 2 layers and preprocessor are the same" in said
    assert "12 anchors computed again differ by " in said


def refused(capsys, *arguments):
    assert main(["verify", *map(str, arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("not verified: ") and "Traceback" not in error
    return error


def test_verify_refuses_a_damaged_cache(cache, tmp_path, capsys):
    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    assert main(["verify", str(copy)]) == 0
    file = copy / "shard-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert "shard-00001.safetensors is damaged: its checksum differs" in refused(capsys, copy)
    assert "does not exist" in refused(capsys, tmp_path / "nothing")


def test_verify_refuses_another_teacher(cache, world, tmp_path, capsys):
    other = Path(shutil.copytree(world.teacher, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if name.endswith("mlp.up_proj.weight"))
    tensors[name][0, 0] += 1e-3
    save_file(tensors, other / "model.safetensors")
    error = refused(capsys, cache, f"--policy.path={other}", "--policy.device=cpu")
    assert "was made by teacher" in error and f"--policy.path={world.teacher}" in error


def test_verify_refuses_another_preprocessor(cache, world, tmp_path, capsys):
    other = Path(shutil.copytree(world.teacher, tmp_path / "other"))
    file = other / "policy_preprocessor.json"
    file.write_text(file.read_text().replace('"max_length": 20', '"max_length": 21'))
    error = refused(capsys, cache, f"--policy.path={other}", "--policy.device=cpu")
    assert "was made with preprocessor" in error


def test_verify_refuses_a_policy_without_weights(cache, world, tmp_path, capsys):
    other = Path(shutil.copytree(world.teacher, tmp_path / "other"))
    (other / "model.safetensors").unlink()
    assert "holds no model.safetensors" in refused(capsys, cache, f"--policy.path={other}", "--policy.device=cpu")


def test_verify_computes_features_and_cross_entropies_again(cache, world, tmp_path, capsys):
    """Right checksums and the right teacher, and yet other numbers."""
    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    kind = json.loads((copy / "manifest.json").read_text())["kind"]
    arguments = (copy, f"--policy.path={world.teacher}", "--policy.device=cpu")
    for name in ("features/2",) if kind == "hidden" else ("teacher_ce", "top_logprobs"):
        shutil.rmtree(copy)
        shutil.copytree(cache, copy)
        file = copy / "shard-00000.safetensors"
        tensors = load_file(file)
        tensors[name] = tensors[name] + torch.tensor(0.2)
        save_file(tensors, file)
        reseal_shard(copy, file)
        error = refused(capsys, *arguments)
        assert "away from the teacher's" in error if name != "teacher_ce" else "that" in error and "misses by" in error


def reseal_shard(folder: Path, file: Path) -> None:
    from craft_opt.bridge.anchor_manifest import sha256_of_file

    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    changed = {"sha256": sha256_of_file(file), "bytes": file.stat().st_size}
    reseal(folder, shards=[shard | changed if shard["file"] == file.name else shard for shard in shards])


def test_verify_takes_the_new_skills_statistics(world, tmp_path, capsys):
    policy = [f"--policy.path={world.teacher}", "--policy.device=cpu"]
    stats = ["--stats.repo_id=local/tiny", f"--stats.root={world.new}"]
    old = ["--dataset.repo_id=local/tiny", f"--dataset.root={world.old}", "--num-samples=4"]
    folder = tmp_path / "cache"
    assert main(["build", *policy, *old, *stats, "--normalization_stats=dataset", f"--output={folder}"]) == 0
    capsys.readouterr()
    error = refused(capsys, folder, *policy)
    assert "was built with the dataset's normalisation statistics; name the new skill's dataset with --stats" in error
    assert main(["verify", str(folder), *policy, *stats]) == 0
    assert "drop --stats.repo_id and --stats.root" in refused(capsys, world.cache, *policy, *stats)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["verify", "x", "--policy.pth=y"], "unknown flag --policy.pth; did you mean --policy.path?"),
        (["inspect", "x", "--num-samples=3"], "unknown flag --num-samples"),
        (["show", "x"], "invalid choice: 'show'"),
        (["inspect"], "the following arguments are required: folder"),
    ],
)
def test_the_commands_refuse_bad_flags(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_commands_build_both_kinds_and_forms(world, tmp_path, capsys):
    command = ["build", f"--policy.path={world.teacher}", "--policy.device=cpu", "--dataset.repo_id=local/tiny"]
    command += [f"--dataset.root={world.old}", f"--output={tmp_path / 'out'}", "--kind=token_ce", "--top-k=3"]
    command += ["--storage=reference", "--fraction=0.125", "--balance=none", "--action-tokens=demonstrated"]
    assert main(command) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    found = {name: manifest[name] for name in ("kind", "top_k", "storage", "samples", "token_source")}
    assert found == {
        "kind": "token_ce", "top_k": 3, "storage": "reference", "samples": 6, "token_source": "demonstrated"
    }  # fmt: skip
    assert "(6 anchors of 2 tasks, demonstrated action tokens" in capsys.readouterr().out


def test_the_commands_ask_for_old_skills_on_other_frames(world, tmp_path, capsys):
    command = ["build", f"--policy.path={world.teacher}", "--policy.device=cpu", "--dataset.repo_id=local/tiny"]
    command += [f"--dataset.root={world.new}", f"--output={tmp_path / 'out'}", "--num-samples=4"]
    prompts = [f"--prompt={task}" for task in TASKS]
    assert main([*command, *prompts, "--action-tokens=demonstrated"]) == 2
    assert "are no answer to --prompt" in capsys.readouterr().err
    assert main([*command, *prompts]) == 0
    assert "(4 anchors of 2 tasks" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert all(f"with {task!r} for its prompt" in shown for task in TASKS), shown


def test_the_prompts_of_a_cache_are_asked_on_other_frames(world, cache, tmp_path, capsys):
    command = ["build", f"--policy.path={world.teacher}", "--policy.device=cpu", "--dataset.repo_id=local/tiny"]
    command += [f"--dataset.root={world.new}", "--num-samples=6", f"--output={tmp_path / 'out'}"]
    assert main([*command, f"--prompts-of={tmp_path / 'none'}"]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert main([*command, f"--prompts-of={cache}", f"--prompt={TASKS[1]}", "--prompt=open the drawer"]) == 0
    sources = json.loads((tmp_path / "out" / "manifest.json").read_text())["sources"]
    assert [source["prompt"] for source in sources[:2]] == [TASKS[1], "open the drawer"]
    assert sorted(source["prompt"] for source in sources) == sorted([*TASKS, "open the drawer"])
