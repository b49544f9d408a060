"""The one table of tolerances; each with its derivation. Never loosened to make a test pass."""

import torch

# Half a unit in the last place, relative: 2**-(mantissa bits + 1).
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}

# SPEC's bounds for the surgery: coefficients relative; the norm relative to |a| |g_t| + |b| |g_r|.
COEFFICIENT = 1e-5
NORM = 1e-5

# fp64 against fp64 of another order of summation: n terms round n times, here n <= 1e6, so 1e6 * 2**-53 = 1.1e-10.
SUM_ORDER = 2e-10

# fp32 AdamW against torch's: per step about eight roundings of the update, relative to the parameter far less; SPEC
# allows 1e-6 of the per-tensor norm after 100 steps.
ADAMW_NORM = 1e-6
