"""LeRobot's pi0_fast with a small network and local tokenizers.

Only the constructors and the loader are ours. Embedding, attention masks, loss, decoding, action queue: all
of it is the inherited code of ``lerobot.policies.pi0_fast``; what this policy shows is shown with that code.
"""

import math
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPaliGemma, PI0FastPolicy, PI0FastPytorch
from lerobot.policies.pi_gemma import PaliGemmaForConditionalGenerationWithPiGemma
from lerobot.policies.pretrained import PreTrainedPolicy
from safetensors import safe_open
from torch import nn
from transformers import GemmaConfig, PaliGemmaConfig, PreTrainedTokenizerFast, SiglipVisionConfig

from craft_opt.bridge.quickstart.configuration_pi0_fast_tiny import PI0FastTinyConfig
from craft_opt.bridge.quickstart.tokenizers import build_text_tokenizer

# A file that lacks some tensors is another error than one that the settings dwarf.
_SLACK = 2**20


class TinyPaliGemma(PI0FastPaliGemma):
    """``PI0FastPaliGemma`` whose constructor takes its sizes from the config."""

    def __init__(self, config: PI0FastTinyConfig, vocab_size: int) -> None:
        nn.Module.__init__(self)  # LeRobot's own constructor builds the 3 B parameter network
        text = GemmaConfig(
            vocab_size=vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            num_key_value_heads=1,
            head_dim=config.head_dim,
            hidden_activation="gelu_pytorch_tanh",
            pad_token_id=0,
        )
        vision = SiglipVisionConfig(
            hidden_size=config.vision_width,
            intermediate_size=config.vision_mlp_dim,
            num_hidden_layers=config.vision_depth,
            num_attention_heads=config.vision_heads,
            image_size=config.image_resolution[0],
            patch_size=config.patch_size,
            projection_dim=config.width,
            vision_use_head=False,
        )
        self.paligemma = PaliGemmaForConditionalGenerationWithPiGemma(
            config=PaliGemmaConfig(
                text_config=text,
                vision_config=vision,
                projection_dim=config.width,
                hidden_size=config.width,
                vocab_size=vocab_size,
                image_token_index=vocab_size,
                tie_word_embeddings=False,  # as in LeRobot's, where the two weights are separate tensors
            )
        )
        self.to_bfloat16_for_selected_params(config.dtype)


class TinyPI0FastPytorch(PI0FastPytorch):
    """``PI0FastPytorch`` around a ``TinyPaliGemma``."""

    def __init__(
        self, config: PI0FastTinyConfig, tokenizer: PreTrainedTokenizerFast, rtc_processor: Any = None
    ) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.rtc_processor = rtc_processor
        self._paligemma_tokenizer = tokenizer
        self.paligemma_with_expert = TinyPaliGemma(config, tokenizer.vocab_size)
        self.gradient_checkpointing_enabled = False
        if config.compile_model:  # as LeRobot's constructor does
            for name in ("sample_actions_fast", "forward"):
                setattr(self, name, torch.compile(getattr(self, name), mode=config.compile_mode))


class PI0FastTinyPolicy(PI0FastPolicy):
    """``PI0FastPolicy`` at small size: LeRobot's ``--policy.type=pi0_fast_tiny``.

    Args:
        config: Sizes and tokenizer settings.
        **kwargs: What LeRobot's ``make_policy`` hands every policy (statistics, metadata); not needed here.
    """

    config_class = PI0FastTinyConfig
    name = "pi0_fast_tiny"

    def __init__(self, config: PI0FastTinyConfig, **kwargs: Any) -> None:
        PreTrainedPolicy.__init__(self, config)
        config.validate_features()
        self.action_tokenizer = config.make_action_tokenizer()
        self._paligemma_tokenizer = build_text_tokenizer(config.text_words, self.action_tokenizer.vocab_size)
        self.init_rtc_processor()
        self.model = TinyPI0FastPytorch(config, self._paligemma_tokenizer, self.rtc_processor)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.to(config.device)
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Load a saved policy, or raise.

        pi0_fast's own loader prints a warning and returns random weights when the file is missing or does
        not fit; this takes the loader of LeRobot's base class, with ``strict`` on.

        Raises:
            FileNotFoundError: If there is no ``model.safetensors`` or ``config.json``.
            ValueError: If the settings ask for far more than the file holds.
            RuntimeError: If a weight is missing, unexpected or of another shape.
        """
        weights = Path(pretrained_name_or_path) / SAFETENSORS_SINGLE_FILE
        if isinstance(config, PI0FastTinyConfig) and weights.is_file():
            _check_room(config, weights)
        return super(PI0FastPolicy, cls).from_pretrained(
            pretrained_name_or_path, config=config, strict=strict, **kwargs
        )


def _check_room(config: PI0FastTinyConfig, weights: Path) -> None:
    """Compare the sizes that the settings ask for with the file, before room is made for them."""
    with safe_open(weights, framework="pt") as content:
        shapes = [content.get_slice(name).get_shape() for name in content.keys()]  # noqa: SIM118
    held, needed = sum(map(math.prod, shapes)), None
    if max(config.depth, config.vision_depth) <= len(shapes):
        vocabulary = build_text_tokenizer(config.text_words, config.make_action_tokenizer().vocab_size)
        with torch.device("meta"):
            needed = sum(p.numel() for p in TinyPI0FastPytorch(config, vocabulary).parameters())
    if needed is None or needed > 2 * held + _SLACK:
        asked = "more layers than it has" if needed is None else f"{needed}"
        raise ValueError(
            f"{weights} holds {held} weights, and the settings beside it ask for {asked}; "
            f"take a policy whose config.json belongs to its weights"
        )
