"""The methods that are compared: what each changes of a run, before, during and after its steps.

Every method runs the same loop (``loop.run_steps``) with the same optimizer, batches, learning-rate schedule and number
of steps. It may change the configuration (:meth:`Method.configure`), the retention term and what trains
(:meth:`Method.attach`), and the policy at the end (:meth:`Method.deployed`).

In a sequence the convention is: the teacher of a stage is the policy after the stage before it, and what a method
stores of old skills is looked at anew by that teacher (features, tokens). Stored samples themselves never change.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.default import PeftConfig
from torch import Tensor, nn

from craft_opt import CraftConfig
from craft_opt.bridge.anchor_cache import AnchorCache
from craft_opt.bridge.anchor_manifest import (
    FEATURE_MASK,
    FEATURE_PREFIX,
    SELECTIONS,
    TEACHER_CE,
    TOP_IDS,
    TOP_LOGPROBS,
)
from craft_opt.bridge.config import CraftTrainConfig
from craft_opt.bridge.features import DEFAULT_LAYERS, DEFAULT_POOLING, pi0_fast_of
from craft_opt.bridge.loop import Run
from craft_opt.bridge.report.terms import (
    QuadraticPenalty,
    ReplayRetention,
    diagonal_fisher,
    interpolate,
    load_fisher,
    save_fisher,
)
from craft_opt.bridge.retention_term import Retention
from craft_opt.bridge.step import RetentionTerm
from craft_opt.config import check_choice, check_range, check_type
from craft_opt.retention import POOLINGS

# Anchors as large a batch as the task's ("1:1"), at every step.
COMMON: dict[str, Any] = {"retention_freq": 1}
FIXED: dict[str, Any] = {"lambda_lr": 0.0, "use_grad_projection": False, "lambda_max": 1e9}
# What the teacher adds to a stored sample.
TEACHER_TENSORS = (FEATURE_PREFIX, FEATURE_MASK, TEACHER_CE, TOP_IDS, TOP_LOGPROBS)
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class StageInputs:
    """What a method may use in a stage.

    Attributes:
        number: Of the stage, from 1.
        seed: Of the cell.
        cache: Anchors of the skills learned so far, as the starting policy sees them; None where the method asks for
            none.
        latest: The same of the skills that the stage before taught; None where the method asks for none.
        prompted: Frames of the stage's own demonstrations, with the starting policy's answers to the old skills'
            prompts; None where the method asks for none.
        memory: Folder of what the method hands to the next stage.
        before: That of the stage before; None in the first.
    """

    number: int
    seed: int
    cache: Path | None
    latest: Path | None
    prompted: Path | None
    memory: Path
    before: Path | None


@dataclass(frozen=True)
class Method:
    """Plain fine-tuning, and what every other method changes of it.

    Attributes:
        name: Of the method, in tables and folders.
        what: One line that says what it does, with its source.
        stores: What it looks at of old skills: ``nothing``, ``hidden`` or ``token_ce`` (an anchor cache of that kind).
        only_latest: Whether it needs the samples of the latest skills only, and keeps none of them.
        craft: Settings of the optimizer and of the anchors.
        pooling: Where a ``hidden`` cache takes its features.
        layers: Of which decoder layers: from 1, or from the last as -1.
        lr: Largest learning rate; None takes the benchmark's.
        selection: How its stored samples are chosen: ``random`` or ``coverage``.
        prompted: Frames of the new skill's demonstrations on which the old skills are asked for, as more anchors; they
            are made when a stage begins and not stored.
        prompted_weight: Their weight in L_ret, where that of the stored samples is 1.
        knobs: Settings that the tuning tries, the defaults (``{}``) first; as many for every method.
    """

    name: str
    what: str
    stores: str = "nothing"
    only_latest: bool = False
    craft: Settings = field(default_factory=dict)
    pooling: str = DEFAULT_POOLING
    layers: Sequence[int] = DEFAULT_LAYERS
    lr: float | None = None
    selection: str = "random"
    prompted: int = 0
    prompted_weight: float = 1.0
    knobs: tuple[Settings, ...] = ()

    def __post_init__(self) -> None:
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("selection", self.selection, SELECTIONS)
        if not (isinstance(self.layers, (list, tuple)) and self.layers and all(type(n) is int for n in self.layers)):
            raise ValueError(f"layers must be a list of decoder layers such as [-2, -1], got {self.layers!r}")
        check_type("prompted", self.prompted, int)
        check_range("prompted", self.prompted, 0)
        for name, value in (("lr", self.lr), ("prompted_weight", self.prompted_weight)):
            if value is not None:
                check_type(name, value, float)
                check_range(name, value, 0.0)

    @property
    def uses_anchors(self) -> bool:
        """Whether the budget of anchors means anything to it."""
        return self.stores != "nothing"

    @property
    def kind(self) -> str:
        """Kind of the caches that it asks for."""
        return self.stores if self.uses_anchors else "hidden"

    def with_settings(self, settings: Settings) -> Method:
        """The method with other settings: fields of its own, or of :class:`CraftConfig`.

        Raises:
            ValueError: There is no such setting, or not with such a value.
        """
        own = {f.name for f in fields(self)} - {"name", "what", "stores", "only_latest", "craft", "knobs"}
        craft = {f.name for f in fields(CraftConfig)}
        if unknown := sorted(set(settings) - own - craft):
            raise ValueError(
                f"{self.name} has no setting {', '.join(unknown)}; it has {', '.join(sorted(own | craft))}"
            )
        changed = {name: value for name, value in settings.items() if name in own}
        merged = {**self.craft, **{name: value for name, value in settings.items() if name not in own}}
        found = replace(self, craft=merged, **changed)
        found.craft_config((), 1)  # refuses a bad value here, where it was given
        return found

    def craft_config(self, caches: Sequence[Path], batch_size: int) -> CraftConfig:
        """The optimizer's settings, and the anchors' where there are caches: stored samples, then prompted frames."""
        mode = {"retention_mode": self.kind} if self.uses_anchors or self.prompted else {}
        return CraftConfig(
            **{
                **COMMON,
                **self.craft,
                **mode,
                "enabled": bool(caches),
                "anchor_cache_dir": ",".join(map(str, caches)),
                "anchor_cache_weights": f"1,{self.prompted_weight}" if len(caches) > 1 else "",
                "anchor_batch_size": batch_size,
            }
        )

    def configure(self, cfg: CraftTrainConfig) -> None:
        """Change the run's configuration before anything is built."""

    def attach(self, run: Run, inputs: StageInputs) -> Run:
        """The run with the method's own retention term and with frozen what it freezes."""
        return run

    @contextmanager
    def deployed(self, run: Run, start: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """The policy that the method would deploy now; what it changes for that is undone afterwards."""
        yield pi0_fast_of(run.parts.policy)

    def stored_bytes(self, run: Run, inputs: StageInputs) -> int:
        """Bytes that it keeps between stages beside the policy itself; convention in ``docs/report.md``."""
        return cache_bytes(inputs.cache, features=True) if inputs.cache is not None else 0


@dataclass(frozen=True)
class FrozenVision(Method):
    """The vision tower does not train."""

    def attach(self, run: Run, inputs: StageInputs) -> Run:
        """Freeze it: the optimizer leaves alone what no gradient reaches."""
        for name, p in run.parts.policy.named_parameters():
            if "vision_tower" in name:
                p.requires_grad_(False)
        return run


@dataclass(frozen=True)
class L2SP(Method):
    """A penalty on the squared distance to the starting policy."""

    def attach(self, run: Run, inputs: StageInputs) -> Run:
        """Take the policy before the stage as the point that is held to."""
        return with_term(run, QuadraticPenalty(run.parts.policy))

    def stored_bytes(self, run: Run, inputs: StageInputs) -> int:
        """The starting policy's trained parameters."""
        return parameter_bytes(run.parts.policy)


@dataclass(frozen=True)
class EWC(Method):
    """The same, weighted by the diagonal of the Fisher information of what was learned so far.

    The Fisher information of a stage's skills is taken once, on their samples, at the policy that has just learned
    them, and added to the sum of those before; the penalty is around the latest policy (Schwarz et al., arXiv
    1805.06370, section 3.2, with γ = 1).
    """

    def attach(self, run: Run, inputs: StageInputs) -> Run:
        """Compute the Fisher information of the latest skills and hold to the policy before the stage."""
        policy = run.parts.policy
        assert inputs.latest is not None
        samples = ReplayRetention(AnchorCache.open(inputs.latest), run.preprocessor, run.cfg.craft, inputs.seed)
        policy.eval()
        total = diagonal_fisher(policy, (samples.sample(policy, index) for index in range(len(samples.cache))))
        if inputs.before is not None:
            for name, earlier in load_fisher(inputs.before / FISHER_FILE).items():
                total[name] += earlier.to(total[name].device)
        save_fisher(inputs.memory / FISHER_FILE, {name: value.cpu() for name, value in total.items()})
        return with_term(run, QuadraticPenalty(policy, {name: value / 2 for name, value in total.items()}))

    def stored_bytes(self, run: Run, inputs: StageInputs) -> int:
        """The policy before the stage, and the Fisher information in fp32; no samples."""
        trained = sum(p.numel() for p in run.parts.policy.parameters() if p.requires_grad)
        return parameter_bytes(run.parts.policy) + 4 * trained


@dataclass(frozen=True)
class Rehearsal(Method):
    """The policy's own loss on stored samples, whose cache's features are not used."""

    def attach(self, run: Run, inputs: StageInputs) -> Run:
        """Take the checked caches of the run, and another loss of them."""
        assert run.term is not None
        caches = [term.cache for term in run.term.terms]
        return with_term(run, Retention(caches, run.preprocessor, run.cfg.craft, inputs.seed, ReplayRetention))

    def stored_bytes(self, run: Run, inputs: StageInputs) -> int:
        """The samples without their features."""
        assert inputs.cache is not None
        return cache_bytes(inputs.cache, features=False)


@dataclass(frozen=True)
class Retain(Method):
    """The weights after training, drawn back towards those before it.

    Attributes:
        alpha: Share of the trained weights: 0 is the policy before the stage, 1 that after it.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_type("alpha", self.alpha, float)
        check_range("alpha", self.alpha, 0.0, 1.0)

    @contextmanager
    def deployed(self, run: Run, start: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """The interpolated policy."""
        policy = pi0_fast_of(run.parts.policy)
        trained = {name: p.detach().clone() for name, p in policy.named_parameters()}
        interpolate(policy, start, self.alpha)
        try:
            yield policy
        finally:
            interpolate(policy, trained, 0.0)

    def stored_bytes(self, run: Run, inputs: StageInputs) -> int:
        """The policy before the stage."""
        return parameter_bytes(run.parts.policy)


@dataclass(frozen=True)
class Lora(Method):
    """Low-rank adapters of the language model train, and are merged into it after the stage.

    Attributes:
        rank: Of the adapters; their scale is α/r = 2.
    """

    rank: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_type("rank", self.rank, int)
        check_range("rank", self.rank, 1)

    def configure(self, cfg: CraftTrainConfig) -> None:
        """Let LeRobot wrap the policy."""
        cfg.peft = PeftConfig(target_modules=LORA_TARGETS, r=self.rank, lora_alpha=2 * self.rank)

    @contextmanager
    def deployed(self, run: Run, start: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """A copy with the adapters merged into the weights: taking them out again would not give the same bits."""
        wrapped: Any = copy.deepcopy(run.parts.policy)
        merged = wrapped.merge_and_unload()
        merged.config.use_peft = False
        yield merged


def with_term(run: Run, term: RetentionTerm) -> Run:
    """The run with another retention term."""
    return replace(run, parts=replace(run.parts, term=term))


def parameter_bytes(policy: nn.Module) -> int:
    """Bytes of the parameters that train."""
    return sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)


def cache_bytes(folder: Path, *, features: bool) -> int:
    """Bytes of a cache's tensors: the samples alone, or with what the teacher said of them."""
    manifest = AnchorCache.open(folder).manifest
    total = 0
    for name, info in manifest.tensors.items():
        if features or not name.startswith(TEACHER_TENSORS):
            total += manifest.samples * math.prod(info.shape) * getattr(torch, info.dtype).itemsize
    return total


FISHER_FILE = "fisher.safetensors"
_LRS: tuple[Settings, ...] = ({}, {"lr": 1e-4}, {"lr": 6e-4}, {"lr": 1e-3})
_LAMBDAS: tuple[Settings, ...] = ({}, {"initial_lambda": 0.3}, {"initial_lambda": 3.0}, {"initial_lambda": 10.0})
_CONTROL: tuple[Settings, ...] = (
    {},
    {"lambda_lr": 0.0, "initial_lambda": 1.0},
    {"lambda_lr": 0.0, "initial_lambda": 3.0},
    {"epsilon_start": 0.02, "epsilon_end": 0.01},
)


def _hidden(pooling: str) -> Method:
    name = "hidden" if pooling == DEFAULT_POOLING else f"hidden-{pooling}"
    what = f"CRaFT: features at {pooling.replace('_', ' ')}, λ by dual ascent, projection"
    return Method(name, what, stores="hidden", pooling=pooling, knobs=_CONTROL)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("naive", "fine-tuning on the new skill alone", knobs=_LRS),
        FrozenVision("frozen-vision", "fine-tuning with the vision tower frozen", knobs=_LRS),
        L2SP(
            "l2sp",
            "squared distance to the starting weights (arXiv 1802.01483)",
            craft={**FIXED, "initial_lambda": 0.01},
            knobs=({}, {"initial_lambda": 0.001}, {"initial_lambda": 0.1}, {"initial_lambda": 1.0}),
        ),
        EWC(
            "ewc",
            "the same, weighted by the Fisher information (arXiv 1612.00796, online: 1805.06370)",
            stores="hidden",
            only_latest=True,
            craft={**FIXED, "initial_lambda": 1e3},
            knobs=({}, {"initial_lambda": 1e2}, {"initial_lambda": 1e4}, {"initial_lambda": 1e5}),
        ),
        Rehearsal(
            "replay",
            "cross-entropy of stored samples, 1:1 with the new skill's (arXiv 1902.10486)",
            stores="hidden",
            craft={**FIXED, "initial_lambda": 1.0},
            knobs=_LAMBDAS,
        ),
        Rehearsal(
            "agem",
            "projection on the gradient of stored samples, nothing added (A-GEM, arXiv 1812.00420)",
            stores="hidden",
            craft={"initial_lambda": 0.0, "lambda_lr": 0.0, "conflict_threshold": 0.0},
            knobs=_LRS,
        ),
        Method(
            "token_ce",
            "divergence from the teacher's action tokens on stored samples (LwF's loss, arXiv 1606.09282)",
            stores="token_ce",
            knobs=_CONTROL,
        ),
        *(_hidden(pooling) for pooling in (DEFAULT_POOLING, *(p for p in POOLINGS if p != DEFAULT_POOLING))),
        Method(
            "hidden-no-projection",
            "CRaFT without the projection",
            stores="hidden",
            craft={"use_grad_projection": False},
            knobs=_CONTROL,
        ),
        Method(
            "projection-only",
            "CRaFT's projection with λ = 0: nothing is added",
            stores="hidden",
            craft={"initial_lambda": 0.0, "lambda_lr": 0.0},
            knobs=({}, {"conflict_threshold": 0.0}, {"conflict_threshold": -0.3}, {"lr": 1e-4}),
        ),
        Method(
            "hidden-fixed-lambda",
            "CRaFT with λ fixed, projection on",
            stores="hidden",
            craft={"initial_lambda": 1.0, "lambda_lr": 0.0},
            knobs=_LAMBDAS,
        ),
        Retain(
            "retain",
            "weights interpolated with the starting policy's after training (RETAIN, arXiv 2512.08333)",
            knobs=({}, {"alpha": 0.25}, {"alpha": 0.65}, {"alpha": 0.8}),
        ),
        Lora(
            "lora",
            "low-rank adapters of the language model (arXiv 2106.09685), merged after each stage",
            lr=1e-3,
            knobs=({}, {"lr": 3e-3}, {"rank": 4}, {"rank": 4, "lr": 3e-3}),
        ),
        Method(
            "hidden+replay",
            "CRaFT's features and the cross-entropy on the same anchors, λ fixed, projection on",
            stores="hidden",
            craft={"initial_lambda": 1.0, "lambda_lr": 0.0, "replay_weight": 1.0},
            knobs=({}, {"replay_weight": 0.3}, {"initial_lambda": 3.0}, {"initial_lambda": 3.0, "replay_weight": 0.3}),
        ),
        Method(
            "hidden+prompted",
            "CRaFT, and the old skills asked for on 200 frames of the new one, λ fixed, projection on",
            stores="hidden",
            craft={"initial_lambda": 1.0, "lambda_lr": 0.0},
            prompted=200,
            knobs=(
                {},
                {"prompted_weight": 0.3},
                {"initial_lambda": 3.0},
                {"initial_lambda": 3.0, "prompted_weight": 0.3},
            ),
        ),
    )
}
# Suites L and D run these.
SHORT_LIST = ("naive", "replay", "agem", "retain", "token_ce", "hidden", "hidden+prompted")


def method_named(name: str) -> Method:
    """A method by name.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]
