"""The training configuration: LeRobot's, with CRaFT's settings, optimizer and choice of statistics added."""

# No `from __future__ import annotations`: draccus reads the annotations of these dataclasses at run time.
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from httpx import HTTPError
from huggingface_hub.errors import LocalEntryNotFoundError
from lerobot.configs import parser
from lerobot.configs.train import TRAIN_CONFIG_NAME, TrainPipelineConfig
from lerobot.optim import OptimizerConfig
from lerobot.utils.constants import CHECKPOINTS_DIR, PRETRAINED_MODEL_DIR

from craft_opt import CraftConfig, CraftOptimizer
from craft_opt.bridge.run_guard import how_to_go_on
from craft_opt.bridge.seals import check_seal
from craft_opt.bridge.untrusted import read_json
from craft_opt.bridge.untrusted_policy import TRUST_FLAG, check_policy_config

logger = logging.getLogger(__name__)

NORMALIZATION_CHOICES = ("teacher", "dataset")
DRY_RUN_STEPS = 3


@OptimizerConfig.register_subclass("craft_adamw")
@dataclass
class CraftAdamWConfig(OptimizerConfig):
    """``--optimizer.type=craft_adamw``: AdamW with the clip and the gradient surgery inside ``step()``.

    Attributes:
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the denominator of the update.
        weight_decay: Decoupled weight decay.
        grad_clip_norm: Largest global norm of the merged gradient; 0 or less switches the clip off.
        backend: ``auto``, ``triton`` or ``torch``.
    """

    lr: float = 2.5e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    grad_clip_norm: float = 1.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        # Plain attributes, not fields: they belong to the run (which sets them before build) and are saved with
        # it, so that a train_config.json cannot hold two versions of them.
        self._craft = CraftConfig()
        self._total_steps: int | None = None

    def bind(self, craft: CraftConfig, total_steps: int) -> None:
        """Hand over what LeRobot's ``build(params)`` has no room for."""
        self._craft, self._total_steps = craft, total_steps

    def build(self, params: Any) -> CraftOptimizer:
        """Build the optimizer for the parameters that the policy names."""
        if isinstance(params, dict):
            raise ValueError(
                "this policy hands its optimizer parameters by name; CRaFT's optimizer takes a list of parameters or "
                "of parameter groups (pi0_fast gives the former)"
            )
        return CraftOptimizer(
            params,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            max_grad_norm=self.grad_clip_norm if self.grad_clip_norm > 0 else None,
            config=self._craft,
            backend=self.backend,
            total_steps=self._total_steps,
        )


