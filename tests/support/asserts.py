"""Named assertions."""

import torch

from tests.support.tolerances import COEFFICIENT, NORM


def assert_relative(found, expected, tolerance, what):
    found, expected = float(found), float(expected)
    assert abs(found - expected) <= tolerance * abs(expected), f"{what}: found {found!r}, expected {expected!r}"


def assert_coefficients(found_a, found_b, found_norm, oracle, norm_t, norm_r):
    """SPEC: coefficients to 1e-5 relative, the norm to 1e-5 of |a| |g_t| + |b| |g_r|."""
    assert_relative(found_a, oracle.a, COEFFICIENT, "a")
    assert_relative(found_b, oracle.b, COEFFICIENT, "b")
    bound = NORM * (abs(oracle.a) * norm_t + abs(oracle.b) * norm_r)
    assert abs(float(found_norm) - oracle.norm) <= bound, f"norm: {float(found_norm)!r} against {oracle.norm!r}"


def assert_norm_close(found, expected, tolerance, what):
    error = (found.double() - expected.double()).norm()
    scale = expected.double().norm()
    assert error <= tolerance * scale, f"{what}: relative error {float(error / scale):.3g} above {tolerance:g}"


def assert_same_bits(found, expected, what):
    assert found.dtype == expected.dtype and found.shape == expected.shape, what
    same = torch.equal(
        found.reshape(-1).contiguous().view(torch.uint8), expected.reshape(-1).contiguous().view(torch.uint8)
    )
    assert same, f"{what}: bits differ, largest difference {float((found.double() - expected.double()).abs().max())}"


def ulps_apart(found, expected):
    """Units in the last place between two tensors of one half-precision dtype."""

    def ordered(x):
        bits = x.contiguous().view(torch.int16).to(torch.int32)
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return int((ordered(found) - ordered(expected)).abs().max())
