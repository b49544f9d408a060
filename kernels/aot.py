"""Compile the kernel for GPUs that are not there, and report what the compiler made of it.

    python -m craft_opt.kernels.aot --out benchmarks/results/aot_triton-3.6.0.json

Triton's wheel carries ptxas and the disassembler, so registers, spills, access widths and atomics are known on any
machine, and a test can hold them. Run it in a process without TRITON_INTERPRET: the interpreter replaces the compiler.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from craft_opt.kernels import surgery_adamw as kernel
from craft_opt.kernels.layout import DEFAULT_CONFIG, LaunchConfig, SegmentSpec, SurgeryBuffers, SurgeryPlan
from torch import Tensor

ARCHITECTURES = (80, 90, 100)
PHASES = {"fused": 0, "reduce": 1, "apply": 2}

_POINTER_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Variant:
    """One specialisation of the kernel.

    Attributes:
        dtypes: Parameter dtypes of the plan.
        phase: "fused", "reduce" or "apply".
        has_ret: Whether there is a retention gradient.
        amsgrad: Whether AMSGrad is compiled in.
        tails: Whether some segment's length is no multiple of 16.
        merge: Merge mode.
        schedule: Schedule of ε.
        controller: What moves λ.
        rounding: Rounding of bf16 parameters.
    """

    dtypes: tuple[torch.dtype, ...]
    phase: str = "fused"
    has_ret: bool = True
    amsgrad: bool = False
    tails: bool = False
    merge: str = "weighted"
    schedule: str = "linear"
    controller: str = "ascent"
    rounding: str = "nearest"

    @property
    def name(self) -> str:
        """Short name for tables and test ids."""
        dtypes = "+".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        flags = [
            self.phase,
            "" if self.has_ret else "task-only",
            "amsgrad" if self.amsgrad else "",
            "tails" if self.tails else "",
            "" if self.merge == "weighted" else self.merge,
            "" if self.schedule == "linear" else self.schedule,
            "" if self.controller == "ascent" else self.controller,
            "" if self.rounding == "nearest" else self.rounding,
        ]
        return " ".join([dtypes, *filter(None, flags)])


@dataclass(frozen=True)
class Loop:
    """An innermost loop of the machine code that streams gradients.

    Attributes:
        role: "reduce" (loads only) or "update" (loads and stores).
        instructions: Machine instructions of one trip, slow paths of divisions not counted.
        per_element: The same per element of the tile.
        loads: Loads of tile data by width in bits.
        stores: Stores of tile data by width in bits.
    """

    role: str
    instructions: int
    per_element: float
    loads: dict[int, int]
    stores: dict[int, int]


@dataclass(frozen=True)
class Report:
    """What the compiler made of one variant for one architecture.

    Attributes:
        variant: Name of the variant.
        arch: 80, 90 or 100.
        register_ceiling: The ceiling of `LaunchConfig.register_ceilings` that it was compiled under.
        registers: Per thread.
        stack_bytes: Stack frame per thread; spills live there.
        spill_instructions: Loads from and stores to local memory.
        shared_bytes: Shared memory of a program.
        programs_per_sm: Resident programs that registers allow (65536 of them per multiprocessor).
        loops: The streaming loops.
        atomics: Atomic machine instructions by mnemonic.
        float_atomics: How many of the PTX's atomics add floating-point numbers.
        barrier_arrivals: acq_rel read-modify-writes at gpu scope in the PTX.
        barrier_polls: acquire accesses at gpu scope in the PTX, the arrivals not counted.
    """

    variant: str
    arch: int
    register_ceiling: int
    registers: int
    stack_bytes: int
    spill_instructions: int
    shared_bytes: int
    programs_per_sm: int
    loops: list[Loop]
    atomics: dict[str, int]
    float_atomics: int
    barrier_arrivals: int
    barrier_polls: int

    @property
    def spills(self) -> bool:
        """Whether anything lies in local memory."""
        return self.stack_bytes > 0 or self.spill_instructions > 0


def standard_variants() -> list[Variant]:
    """Return the variants of the committed report and of the regression test."""
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    variants = [Variant((dtype,), phase=phase) for dtype in (f32, bf16, f16) for phase in PHASES]
    variants += [Variant((dtype,), has_ret=False) for dtype in (f32, bf16)]
    variants += [Variant((dtype,), tails=True) for dtype in (f32, bf16)]
    variants += [Variant((f32,), amsgrad=True), Variant((bf16,), amsgrad=True)]
    variants += [Variant((bf16, f32)), Variant((bf16, f32), tails=True), Variant((bf16, f32), has_ret=False)]
    variants += [Variant((f32, bf16, f16), amsgrad=True, tails=True)]
    variants += [Variant((bf16,), merge="equal", schedule="cosine")]
    variants += [Variant((bf16,), merge="task_priority", schedule="exponential")]
    variants += [Variant((dtype,), controller="nupi") for dtype in (f32, bf16)]
    variants += [Variant((bf16,), phase=phase, rounding="stochastic") for phase in PHASES]
    variants += [Variant((bf16,), has_ret=False, rounding="stochastic")]
    variants += [Variant((bf16,), amsgrad=True, rounding="stochastic")]
    variants += [Variant((bf16,), tails=True, controller="nupi", rounding="stochastic")]
    variants += [Variant((bf16, f32), tails=tails, rounding="stochastic") for tails in (False, True)]
    variants += [Variant((f32, bf16, f16), amsgrad=True, tails=True, controller="nupi", rounding="stochastic")]
    return variants


def _source(variant: Variant, config: LaunchConfig) -> tuple[Any, dict[str, Any]]:
    from triton.compiler import ASTSource

    numel = config.block * 2 + (1 if variant.tails else 0)
    plan = SurgeryPlan([SegmentSpec(dtype, numel, 0) for dtype in variant.dtypes], "cpu", config)
    buffers = SurgeryBuffers.allocate(plan, amsgrad=variant.amsgrad)
    constants = kernel.kernel_constants(
        plan, phase=PHASES[variant.phase], merge=variant.merge, project=True, schedule=variant.schedule,
        has_ret=variant.has_ret, amsgrad=variant.amsgrad, soft_cast=False, controller=variant.controller,
        rounding=variant.rounding,
    )  # fmt: skip
    arguments = kernel.kernel_arguments(plan, buffers, 1)
    function = kernel.surgery_adamw_kernel
    signature = dict.fromkeys(constants, "constexpr")
    attributes = {}
    for index, (name, argument) in enumerate(zip(function.arg_names, arguments, strict=False)):
        if isinstance(argument, Tensor):
            signature[name] = _POINTER_TYPES[argument.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    ordered = {name: signature[name] for name in function.arg_names}
    return ASTSource(function, signature=ordered, constexprs=constants, attrs=attributes), constants


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def _streaming_loops(sass: str, block: int, reduce_block: int) -> Iterator[Loop]:
    """Yield the innermost loops with 128-bit loads, from the disassembly's labels and backward branches."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction.group(1))
    spans = []
    for end, text in enumerate(instructions):
        target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", text)
        if target and labels.get(target.group(1), end) < end:
            spans.append((labels[target.group(1)], end))
    for start, end in spans:
        if any(start <= other[0] and other[1] <= end and other != (start, end) for other in spans):
            continue
        body = instructions[start : end + 1]
        stores = any(" STG" in f" {text}" for text in body)
        # The update marks its tile data evict-first; in the reduction everything loaded is tile data.
        pattern = r"LDG\.E\.EF(?:\.(\d+))?\b" if stores else r"LDG\.E(?:\.(\d+))?\b"
        loads = Counter(int(m.group(1) or 32) for text in body if (m := re.search(pattern, text)))
        if loads[128] == 0:
            continue
        written = Counter(int(m.group(1) or 32) for text in body if (m := re.search(r"STG\.E\.EF(?:\.(\d+))?\b", text)))
        tile = block if stores else reduce_block
        yield Loop(
            role="update" if stores else "reduce",
            instructions=len(body),
            per_element=0.0 if tile == 0 else round(len(body) / tile, 4),
            loads=dict(loads),
            stores=dict(written),
        )