@dataclass
class CraftTrainConfig(TrainPipelineConfig):
    """LeRobot's training configuration and what CRaFT adds to it.

    Attributes:
        craft: Settings of the method.
        normalization_stats: ``teacher`` keeps the statistics that the starting policy was trained with; ``dataset``
            takes the new dataset's, as LeRobot does, and needs an anchor cache built with them.
        anchor_layers: Decoder layers that the cache must hold, -1 being the last; None takes the cache's.
        anchor_pooling: Pooling that the cache must have; None takes the cache's.
        gradient_accumulation_steps: Batches whose gradients are averaged for one step; ``batch_size`` is that of each,
            ``steps`` counts updates, and anchors are drawn once an update.
        dry_run: Three steps, no checkpoint.
        trust_remote_code: Whether tokenizers may run code that lies beside them. Only the command line or a program
            can say so: a file that says it came with the code, perhaps.
    """

    craft: CraftConfig = field(default_factory=CraftConfig)
    normalization_stats: str = "teacher"
    anchor_layers: list[int] | None = None
    anchor_pooling: str | None = None
    gradient_accumulation_steps: int = 1
    dry_run: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        # The arguments that this configuration was parsed from. LeRobot's validate() reads them again from sys.argv
        # (the only place where --policy.path is to be found), which would be wrong for a run started by a program.
        self._arguments: list[str] = []

    def validate(self) -> None:
        """Resolve the policy and the optimizer, and refuse what this trainer cannot do.

        Raises:
            ValueError: A setting is out of range or contradicts another.
            FileExistsError: The output folder exists and this is no resumed run.
        FileNotFoundError: The policy is not there.
        """
        if self.is_reward_model_training:
            raise ValueError("CRaFT trains policies, and --reward_model was given; use LeRobot's lerobot-train for it")
        if self.job.is_remote:
            raise ValueError(f"--job.target={self.job.target} is not supported: CRaFT trains on this machine only")
        if self.sample_weighting is not None:
            raise ValueError("--sample_weighting is not supported: pi0_fast gives no loss per sample to weight")
        if self.normalization_stats not in NORMALIZATION_CHOICES:
            raise ValueError(
                f"normalization_stats must be one of {', '.join(NORMALIZATION_CHOICES)}, "
                f"got {self.normalization_stats!r}"
            )
        if self.dry_run:
            self._become_dry_run()
        for name, lowest in (("steps", 1), ("batch_size", 1), ("num_workers", 0), ("gradient_accumulation_steps", 1)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {getattr(self, name)}")
        chosen: OptimizerConfig | None = getattr(self, "optimizer", None)
        with arguments(self._arguments):
            if path := parser.get_path_arg("policy"):
                check_policy_config(path)
            try:
                super().validate()
            except FileExistsError as error:
                raise FileExistsError(
                    f"--output_dir={self.output_dir} is there already, and this run does not resume; "
                    f"{how_to_go_on(Path(str(self.output_dir)))}, or choose another --output_dir"
                ) from error
            except (HTTPError, LocalEntryNotFoundError) as error:
                path = parser.get_path_arg("policy")
                raise FileNotFoundError(
                    f"--policy.path={path} is no local folder and could not be fetched from the hub ({error})"
                ) from error
            given = parser.get_cli_overrides("optimizer") or []
        resolved = self._craft_optimizer(chosen, [name.lstrip("-").split("=")[0] for name in given])
        resolved.bind(self.craft, self.steps)
        self.optimizer = resolved

    def set_epsilon(self, start: float, end: float) -> None:
        """Put what ``epsilon=auto`` found into the settings, from which the optimizer and every checkpoint take it."""
        self.craft = replace(self.craft, epsilon_start=start, epsilon_end=end)
        assert isinstance(self.optimizer, CraftAdamWConfig)
        self.optimizer.bind(self.craft, self.steps)

    def _become_dry_run(self) -> None:
        self.steps, self.log_freq = DRY_RUN_STEPS, 1
        self.save_checkpoint = self.save_checkpoint_to_hub = False
        self.env_eval_freq = self.eval_steps = 0

    def _craft_optimizer(self, chosen: OptimizerConfig | None, given: Sequence[str]) -> CraftAdamWConfig:
        """LeRobot's preset (or the chosen optimizer) as CRaFT's, with every --optimizer flag on top of the preset."""
        resolved = self.optimizer
        if isinstance(resolved, CraftAdamWConfig):
            return resolved
        if resolved is None or resolved.type != "adamw":
            found = "none" if resolved is None else resolved.type
            raise ValueError(
                f"CRaFT's optimizer is AdamW, and this run asks for {found!r}; "
                f"pass --optimizer.type=craft_adamw --use_policy_training_preset=false and a --scheduler.type"
            )
        names = ("lr", "betas", "eps", "weight_decay", "grad_clip_norm")
        result = CraftAdamWConfig(**{name: getattr(resolved, name) for name in names})
        if self.use_policy_training_preset and not self.resume and chosen is not None:
            if chosen.type not in ("craft_adamw", "adamw", OptimizerConfig.default_choice_name()):
                raise ValueError(f"CRaFT's optimizer is AdamW, got --optimizer.type={chosen.type}")
            # LeRobot would drop these flags for the policy's preset without a word.
            changes = {name: getattr(chosen, name) for name in given if name != "type" and hasattr(chosen, name)}
            result = replace(result, **changes)
        return result


@parser.wrap()
def _parsed(cfg: CraftTrainConfig) -> CraftTrainConfig:
    return cfg


@contextmanager
def arguments(args: Sequence[str]) -> Iterator[None]:
    """Let LeRobot's parser, which reads ``sys.argv``, see these arguments."""
    before = sys.argv
    sys.argv = [before[0] if before else "train.py", *args]
    try:
        yield
    finally:
        sys.argv = before


def parse_config(args: Sequence[str]) -> CraftTrainConfig:
    """Parse LeRobot-style arguments (``--name=value``) into a configuration, not validated yet.

    Raises:
        SystemExit: LeRobot's parser refused them and said why.
    """
    file = _config_file(args)
    _check_seals(file, parser.parse_arg("policy.path", args))
    if file is not None:
        read_json(file, "take another checkpoint, or a copy")
    with arguments(args):
        cfg: CraftTrainConfig = _parsed()
    cfg._arguments = list(args)
    if parser.parse_arg(TRUST_FLAG, args) is None:
        cfg.trust_remote_code = False
    if cfg.resume and file is not None and parser.parse_arg("output_dir", args) is None:
        cfg.output_dir = _run_folder(file, cfg.output_dir)
    return cfg


def _check_seals(config_file: Path | None, policy: str | None) -> None:
    """Of what LeRobot's parser reads: damaged, it would mean something else. The rest is checked where it is used.

    Raises:
        ValueError: A file is damaged.
    """
    if policy is not None:
        check_seal(Path(policy), "take another checkpoint, or restore it from a copy", suffix=".json")
    if config_file is not None:
        folder = config_file.resolve().parents[1]
        others = f"resume from another checkpoint of {folder.parent}, or restore it from a copy"
        check_seal(folder, others, suffix=".json")


def _config_file(args: Sequence[str]) -> Path | None:
    """The configuration of a checkpoint that is read, where it lies on this machine."""
    given = Path(parser.parse_arg("config_path", args) or "")
    file = given / TRAIN_CONFIG_NAME if given.is_dir() else given
    return file if file.suffix == ".json" and file.is_file() else None


def _run_folder(file: Path, stated: Path | None) -> Path:
    """Where a resumed run writes: into its own folder, whatever other one its configuration names.

    Raises:
        ValueError: The checkpoint lies in no folder of a run.
    """
    checkpoints = file.absolute().parents[2]
    if stated is not None and stated.resolve() == checkpoints.parent.resolve():
        return stated
    if checkpoints.name != CHECKPOINTS_DIR:
        raise ValueError(
            f"{file} is of a run that wrote into {stated}, and does not lie in it; say where to write with "
            f"--output_dir=<folder>"
        )
    logger.warning("the run was moved from %s, and goes on where it is: %s", stated, checkpoints.parent)
    return checkpoints.parent


def fine_tune_config(
    policy_path: str | Path,
    repo_id: str,
    root: str | Path | None,
    output_dir: str | Path,
    *,
    craft: CraftConfig,
    device: str | None = None,
    policy_overrides: Sequence[str] = (),
    **settings: Any,
) -> CraftTrainConfig:
    """Configuration of a fine-tuning run started by a program, the same as the command line would give.

    Args:
        policy_path: The starting policy, which is the teacher.
        repo_id: Name of the new skill's dataset.
        root: Its folder, or None for LeRobot's cache.
        output_dir: Where the run writes; must not exist.
        craft: Settings of the method.
        device: ``cpu``, ``cuda`` or None for LeRobot's choice.
        policy_overrides: Flags of the policy without the prefix, such as ``--optimizer_lr=1e-3``.
        **settings: Fields of :class:`CraftTrainConfig`, such as ``steps`` or ``batch_size``.

    Returns:
        The configuration; ``train()`` validates it.
    """
    args = [f"--policy.path={policy_path}", "--policy.push_to_hub=false", f"--dataset.repo_id={repo_id}"]
    if root is not None:
        args.append(f"--dataset.root={root}")
    if device is not None:
        args.append(f"--policy.device={device}")
    args += [f"--policy.{flag.removeprefix('--')}" for flag in policy_overrides]
    cfg = parse_config(args)
    cfg.craft, cfg.output_dir = craft, Path(output_dir)
    for name, value in settings.items():
        if not hasattr(cfg, name):
            raise ValueError(f"CraftTrainConfig has no field {name!r}")
        setattr(cfg, name, value)
    return cfg


def resume_config(checkpoint: str | Path) -> CraftTrainConfig:
    """Configuration that goes on from a checkpoint folder, as ``--resume=true --config_path=...`` would.

    Raises:
        FileNotFoundError: The folder holds no training configuration.
    """
    config_file = Path(checkpoint) / PRETRAINED_MODEL_DIR / TRAIN_CONFIG_NAME
    if not config_file.is_file():
        raise FileNotFoundError(f"{config_file} does not exist, so {checkpoint} is no checkpoint of a training run")
    return parse_config([f"--config_path={config_file}", "--resume=true"])
