"""Stochastic rounding in plain torch: the bits against whole numbers, the statistics against their own deviation.

Bounds are five standard deviations of the estimate. The numbers are a function of the seeds below, so a test that
passes once passes always: five only says how surprising a correct rounding may look.
"""

import doctest
import math

import pytest
import torch
from craft_opt.kernels import rounding
from craft_opt.kernels.rounding import RoundingScratch, mix32, rounding_key, stochastic_round_

BF16, F32 = torch.bfloat16, torch.float32
SIGMAS = 5.0
ULP = 2.0**-7  # of bf16 between 1 and 2


def rounded(wide, seed=0, stream=0, t=0, **keywords):
    return stochastic_round_(torch.empty(wide.shape, dtype=BF16), wide, rounding_key(seed, stream, t), **keywords)


def ups(fraction, count, **key):
    """Which of ``count`` copies of 1 + fraction·ulp went up."""
    return (rounded(torch.full((count,), 1.0 + fraction * ULP), **key) > 1.0).double()


def correlation(x, y):
    return float(torch.corrcoef(torch.stack((x, y)))[0, 1])


class TestBits:
    def test_the_hash_in_whole_numbers_and_in_tensors(self):
        # lowbias32 is a bijection with 0 as a fixed point: any slip in a shift or a product breaks one or the other.
        assert mix32(0) == 0
        x = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0))
        hashed = mix32(x.to(torch.int32))
        assert [h % 2**32 for h in hashed.tolist()] == [mix32(v % 2**32) for v in x.tolist()]
        assert len(set(hashed.tolist())) == len(set(x.tolist()))

    @pytest.mark.parametrize("t", [0, 1, 2**31 - 1, 2**31 + 5, 2**32 - 1])
    def test_the_key_in_whole_numbers_and_in_tensors(self, t):
        for seed, stream in ((0, 0), (2**32 - 1, 3), (17, 2**32 - 1)):
            found = rounding_key(seed, stream, torch.tensor(float(t), dtype=torch.float64))
            assert found.dtype == torch.int32
            assert int(found) % 2**32 == rounding_key(seed, stream, t) == mix32(mix32(mix32(seed) ^ stream) ^ t)

    def test_every_element_is_the_sum_of_its_bits_and_its_number(self):
        wide = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.linspace(-44, 37, 5000)
        key, offset = rounding_key(3, 5, 7), 2**31 - 2000  # the place passes the sign bit of an int32
        expected = []
        for i, bits in enumerate(wide.view(torch.int32).tolist()):
            upper = ((bits % 2**32) + (mix32((i + offset) ^ key) & 0xFFFF)) >> 16
            expected.append(upper)
        found = stochastic_round_(torch.empty(5000, dtype=BF16), wide, key, offset)
        assert [b % 2**16 for b in found.view(torch.int16).tolist()] == expected

    def test_pieces_tensor_keys_and_kept_memory_change_nothing(self):
        wide = torch.randn(70_001, generator=torch.Generator().manual_seed(2))
        kept = wide.clone()
        whole = rounded(wide, 1, 2, 3)
        scratch = RoundingScratch(size=1000)
        pieces = torch.empty(wide.shape, dtype=BF16)
        key = rounding_key(1, 2, torch.tensor(3.0, dtype=torch.float64))
        for start in range(0, 70_001, 9999):
            part = slice(start, start + 9999)
            assert (
                stochastic_round_(pieces[part], wide[part], key, start, scratch).data_ptr() == pieces[part].data_ptr()
            )
        assert torch.equal(whole, pieces)
        assert torch.equal(wide, kept)

    def test_exact_values_stay_and_others_go_to_a_neighbour(self):
        exact = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(BF16)
        exact = exact[exact.isfinite()]
        assert torch.equal(rounded(exact.float()).view(torch.int16), exact.view(torch.int16))
        wide = torch.randn(10_000, generator=torch.Generator().manual_seed(3))
        found = rounded(wide).float()
        assert bool(((found - wide).abs() < 2.0**-7 * wide.abs()).all())

    def test_values_that_are_not_finite_pass(self):
        signalling = torch.tensor([0x7F800001], dtype=torch.int32).view(F32)
        strange = torch.cat([torch.tensor([math.inf, -math.inf, math.nan]), signalling]).repeat(100)
        found = rounded(strange).float()
        assert bool((found[strange == math.inf] == math.inf).all())
        assert bool((found[strange == -math.inf] == -math.inf).all())
        assert torch.equal(found.isnan(), strange.isnan())

    @pytest.mark.parametrize(
        ("target", "wide"),
        [
            (torch.empty(4, dtype=torch.float16), torch.zeros(4)),
            (torch.empty(4, dtype=BF16), torch.zeros(4, dtype=torch.float64)),
            (torch.empty(4, dtype=BF16), torch.zeros(5)),
            (torch.empty(2, 2, dtype=BF16), torch.zeros(2, 2)),
            (torch.empty(8, dtype=BF16)[::2], torch.zeros(4)),
        ],
    )
    def test_other_tensors_are_refused(self, target, wide):
        with pytest.raises(ValueError, match="fp32 into bf16"):
            stochastic_round_(target, wide, 0)

    def test_nothing_is_a_vector_too(self):
        assert rounded(torch.zeros(0)).shape == (0,)

    def test_the_examples_of_the_module_run(self):
        result = doctest.testmod(rounding)
        assert (result.failed, result.attempted > 3) == (0, True)