def compile_variant(variant: Variant, arch: int, config: LaunchConfig = DEFAULT_CONFIG) -> Report:
    """Compile `variant` for `arch` as the launcher would, and read the result back.

    Args:
        variant: What to specialise on.
        arch: Compute capability times ten: 80, 90 or 100.
        config: Launch configuration.

    Raises:
        RuntimeError: Triton's interpreter is on, or triton is missing.
    """
    if kernel.triton is None or kernel.is_interpreted():
        raise RuntimeError("ahead-of-time compilation needs triton, and a process without TRITON_INTERPRET")
    import triton
    from triton.backends.compiler import GPUTarget

    threads = config.num_warps * 32
    for ceiling in config.register_ceilings:
        source, constants = _source(variant, config)
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", arch, 32),
            options=kernel.launch_options(config, constants["PHASE"], ceiling),
        )
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", cubin.name))
            sass = _tool("nvdisasm", cubin.name)
        assert usage is not None, "cuobjdump reports the registers of every kernel"
        registers, stack = int(usage.group(1)), int(usage.group(2))
        spill_instructions = len(re.findall(r"\b(?:LDL|STL)\b", sass))
        if stack == 0 and spill_instructions == 0:
            break
    ptx = compiled.asm["ptx"]
    return Report(
        variant=variant.name,
        arch=arch,
        register_ceiling=ceiling,
        registers=registers,
        stack_bytes=stack,
        spill_instructions=spill_instructions,
        shared_bytes=compiled.metadata.shared,
        programs_per_sm=65536 // (-(-registers // 8) * 8 * threads),
        loops=list(_streaming_loops(sass, config.block // threads, config.reduce_block // threads)),
        atomics=dict(Counter(re.findall(r"\b((?:ATOM|ATOMG|RED|REDG)\.[\w.]+)", sass))),
        float_atomics=len(re.findall(r"\b(?:atom|red)\.[\w.]*\.(?:f16|f16x2|bf16|bf16x2|f32|f64)\b", ptx)),
        barrier_arrivals=len(re.findall(r"\batom\.global\.gpu\.acq_rel\.add\b", ptx)),
        barrier_polls=len(re.findall(r"\b(?:atom|ld)\.global\.(?:gpu\.acquire|acquire\.gpu)\b", ptx)),
    )


def _table(reports: Sequence[Report]) -> str:
    head = (
        "variant",
        "arch",
        "regs",
        "spills",
        "shared",
        "per SM",
        "reduce/elt",
        "update/elt",
        "loads",
        "stores",
        "atomics",
    )
    rows = [head]
    for report in reports:
        loops = {role: [loop for loop in report.loops if loop.role == role] for role in ("reduce", "update")}

        def per_element(role: str, loops: dict[str, list[Loop]] = loops) -> str:
            return " ".join(f"{loop.per_element:.0f}" for loop in loops[role]) or "-"

        def widths(kind: str, loops: dict[str, list[Loop]] = loops) -> str:
            total: Counter[int] = Counter()
            for loop in (loop for each in loops.values() for loop in each):
                total.update(getattr(loop, kind))
            return " ".join(f"{count}x{bits}" for bits, count in sorted(total.items())) or "-"

        rows.append(
            (
                report.variant, f"sm_{report.arch}", str(report.registers), str(report.spill_instructions),
                str(report.shared_bytes), str(report.programs_per_sm), per_element("reduce"), per_element("update"),
                widths("loads"), widths("stores"), str(sum(report.atomics.values())),
            )
        )  # fmt: skip
    lengths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(length) for cell, length in zip(row, lengths, strict=True)) for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile the standard variants, print a table and write the report; return the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m craft_opt.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the report to this JSON file")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    arguments = parser.parse_args(argv)
    reports = [compile_variant(variant, arch) for arch in arguments.arch for variant in standard_variants()]
    print(_table(reports))
    if arguments.out is not None:
        document = {
            "what": "ahead-of-time compilation of craft_opt.kernels.surgery_adamw; no GPU took part",
            "command": f"python -m craft_opt.kernels.aot --out {arguments.out.name}",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "triton": kernel.triton.__version__,
                "ptxas": _tool("ptxas", "--version").strip().splitlines()[-1],
            },
            "config": asdict(DEFAULT_CONFIG),
            "reports": [asdict(report) for report in reports],
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return int(any(report.spills for report in reports))


if __name__ == "__main__":
    sys.exit(main())
