"""The tiny policy's two tokenizers, built from plain settings instead of files.

Everything that defines them (the words, the horizon, the scale) is a handful of numbers and strings in
the policy's ``config.json`` and in the saved preprocessor, so a saved policy folder carries its tokenizers
wherever it is moved: no hub, no cache folder, no remote code.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.fft import dct
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

PAD, EOS, BOS, UNKNOWN = "<pad>", "<eos>", "<bos>", "<unk>"

# "Action", ":" and "|" frame the action tokens and "Task", "State", "," and ";" the prompt: LeRobot's
# pi0_fast writes these strings itself. <pad> must be id 0, which LeRobot fills short action chunks with.
_FRAME = (PAD, EOS, BOS, UNKNOWN, "Action", ":", "|", "Task", "State", ",", ";")

# LeRobot digitises a state normalised to [-1, 1] into 256 bins; a state below the statistics' minimum is -1.
_STATE_BINS = tuple(str(number) for number in range(-1, 257))

_WORD = re.compile(r"-?\d+|\w+|[^\w\s]")


# A policy's files may name any number, and a list of so many is made.
MAX_ACTION_TOKENS = 2**20


def words_of(texts: Iterable[str]) -> list[str]:
    """Return the sorted words of some task descriptions, as the text tokenizer cuts them.

    LeRobot's preprocessor turns underscores into spaces before it tokenizes, and so does this.
    """
    found = {word for text in texts for word in _WORD.findall(text.replace("_", " "))}
    return sorted(found.difference(_FRAME, _STATE_BINS))


def action_token(index: int) -> str:
    """Return the text of FAST token ``index`` in the text tokenizer's vocabulary."""
    return f"<act{index}>"


def build_text_tokenizer(words: Sequence[str], n_action_tokens: int) -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer of prompts, states and action tokens.

    LeRobot's pi0_fast maps FAST token ``k`` to the id ``vocab_size - 1 - fast_skip_tokens - k``; with
    ``fast_skip_tokens = 0`` the action tokens therefore fill the top of the vocabulary, counted downwards.

    Args:
        words: Words of the task descriptions; one outside this list reads as ``<unk>``.
        n_action_tokens: Size of the FAST vocabulary.

    Returns:
        A tokenizer whose ``vocab_size`` counts every token, special ones included.

    Raises:
        ValueError: If a word would be cut in two or appears twice.
    """
    _check_size(n_action_tokens)
    for word in words:
        if _WORD.findall(word) != [word]:
            raise ValueError(f"text word {word!r} is not one word; make the list with words_of(tasks)")
    tokens = [*_FRAME, *_STATE_BINS, *words, *(action_token(k) for k in reversed(range(n_action_tokens)))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError(f"text words {list(words)!r} repeat a word, a number or a framing token")

    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Split(Regex(_WORD.pattern), behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def _check_size(count: int) -> None:
    if not 0 <= count <= MAX_ACTION_TOKENS:
        raise ValueError(f"{count} action tokens are no vocabulary; there may be up to {MAX_ACTION_TOKENS}")


class _Alphabet:
    """The last stage of FAST without merges: one token per quantised coefficient.

    Byte-pair merges on top would make shorter chunks, but of varying length: one wrong token then shifts
    every coefficient after it. A tiny policy errs too often to afford that.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def decode(self, ids: torch.Tensor | Sequence[int]) -> str:
        """Return one character per token; a token that is no action token reads as coefficient zero."""
        middle = self.size // 2
        return "".join(chr(k if 0 <= k < self.size else middle) for k in map(int, ids))


class FastActionTokenizer:
    """FAST action tokens: DCT over time, scale, round; the low frequencies only.

        c = DCT-II(actions, axis=time, orthonormal);  token = clip(round(scale · c), -R, R) + R

    For actions normalised to [-1, 1] no coefficient exceeds sqrt(horizon), so R = ceil(scale · sqrt(horizon))
    represents every one; actions beyond [-1, 1] are clipped to the nearest representable coefficient.
    Tokens run frequency by frequency, so leaving out the high frequencies leaves out the end of the
    sequence, which LeRobot's decoder fills with zeros.

    LeRobot's pi0_fast reads ``bpe_tokenizer``, ``min_token`` and ``scale`` and decodes with them itself.

    Args:
        horizon: Steps in an action chunk.
        frequencies: DCT coefficients kept for each action dimension, at most ``horizon``.
        scale: Quantisation steps per unit of a coefficient.

    Raises:
        ValueError: If a setting is out of its range.

    Source: FAST, arXiv 2501.09747; ours has no byte-pair merges and drops the high frequencies.
    """

    def __init__(self, horizon: int, frequencies: int, scale: float) -> None:
        if horizon < 1:
            raise ValueError(f"horizon is {horizon}; it must be at least 1")
        if not 1 <= frequencies <= horizon:
            raise ValueError(f"fast_frequencies is {frequencies}; it must lie in 1..{horizon} (chunk_size)")
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"fast_scale is {scale}; it must be positive and finite")
        self.frequencies = frequencies
        self.scale = scale
        self.min_token = -math.ceil(scale * math.sqrt(horizon))
        self.vocab_size = 1 - 2 * self.min_token
        _check_size(self.vocab_size)
        self.bpe_tokenizer = _Alphabet(self.vocab_size)

    def __call__(self, actions: Any) -> list[list[int]]:
        """Tokenize chunks.

        Args:
            actions: Normalised actions [B, horizon, D], tensor or array.

        Returns:
            B lists of ``frequencies · D`` tokens.
        """
        coefficients = dct(np.asarray(actions, dtype=np.float64), axis=1, norm="ortho")
        tokens = np.rint(coefficients[:, : self.frequencies] * self.scale).astype(np.int64) - self.min_token
        return np.clip(tokens, 0, self.vocab_size - 1).reshape(len(tokens), -1).tolist()
