"""Settings of the tiny pi0_fast, registered with LeRobot as ``pi0_fast_tiny``."""

import importlib
from dataclasses import dataclass, field

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.utils.constants import ACTION

from craft_opt.bridge.quickstart.tokenizers import FastActionTokenizer

# Framing of an action chunk in LeRobot's pi0_fast: <bos>, "Action", ":" before it and "|" after it.
FRAMING_TOKENS = 4


@PreTrainedConfig.register_subclass("pi0_fast_tiny")
@dataclass
class PI0FastTinyConfig(PI0FastConfig):
    """LeRobot's ``PI0FastConfig`` at a size that trains in minutes on two CPU cores.

    The fields below either give the sizes that LeRobot fixes (2048 wide, 18 deep) or define the local
    tokenizers; ``paligemma_variant``, ``text_tokenizer_name`` and ``action_tokenizer_name`` have no effect.

    Attributes:
        width: Width of the language model.
        depth: Layers of the language model.
        mlp_dim: Width inside its feed-forward blocks.
        num_heads: Attention heads, sharing one key and value head.
        head_dim: Width of a head.
        vision_width: Width of the SigLIP tower.
        vision_depth: Layers of the SigLIP tower.
        vision_mlp_dim: Width inside its feed-forward blocks.
        vision_heads: Its attention heads.
        patch_size: Side of an image patch in pixels; (image_resolution / patch_size)² image tokens a camera.
        text_words: Words of the task descriptions (see ``tokenizers.words_of``).
        fast_frequencies: DCT coefficients kept for each action dimension.
        fast_scale: Quantisation steps per unit of a coefficient.
    """

    width: int = 96
    depth: int = 3
    mlp_dim: int = 256
    num_heads: int = 4
    head_dim: int = 24
    vision_width: int = 96
    vision_depth: int = 1
    vision_mlp_dim: int = 192
    vision_heads: int = 4
    patch_size: int = 16

    text_words: list[str] = field(default_factory=list)
    fast_frequencies: int = 4
    fast_scale: float = 10.0

    chunk_size: int = 8
    n_action_steps: int = 8
    max_state_dim: int = 4
    max_action_dim: int = 4
    max_action_tokens: int = 20
    max_decoding_steps: int = 20
    tokenizer_max_length: int = 20
    fast_skip_tokens: int = 0
    image_resolution: tuple[int, int] = (64, 64)
    push_to_hub: bool = False

    # An untrained or broken policy should act badly and be measured, not end the evaluation.
    validate_action_token_prefix: bool = False

    # Quantiles of LeRobot's statistics are means over episodes, far off on small data.
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MIN_MAX,
            "ACTION": NormalizationMode.MIN_MAX,
        }
    )

    optimizer_lr: float = 1e-3
    scheduler_decay_lr: float = 1e-4
    scheduler_warmup_steps: int = 50
    scheduler_decay_steps: int = 1500

    def __post_init__(self) -> None:
        """Validate, and make the processor steps known to LeRobot's registry.

        LeRobot loads a saved preprocessor by the registered names of its steps and never imports the
        module that registers them; a config always exists by then.
        """
        super().__post_init__()
        if self.n_action_steps != self.chunk_size:
            raise ValueError(
                f"n_action_steps is {self.n_action_steps} and chunk_size {self.chunk_size}; pi0_fast decodes "
                "with an inverse DCT over n_action_steps, so set both to the same number"
            )
        for side in self.image_resolution:
            if side % self.patch_size or self.image_resolution[0] != side:
                raise ValueError(
                    f"image_resolution is {self.image_resolution}; SigLIP needs a square whose side is a "
                    f"multiple of patch_size ({self.patch_size})"
                )
        self.make_action_tokenizer()
        importlib.import_module("craft_opt.bridge.quickstart.processor_pi0_fast_tiny")

    def validate_features(self) -> None:
        """Fill in absent features and check that an action chunk fits ``max_action_tokens``.

        Raises:
            ValueError: If LeRobot would cut the end off every action chunk.
        """
        super().validate_features()
        action_dim = self.output_features[ACTION].shape[0]
        needed = self.fast_frequencies * action_dim + FRAMING_TOKENS
        for name in ("max_action_tokens", "max_decoding_steps"):
            if getattr(self, name) < needed:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but {self.fast_frequencies} frequencies of "
                    f"{action_dim} action dimensions and their framing take {needed}"
                )

    def make_action_tokenizer(self) -> FastActionTokenizer:
        """Build the FAST tokenizer that these settings define."""
        return FastActionTokenizer(self.chunk_size, self.fast_frequencies, self.fast_scale)
