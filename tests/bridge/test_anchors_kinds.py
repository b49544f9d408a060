"""Token caches and caches by reference: what they hold is the teacher's and the datasets' own."""

import json
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
from lerobot.utils.constants import ACTION, ACTION_TOKEN_MASK, ACTION_TOKENS, OBS_STATE
from safetensors.torch import load_file
from torch.nn import functional

from craft_opt.bridge.anchor_cache import AnchorCache
from craft_opt.bridge.anchor_frames import AnchorSource, FrameReader
from craft_opt.bridge.anchor_manifest import FORMAT, AnchorManifest
from craft_opt.bridge.anchor_shards import Teacher, process_anchors, token_rows
from craft_opt.bridge.anchors import build_cache, prepare_build
from craft_opt.bridge.features import action_logits, generated_tokens
from tests.quickstart.support import IMAGE_KEY, TASKS, make_tiny_dataset


def build(world, output, **settings):
    defaults = {"num_samples": 10, "shard_size": 4, "batch_size": 4, "progress": False}
    return build_cache(
        output, world.teacher, [world.source()], **(defaults | {"policy_overrides": ["--device=cpu"]} | settings)
    )


@pytest.fixture(scope="module")
def prepared(world, tmp_path_factory):
    """A build that was not run: its teacher and its frames."""
    return prepare_build(
        tmp_path_factory.mktemp("prepared") / "out",
        world.teacher,
        [world.source()],
        num_samples=8,
        kind="token_ce",
        policy_overrides=["--device=cpu"],
    )


