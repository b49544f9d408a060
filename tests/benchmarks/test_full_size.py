"""The full-size benchmark: its whole path on the CPU with the tiny policy, and its own tokenizers in real pi0_fast."""

import json

import pytest
import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig

from benchmarks import full_size


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
