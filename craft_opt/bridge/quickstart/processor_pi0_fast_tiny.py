"""The tiny pi0_fast's pre- and postprocessor: LeRobot's steps, with the tokenizers defined in place.

LeRobot's two tokenizer steps remember a tokenizer by its name on the hub. The subclasses here remember what
defines it, so a saved preprocessor loads without a hub and without a path.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from lerobot.policies.pi0_fast.processor_pi0_fast import (
    Pi0FastPrepareStateAndLanguageTokenizerProcessorStep,
)
from lerobot.processor import (
    ActionTokenizerProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    ProcessorStepRegistry,
    TokenizerProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)

from craft_opt.bridge.quickstart.configuration_pi0_fast_tiny import PI0FastTinyConfig
from craft_opt.bridge.quickstart.tokenizers import FastActionTokenizer, build_text_tokenizer


@ProcessorStepRegistry.register(name="pi0_fast_tiny_tokenizer")
@dataclass
class TinyTokenizerProcessorStep(TokenizerProcessorStep):
    """LeRobot's prompt tokenizer step with the local word-level tokenizer.

    Attributes:
        text_words: Words of the task descriptions.
        n_action_tokens: Size of the FAST vocabulary at the top of the text vocabulary.
    """

    text_words: list[str] = field(default_factory=list)
    n_action_tokens: int = 0

    def __post_init__(self) -> None:
        self.tokenizer = build_text_tokenizer(self.text_words, self.n_action_tokens)
        super().__post_init__()

    def get_config(self) -> dict[str, Any]:
        """Return LeRobot's settings and what defines the tokenizer."""
        return {
            **super().get_config(),
            "text_words": self.text_words,
            "n_action_tokens": self.n_action_tokens,
        }


@ProcessorStepRegistry.register(name="pi0_fast_tiny_action_tokenizer")
@dataclass
class TinyActionTokenizerProcessorStep(ActionTokenizerProcessorStep):
    """LeRobot's FAST tokenizer step with the local FAST and text tokenizers.

    Attributes:
        text_words: Words of the task descriptions.
        horizon: Steps in an action chunk.
        frequencies: DCT coefficients kept for each action dimension.
        scale: Quantisation steps per unit of a coefficient.
    """

    fast_skip_tokens: int = 0
    text_words: list[str] = field(default_factory=list)
    horizon: int = 1
    frequencies: int = 1
    scale: float = 1.0

    def __post_init__(self) -> None:
        # LeRobot's own __post_init__ loads the gated PaliGemma tokenizer by name whatever it is given.
        self.action_tokenizer = FastActionTokenizer(self.horizon, self.frequencies, self.scale)
        self._paligemma_tokenizer = build_text_tokenizer(self.text_words, self.action_tokenizer.vocab_size)

    def get_config(self) -> dict[str, Any]:
        """Return what defines the tokenizers and the length of a padded chunk."""
        return {
            "max_action_tokens": self.max_action_tokens,
            "fast_skip_tokens": self.fast_skip_tokens,
            "text_words": self.text_words,
            "horizon": self.horizon,
            "frequencies": self.frequencies,
            "scale": self.scale,
        }


def make_pi0_fast_tiny_pre_post_processors(
    config: PI0FastTinyConfig, dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """Build the pipelines in pi0_fast's order: normalise, write the prompt, tokenize, move to the device.

    Args:
        config: The policy's settings.
        dataset_stats: Statistics for MIN_MAX normalisation of state and action.

    Returns:
        Preprocessor and postprocessor.
    """
    steps = make_default_policy_processor_steps(config, dataset_stats)
    fast = config.make_action_tokenizer()
    return make_policy_processor_pipelines(
        input_steps=[
            steps.rename_observations,
            steps.add_batch_dim,
            steps.normalize,
            Pi0FastPrepareStateAndLanguageTokenizerProcessorStep(max_state_dim=config.max_state_dim),
            TinyTokenizerProcessorStep(
                max_length=config.tokenizer_max_length,
                text_words=config.text_words,
                n_action_tokens=fast.vocab_size,
            ),
            TinyActionTokenizerProcessorStep(
                max_action_tokens=config.max_action_tokens,
                fast_skip_tokens=config.fast_skip_tokens,
                text_words=config.text_words,
                horizon=config.chunk_size,
                frequencies=config.fast_frequencies,
                scale=config.fast_scale,
            ),
            steps.to_device,
        ],
        output_steps=[steps.unnormalize, steps.to_cpu],
    )