@pytest.fixture(scope="module")
def token_cache(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens") / "cache"
    build(world, folder, kind="token_ce", num_samples=10)
    return AnchorCache.open(folder)


def the_teachers(prepared, anchors, tokens=None):
    """(batch, logits, mask) of the teacher on stored anchors, computed apart from the builder."""
    teacher = prepared.teacher
    batch = process_anchors(teacher.preprocessor, anchors.images, anchors.state, anchors.tasks)
    batch[ACTION_TOKENS], batch[ACTION_TOKEN_MASK] = anchors.action_tokens, anchors.action_token_mask
    with torch.no_grad():
        return batch, *action_logits(teacher.policy, batch)


# -- token caches ----------------------------------------------------------------------------------------------------


def test_a_token_cache_holds_the_teachers_own_tokens_and_what_it_says_of_them(prepared, token_cache):
    manifest = token_cache.manifest
    assert (manifest.kind, manifest.layers, manifest.pooling, manifest.top_k) == ("token_ce", [], "", 8)
    assert (manifest.token_source, manifest.teacher_variance, manifest.depth) == ("teacher", {}, 2)
    anchors = token_cache.gather(list(range(10)))
    assert anchors.features == {} and anchors.feature_mask is None
    batch, logits, mask = the_teachers(prepared, anchors)
    tokens, token_mask = generated_tokens(prepared.teacher.policy, batch)
    assert torch.equal(anchors.action_tokens, tokens)
    assert torch.equal(anchors.action_token_mask, token_mask)

    logprobs = logits.float().log_softmax(dim=-1)
    for row in range(10):
        ce = functional.cross_entropy(logits[row][mask[row]], tokens[row][mask[row]])
        # The same forward in another batch: a few roundings of fp32 logits of size 1.
        torch.testing.assert_close(anchors.teacher_ce[row], ce, rtol=1e-5, atol=1e-5)
    values = logprobs.sort(dim=-1, descending=True).values[..., :8]
    assert anchors.top_ids.dtype == torch.int64 and anchors.top_logprobs.dtype == torch.float32
    torch.testing.assert_close(anchors.top_logprobs[mask], values[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logprobs.gather(-1, anchors.top_ids)[mask], values[mask], rtol=1e-5, atol=1e-5)
    assert (anchors.top_ids[~mask] == 0).all() and (anchors.top_logprobs[~mask] == 0).all()


def test_a_token_cache_may_hold_the_demonstrated_tokens_alone(world, prepared, tmp_path):
    build(world, tmp_path / "out", kind="token_ce", top_k=0, token_source="demonstrated")
    cache = AnchorCache.open(tmp_path / "out")
    anchors = cache.gather(list(range(10)))
    assert anchors.top_ids is None and anchors.top_logprobs is None
    dataset = AnchorSource("local/tiny", world.old).open(lambda meta: {ACTION: [k / meta.fps for k in range(4)]})
    frames = torch.cat([load_file(cache.folder / s.file)["source_frame"] for s in cache.manifest.shards]).tolist()
    action = torch.stack([dataset[frame][ACTION] for frame in frames])
    batch = process_anchors(prepared.teacher.preprocessor, anchors.images, anchors.state, anchors.tasks, action)
    assert torch.equal(anchors.action_tokens, batch[ACTION_TOKENS])
    with torch.no_grad():
        loss, _ = prepared.teacher.policy(batch)
    counts = anchors.action_token_mask.sum(dim=1) - 1
    # The policy's own loss is the mean over tokens, the cache's over each sample's.
    torch.testing.assert_close((anchors.teacher_ce * counts).sum() / counts.sum(), loss, rtol=1e-5, atol=1e-5)


def test_token_rows_leave_out_what_is_not_predicted():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator)
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    logits[~mask] = torch.nan
    rows = token_rows(logits, mask, torch.randint(0, 7, (3, 5), generator=generator), 3)
    assert all(torch.isfinite(rows[name]).all() for name in rows)
    assert rows["teacher_ce"][2] == 0, "a sample without tokens"
    assert (rows["top_logprobs"].exp().sum(dim=-1)[mask] < 1).all(), "not normalised anew"


def test_a_teacher_that_says_nothing_finite_is_refused(world, prepared, tmp_path):
    policy = prepared.teacher.policy
    head = policy.model.paligemma_with_expert.paligemma.lm_head.weight
    kept = head.detach().clone()
    with torch.no_grad():
        head.fill_(torch.nan)
    try:
        with pytest.raises(
            ValueError, match=r"cross-entropy of action tokens in shard-00000.safetensors is not finite"
        ):
            replace(prepared, output=tmp_path / "out").run(progress=False)
    finally:
        with torch.no_grad():
            head.copy_(kept)
    assert not (tmp_path / "out").exists()


# -- by reference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hidden", "token_ce"])
def test_both_storage_forms_give_the_same_batches(world, tmp_path, kind):
    for storage in ("self_contained", "reference"):
        build(world, tmp_path / storage, kind=kind, storage=storage)
    copied, referred = (AnchorCache.open(tmp_path / name) for name in ("self_contained", "reference"))
    assert not [name for name in referred.manifest.tensors if name.startswith(("image/", "state"))]
    for indices in ([0, 1, 2, 3], [9, 4, 4], list(range(10))):  # the second time from memory
        first, second = copied.gather(indices), referred.gather(indices)
        for field in fields(first):
            one, other = getattr(first, field.name), getattr(second, field.name)
            if isinstance(one, dict):
                assert one.keys() == other.keys()
                assert all(one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one)
            elif isinstance(one, torch.Tensor):
                assert one.dtype == other.dtype and torch.equal(one, other), field.name
            else:
                assert one == other
    assert copied.task_texts() == referred.task_texts()


def test_a_reference_names_episodes_and_several_datasets(world, tmp_path):
    make_tiny_dataset(tmp_path / "third", tasks=("lift the lid",), episodes=2, frames=5, seed=9)
    third = AnchorSource("local/third", tmp_path / "third", episodes=(1,))
    source = replace(world.source(), episodes=(3, 1))
    settings = {"num_samples": 12, "policy_overrides": ["--device=cpu"], "progress": False}
    for storage in ("self_contained", "reference"):
        build_cache(tmp_path / storage, world.teacher, [source, third], storage=storage, **settings)
    copied, referred = (
        AnchorCache.open(tmp_path / name).gather(list(range(12))) for name in ("self_contained", "reference")
    )
    assert Counter(referred.tasks) == {TASKS[1]: 7, "lift the lid": 5} == Counter(copied.tasks)
    assert torch.equal(copied.images[IMAGE_KEY], referred.images[IMAGE_KEY])
    assert torch.equal(copied.state, referred.state)
    manifest = AnchorManifest.read(tmp_path / "reference")
    assert [s.root for s in manifest.sources] == [str(world.old), str(tmp_path / "third")]
    assert [s.root for s in AnchorManifest.read(tmp_path / "self_contained").sources] == [None, None]


def test_a_run_in_another_folder_finds_a_relative_dataset(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world.old.parent)
    build(replace(world, old=world.old.relative_to(world.old.parent)), tmp_path / "out", storage="reference")
    monkeypatch.chdir(tmp_path)
    assert len(AnchorCache.open(tmp_path / "out").gather([0, 1]).tasks) == 2


@pytest.mark.parametrize("settings", [{"kind": "token_ce"}, {"storage": "reference"}])
def test_an_interrupted_build_of_every_form_goes_on(world, tmp_path, settings):
    whole = build(world, tmp_path / "whole", **settings)
    prepared = prepare_build(
        tmp_path / "out",
        world.teacher,
        [world.source()],
        num_samples=10,
        shard_size=4,
        batch_size=4,
        policy_overrides=["--device=cpu"],
        **settings,
    )
    forward, calls = prepared.teacher.forward, []

    def stopped(batch):
        calls.append(len(batch))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(batch)

    # Frozen against accidents, not against tests.
    object.__setattr__(prepared.teacher, "forward", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepared.run(progress=False)
    partial = tmp_path / "out.partial"
    first = partial / "shard-00000.safetensors"
    written = first.stat().st_mtime_ns
    assert [file.name for file in sorted(partial.glob("shard-*.safetensors"))] == [first.name]
    assert prepared.run(progress=False) == whole
    assert (tmp_path / "out" / first.name).stat().st_mtime_ns == written
    assert len(calls) == 2 + 2, "the finished shard was not computed again"


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("episodes", [None, (1, 2)])
def test_frames_are_read_as_lerobot_reads_them(world, episodes):
    source = AnchorSource("local/tiny", world.old, episodes)
    dataset = source.open(lambda meta: {ACTION: [k / meta.fps for k in range(4)]})
    reader = FrameReader(dataset, [IMAGE_KEY], {})
    assert reader._plain, "images lie in the table"
    for row in range(len(dataset)):
        item, own = reader(row), dataset[row]
        assert item[IMAGE_KEY].dtype == torch.uint8
        assert torch.equal(item[IMAGE_KEY].float() / 255, own[IMAGE_KEY])
        for key in (OBS_STATE, ACTION):
            assert item[key].dtype == own[key].dtype and torch.equal(item[key], own[key]), key
        assert item["task"] == own["task"]
        assert reader.place(row) == tuple(int(own[key]) for key in ("index", "episode_index", "frame_index"))


def test_frames_that_are_not_in_the_table_are_read_through_lerobot(world):
    dataset = AnchorSource("local/tiny", world.old).open(lambda meta: {ACTION: [k / meta.fps for k in range(4)]})
    reader, through = FrameReader(dataset, [IMAGE_KEY], {}), FrameReader(dataset, [IMAGE_KEY], {})
    through._plain = False
    for row in (0, 11, 12, 47):
        one, other = reader(row), through(row)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) if k != "task" else one[k] == other[k] for k in one)


