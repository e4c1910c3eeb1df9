"""A decoder with merged upsampling computes what the plain one does, under the same names."""

from __future__ import annotations

import copy

import torch

from sd_perf.models.merged_upsampling import MergedUpsample, merge_upsampling
from sd_perf.models.vae import AutoencoderConfig, AutoencoderKL


@torch.no_grad()
def test_error_and_names_are_those_of_the_plain_decoder():
    torch.manual_seed(0)
    plain = AutoencoderKL(AutoencoderConfig(channels=8, groups=4))
    exact = copy.deepcopy(plain).double()
    plain.to(memory_format=torch.channels_last)
    merged = copy.deepcopy(plain)
    merge_upsampling(merged)
    assert sum(isinstance(module, MergedUpsample) for module in merged.modules()) == 3
    assert merged.state_dict().keys() == plain.state_dict().keys()

    latents = torch.randn(2, 4, 8, 8)
    expected = exact.decode(latents.double())
    errors = [(each.decode(latents) - expected).square().mean().sqrt() for each in (merged, plain)]
    assert 0 < errors[0] <= 2 * errors[1] < 1e-3 * expected.std()
