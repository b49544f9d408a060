"""``python -m benchmarks.pi0_fast_shapes`` makes ``benchmarks/data/pi0_fast.json``, the tensors of LeRobot's pi0_fast.

Built on the meta device with the default configuration (3.45 B parameters), so it needs neither weights nor memory.
"""

import json
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import torch

DATA = Path(__file__).parent / "data" / "pi0_fast.json"
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def main():
    from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
    from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPytorch

    with torch.device("meta"):
        model = PI0FastPytorch(PI0FastConfig(dtype="bfloat16"))
    listed = [(NAMES[p.dtype], list(p.shape)) for p in model.parameters() if p.requires_grad]
    # [dtype, shape, how many in a row]
    runs = [[*key, len(list(same))] for key, same in groupby(listed)]
    head = {
        "made_by": "python -m benchmarks.pi0_fast_shapes",
        "lerobot": version("lerobot"),
        "transformers": version("transformers"),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    body = ",\n  ".join(json.dumps(run) for run in runs)
    DATA.parent.mkdir(exist_ok=True)
    DATA.write_text(json.dumps(head, indent=1)[:-2] + f',\n "tensors": [\n  {body}\n ]\n}}\n')
    print(f"{DATA.name}: {len(listed)} tensors, {head['parameters']:,} parameters")


if __name__ == "__main__":
    main()
