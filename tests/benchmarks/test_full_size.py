"""The full-size benchmark: its whole path on the CPU with the tiny policy, and its own tokenizers in real pi0_fast."""

import json

import pytest
import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi0_fast import modeling_pi0_fast
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig

from benchmarks import full_size
from craft_opt.bridge.quickstart.configuration_pi0_fast_tiny import PI0FastTinyConfig
from craft_opt.bridge.quickstart.modeling_pi0_fast_tiny import TinyPaliGemma


def test_without_a_gpu_it_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        full_size.main([])
    assert stopped.value.code == 2
    assert "the full-size policy needs a CUDA device, and torch finds none here" in capsys.readouterr().err


def test_the_whole_path_with_the_tiny_policy(tmp_path, capsys):
    """Every mode trains the saved policy, and the parts of a step are where they belong."""
    output = tmp_path / "results.json"
    arguments = ["--tiny", "--output", str(output), "--retention-freq", "2", "--periods", "1", "--anchors", "8"]
    assert full_size.main(arguments) == 0
    found = json.loads(output.read_text())
    assert list(found["modes"]) == list(full_size.MODES)
    assert "| token_ce | " in capsys.readouterr().out
    assert "tmp" not in json.dumps(found["settings"])
    for mode, result in found["modes"].items():
        seconds = result["seconds"]
        assert len(result["loss"]) == result["steps"] == 4
        assert result["skipped_steps"] == 0
        parts = [seconds[part] for part in full_size.PARTS]
        assert sum(parts) < seconds["step"], "the task's forward and backward are the rest"
        assert parts[2] > 0
        # K = 2: the student is the teacher at step 0, and no longer at step 2.
        assert [loss < 1e-6 for loss in result["retention_loss"]] == ([] if mode == "none" else [True, False])
        assert all(part > 0 for part in parts[:2]) == (mode != "none")


def test_its_tokenizers_work_in_lerobots_own_pi0_fast(tmp_path):
    """Action tokens through LeRobot's processors, saved and loaded; real pi0_fast has no other test on a CPU."""
    dataset = full_size.write_dataset(tmp_path / "data", full_size.TINY, full_size.TASKS, seed=0)
    text, action = full_size.write_tokenizers(tmp_path, full_size.TASKS)
    config = PI0FastConfig(
        text_tokenizer_name=str(text), action_tokenizer_name=str(action), fast_skip_tokens=0, device="cpu"
    )
    preprocessor, _ = make_pre_post_processors(config, dataset_stats=dataset.meta.stats)
    batch = {
        "observation.images.camera0": torch.zeros(2, 3, 32, 32),
        "observation.state": torch.zeros(2, 4),
        "action": torch.zeros(2, full_size.FAST["horizon"], 4),
        "task": list(full_size.TASKS[:2]),
    }
    processed = preprocessor(batch)
    tokens, mask = processed["action.tokens"], processed["action.token_mask"]
    assert tokens.shape == mask.shape == (2, config.max_action_tokens)
    # bos, "Action", ":", " ", four frequencies of four joints, "|": as many in both.
    assert mask.sum(dim=1).tolist() == [mask[0].sum().item()] * 2
    assert mask[0].sum() >= full_size.FAST["frequencies"] * 4
    assert tokens.max() < 257152, "inside the vocabulary of the network"


def test_lerobots_own_pi0_fast_goes_the_whole_path(tmp_path, monkeypatch):
    """Its class, loader, tokenizers by name, processors and bf16, saved and loaded; only the network is small."""
    sizes = {"width": 32, "depth": 2, "mlp_dim": 32, "num_heads": 2, "head_dim": 16, "image_resolution": (32, 32)}
    vision = {"vision_width": 16, "vision_depth": 1, "vision_mlp_dim": 16, "vision_heads": 2}
    small = PI0FastTinyConfig(**sizes, **vision, dtype="bfloat16", device="cpu")
    monkeypatch.setattr(modeling_pi0_fast, "PI0FastPaliGemma", lambda *_, **__: TinyPaliGemma(small, vocab_size=1024))
    size = full_size.Size("small", side=32, cameras=2, device="cpu")
    options = full_size.parser().parse_args(["--retention-freq=2", "--periods=1", "--anchors=8", "--batch-size=2"])
    found = full_size.measure(size, tmp_path, options)
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    assert (config["type"], config["dtype"]) == ("pi0_fast", "bfloat16")
    for mode, result in found["modes"].items():
        assert result["skipped_steps"] == 0
        # bf16: another batch size than the cache's changes the last bit of a feature.
        assert [loss < 1e-2 for loss in result["retention_loss"][:1]] == [True] * (mode != "none")