@pytest.mark.parametrize("kind", ["hidden", "token_ce"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # DataLoader's way of starting
def test_processes_that_read_make_the_same_cache(world, tmp_path, kind):
    one, other = (build(world, tmp_path / str(n), kind=kind, num_workers=n) for n in (0, 2))
    assert one == other


# -- selection -------------------------------------------------------------------------------------------------------


def test_a_fraction_of_the_frames(world, tmp_path):
    assert build(world, tmp_path / "out", num_samples=None, fraction=0.25).samples == 12  # of 48


def test_without_balance_every_frame_has_one_chance(world, tmp_path):
    make_tiny_dataset(tmp_path / "third", tasks=("lift the lid",), episodes=1, frames=4, seed=9)
    sources = [world.source(), AnchorSource("local/third", tmp_path / "third")]
    settings = {"num_samples": 26, "policy_overrides": ["--device=cpu"], "progress": False}
    counts = {}
    for balance in (True, False):
        folder = tmp_path / str(balance)
        build_cache(folder, world.teacher, sources, balance=balance, **settings)
        counts[balance] = Counter(AnchorCache.open(folder).task_texts())
    assert sorted(counts[True].values()) == [4, 11, 11]
    # 4 of 52 frames: all of them among 26 with probability 0.05.
    assert counts[False]["lift the lid"] < 4


def test_a_teacher_can_be_prepared_without_demonstrated_actions(prepared):
    """Its own tokens need none, and making them is most of what processing costs."""
    assert isinstance(prepared.teacher, Teacher)
    items = [prepared.readers[number](row) for number, row in prepared.frames[:2]]
    teacher = prepared.teacher
    batch = teacher.process(teacher.collect([{k: v for k, v in item.items() if k != ACTION} for item in items]))
    assert ACTION_TOKENS not in batch


def test_the_manifest_says_its_format(token_cache):
    content = json.loads((token_cache.folder / "manifest.json").read_text())
    assert (content["format"], content["version"]) == (FORMAT, 2)


# -- old skills asked for on other frames ----------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["self_contained", "reference"])
@pytest.mark.parametrize("kind", ["hidden", "token_ce"])
def test_prompts_take_the_place_of_the_frames_own(world, tmp_path, kind, storage):
    sources = [AnchorSource("local/tiny", world.new, prompt=prompt) for prompt in TASKS]
    settings = {"kind": kind, "storage": storage, "num_samples": 8, "policy_overrides": ["--device=cpu"]}
    prepared = prepare_build(tmp_path / "cache", world.teacher, sources, **settings)
    prepared.run(progress=False)
    cache = AnchorCache.open(tmp_path / "cache")
    assert cache.manifest.tasks == sorted(TASKS) and cache.manifest.token_source == "teacher"
    assert Counter(cache.task_texts()) == dict.fromkeys(TASKS, 4)
    # The frames are the new skill's, and the tokens what the teacher answers to the prompts on them.
    anchors = cache.gather(list(range(8)))
    assert sorted(anchors.tasks) == sorted(4 * TASKS)
    plain = FrameReader(prepared.readers[0].dataset, (IMAGE_KEY,), {})
    for index, (_, row) in enumerate(prepared.frames):
        assert torch.equal(anchors.images[IMAGE_KEY][index], plain(row)[IMAGE_KEY])
        assert plain.task(row) not in TASKS
    teacher = prepared.teacher
    batch = process_anchors(teacher.preprocessor, anchors.images, anchors.state, anchors.tasks)
    with torch.no_grad():
        tokens, mask = generated_tokens(teacher.policy, batch)
    assert torch.equal(anchors.action_tokens, tokens) and torch.equal(anchors.action_token_mask, mask)


def test_a_cache_without_prompts_is_written_as_before_there_were_any(token_cache, tmp_path):
    written = json.loads((token_cache.folder / "manifest.json").read_text())
    assert all("prompt" not in source for source in written["sources"])
    assert AnchorManifest.read(token_cache.folder).sources[0].prompt is None
    info = replace(token_cache.manifest.sources[0], prompt="close the drawer")
    asking = replace(token_cache.manifest, sources=[info])
    asking.write(tmp_path)
    assert AnchorManifest.read(tmp_path).sources[0].prompt == "close the drawer"
    assert asking.digest != token_cache.manifest.digest


def test_a_prompt_needs_the_teachers_answer(world, tmp_path):
    source = AnchorSource("local/tiny", world.new, prompt=TASKS[0])
    with pytest.raises(ValueError, match="are no answer to --prompt; leave --action-tokens out"):
        build_cache(tmp_path / "cache", world.teacher, [source], num_samples=4, token_source="demonstrated")
    with pytest.raises(ValueError, match="--prompt is empty"):
        build_cache(tmp_path / "cache", world.teacher, [replace(source, prompt=" ")], num_samples=4)
    assert not (tmp_path / "cache").exists()
