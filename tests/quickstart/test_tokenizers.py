"""The local tokenizers: framing that pi0_fast expects, and exact round trips."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import idct

from craft_opt.bridge.quickstart.tokenizers import (
    FastActionTokenizer,
    action_token,
    build_text_tokenizer,
    words_of,
)

WORDS = words_of(["close the drawer", "press_the button"])


def decode_as_lerobot(tokenizer: FastActionTokenizer, tokens: list[int], horizon: int, dim: int) -> np.ndarray:
    """LeRobot's relaxed decoding, restated: characters to coefficients, zeros appended, inverse DCT."""
    text = tokenizer.bpe_tokenizer.decode(torch.tensor(tokens))
    coefficients = np.zeros(horizon * dim)
    coefficients[: len(tokens)] = [ord(c) + tokenizer.min_token for c in text]
    return idct(coefficients.reshape(horizon, dim) / tokenizer.scale, axis=0, norm="ortho")


def test_prompt_is_cut_into_words_and_signed_numbers():
    tokenizer = build_text_tokenizer(WORDS, 5)
    ids = tokenizer("Task: close the drawer, State: -1 0 255;\n")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("Task", ":", "close", "the", "drawer", ",", "State", ":", "-1", "0", "255", ";")
    ]


def test_framing_that_pi0_fast_relies_on():
    tokenizer = build_text_tokenizer(WORDS, 5)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("Action: ", add_special_tokens=False)) == [
        "Action",
        ":",
    ]
    assert len(tokenizer.encode("|")) == 1, "the end marker must be one token, without <eos> behind it"
    assert tokenizer.pad_token_id == 0, "LeRobot pads action chunks with id 0"
    assert tokenizer.vocab_size == len(tokenizer), "added tokens would shift the action ids"
    for k in range(5):
        assert tokenizer.convert_tokens_to_ids(action_token(k)) == tokenizer.vocab_size - 1 - k


def test_unknown_word_reads_as_unk():
    tokenizer = build_text_tokenizer(WORDS, 5)
    assert tokenizer.convert_ids_to_tokens(tokenizer("open the drawer")["input_ids"])[0] == "<unk>"


@pytest.mark.parametrize("words", [["two words"], ["close", "close"], ["12"], ["Action"]])
def test_words_that_would_break_the_vocabulary_are_refused(words):
    with pytest.raises(ValueError, match="text word"):
        build_text_tokenizer(words, 3)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**32 - 1),
    horizon=st.integers(1, 16),
    dim=st.integers(1, 7),
    scale=st.floats(0.5, 40),
)
def test_full_frequency_round_trip_within_quantisation(seed, horizon, dim, scale):
    actions = np.random.default_rng(seed).uniform(-1, 1, (1, horizon, dim))
    tokenizer = FastActionTokenizer(horizon, horizon, scale)
    (tokens,) = tokenizer(torch.from_numpy(actions))
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    decoded = decode_as_lerobot(tokenizer, tokens, horizon, dim)
    # Each coefficient is off by at most 1/(2 scale); the inverse DCT is orthonormal in time.
    error = np.linalg.norm(decoded - actions[0], axis=0)
    assert (error <= math.sqrt(horizon) / (2 * scale) + 1e-9).all()


def test_extreme_actions_fit_the_alphabet_without_clipping():
    horizon, scale = 8, 10.0
    tokenizer = FastActionTokenizer(horizon, horizon, scale)
    rows = [np.ones(horizon), -np.ones(horizon), np.tile([1.0, -1.0], horizon // 2)]
    for row in rows:
        (tokens,) = tokenizer(row[None, :, None])
        decoded = decode_as_lerobot(tokenizer, tokens, horizon, 1)
        assert np.abs(decoded[:, 0] - row).max() <= math.sqrt(horizon) / (2 * scale)


def test_coefficients_outside_the_alphabet_are_clipped_and_keep_the_chunk_aligned():
    tokenizer = FastActionTokenizer(8, 4, 10.0)
    beyond = np.zeros((1, 8, 3))
    beyond[:, :, 0] = 1.7  # statistics of another dataset can put actions outside [-1, 1]
    beyond[:, :, 2] = -0.5
    (tokens,) = tokenizer(beyond)
    assert len(tokens) == 12
    decoded = decode_as_lerobot(tokenizer, tokens, 8, 3)
    assert decoded[:, 0] == pytest.approx(-tokenizer.min_token / 10.0 / math.sqrt(8))
    assert decoded[:, 2] == pytest.approx(-0.5, abs=0.02), "the neighbour must not move"


def test_a_token_that_is_no_action_reads_as_zero_and_keeps_the_chunk_aligned():
    tokenizer = FastActionTokenizer(4, 1, 4.0)
    decoded = decode_as_lerobot(tokenizer, [-40, tokenizer.vocab_size + 3, 16], 4, 3)
    assert decoded[:, :2] == pytest.approx(0.0)
    assert (decoded[:, 2] > 0.9).all()


def test_low_frequencies_keep_smooth_actions():
    time = np.linspace(0, 1, 8)
    actions = np.stack([np.sin(2 * time), 0.8 - time, np.ones(8)], axis=1)[None]
    tokenizer = FastActionTokenizer(8, 4, 10.0)
    (tokens,) = tokenizer(actions)
    assert len(tokens) == 12
    assert np.abs(decode_as_lerobot(tokenizer, tokens, 8, 3) - actions[0]).max() < 0.12


@pytest.mark.parametrize(
    ("settings_", "named"),
    [((0, 1, 1.0), "horizon"), ((4, 5, 1.0), "fast_frequencies"), ((4, 2, 0.0), "scale")],
)
def test_settings_out_of_range_are_refused(settings_, named):
    with pytest.raises(ValueError, match=named):
        FastActionTokenizer(*settings_)