class TestStatistics:
    def test_up_is_as_likely_as_the_fraction_says(self):
        count = 1 << 16
        for k in range(64):
            f = k / 64  # a whole number of 2^-16, so that 16 bits state it exactly; 0 must never go up
            found = float(ups(f, count, stream=k).mean())
            bound = SIGMAS * math.sqrt(f * (1 - f) / count)
            assert abs(found - f) <= bound, (f, found)

    def test_the_mean_is_the_value_at_every_scale_and_sign(self):
        draws, gen = 4096, torch.Generator().manual_seed(4)
        values = torch.randn(200, generator=gen) * 10.0 ** torch.randint(-39, 38, (200,), generator=gen)
        for i, value in enumerate(values.tolist()):
            wide = torch.full((draws,), value)
            low = (wide[:1].view(torch.int32) & -0x10000).view(F32).double().item()
            high = ((wide[:1].view(torch.int32) & -0x10000) + 0x10000).view(F32).double().item()
            f = (wide[0].double().item() - low) / (high - low)
            bound = abs(high - low) * (SIGMAS * math.sqrt(f * (1 - f) / draws) + 2.0**-16)
            error = float(rounded(wide, stream=i, t=9).double().mean()) - wide[0].double().item()
            assert abs(error) <= bound, value

    def test_steps_neighbours_parameters_and_seeds_are_uncorrelated(self):
        count = 1 << 18
        first = ups(0.5, count, seed=1, stream=2, t=3)
        others = {
            "next step": ups(0.5, count, seed=1, stream=2, t=4),
            "next parameter": ups(0.5, count, seed=1, stream=3, t=3),
            "next seed": ups(0.5, count, seed=2, stream=2, t=3),
            "stream and step exchanged": ups(0.5, count, seed=1, stream=3, t=2),
            **{f"neighbour {d}": first.roll(-d) for d in (1, 2, 8, 16, 1024)},
        }
        # The correlation of n independent pairs has standard deviation 1/sqrt(n).
        for name, other in others.items():
            assert abs(correlation(first, other)) <= SIGMAS / math.sqrt(count), name

    def test_one_element_over_many_steps_is_a_fair_sequence(self):
        steps = 20_000
        wide = torch.full((1,), 1.0 + 0.5 * ULP)
        scratch, target = RoundingScratch(size=1), torch.empty(1, dtype=BF16)
        went = [
            float(stochastic_round_(target, wide, rounding_key(0, 0, t), 12345, scratch) > 1.0) for t in range(steps)
        ]
        found = torch.tensor(went, dtype=torch.float64)
        assert abs(float(found.mean()) - 0.5) <= SIGMAS * 0.5 / math.sqrt(steps)
        assert abs(correlation(found[1:], found[:-1])) <= SIGMAS / math.sqrt(steps)

    def test_the_sixteen_bits_are_uniform(self):
        count, bins = 1 << 20, 256
        numbers = mix32(torch.arange(count, dtype=torch.int32) ^ (rounding_key(0, 1, 2) - 2**31)) & 0xFFFF
        for part in (numbers >> 8, numbers & 0xFF):
            seen = torch.bincount(part, minlength=bins).double()
            chi2 = float(((seen - count / bins) ** 2).sum() / (count / bins))
            # χ² of 255 degrees of freedom: mean 255, variance 510.
            assert abs(chi2 - (bins - 1)) <= SIGMAS * math.sqrt(2 * (bins - 1))

    def test_updates_below_half_a_unit_add_up(self):
        count, steps, share = 1 << 14, 100, 0.1
        nearest = torch.full((count,), 1.0, dtype=BF16)
        chosen = nearest.clone()
        for t in range(steps):
            nearest.copy_(nearest.float() + share * ULP)
            rounded_now = rounded(chosen.float() + share * ULP, t=t)
            chosen.copy_(rounded_now)
        assert bool((nearest == 1.0).all()), "to nearest they are lost"
        walked = (chosen.double() - 1.0) / ULP
        # Each step adds a Bernoulli(0.1) of a unit.
        assert abs(float(walked.mean()) - steps * share) <= SIGMAS * math.sqrt(steps * share * (1 - share) / count)
        spread = float(walked.var())
        assert abs(spread / (steps * share * (1 - share)) - 1.0) <= SIGMAS * math.sqrt(2.0 / count)
