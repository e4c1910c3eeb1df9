"""The table of GPUs: one entry is all that another GPU takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sd_kernels import targets
from sd_kernels.targets import GPUS, Rate, key_of_driver, named, names, peak_of_driver
from sd_perf.config import Config, UNetConfig
from sd_perf.errors import ConfigError
from sd_perf.tools.doctor import examine
from sd_perf.tools.estimate.dry_run import dry_run
from sd_perf.tools.estimate.predict import predict

SHALLOW = UNetConfig(
    implementation="fast", channel_mult=(2, 1), attention_resolutions=(2,), num_res_blocks=1
)
CONFIG = Config(model=SHALLOW)


def test_another_gpu_is_another_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card = replace(
        GPUS["h100"],
        name="H999",
        capability=(9, 9),
        memory=320e9,
        peak=Rate(5e15, "made up"),
        driver_names=("NVIDIA H999",),
        same_peak=("NVIDIA H999 PCIe",),
    )
    monkeypatch.setitem(GPUS, "h999", card)
    assert names()[-1] == "h999" and named("h999") is card
    facts = dry_run(CONFIG, 1, "h999")
    assert facts["target"] == "H999" and facts["kernels"]["geglu"]["backend"] == "triton"
    assert examine("h999", tmp_path)["target"] == {"name": "H999", "declared": True}
    hopper, figures = predict(CONFIG, "h100", 8), predict(CONFIG, "h999", 8)
    assert figures["samples_per_second"] == hopper["samples_per_second"]
    assert figures["largest_batch"] > 3 * hopper["largest_batch"]
    assert key_of_driver("NVIDIA H999") == "h999" and key_of_driver("NVIDIA H999 PCIe") is None
    assert peak_of_driver("NVIDIA H999") == peak_of_driver("NVIDIA H999 PCIe") == card.peak
    monkeypatch.setitem(GPUS, "h999", replace(card, attention={}))
    with pytest.raises(ConfigError, match=r"H999 has no rate of FlashAttention 2; .*targets\.py"):
        predict(CONFIG, "h999", 8)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(LookupError, match=r"'h10' is not known \(did you mean 'h100'\?\)"):
        named("h10")
    with pytest.raises(ConfigError, match=r"--target: 'tpu' is not known; choose a100.*or here"):
        dry_run(CONFIG, 1, "tpu")


def test_no_peak_is_guessed() -> None:
    assert peak_of_driver("NVIDIA H100 80GB HBM3") == (989e12, GPUS["h100"].peak.source)
    assert peak_of_driver("NVIDIA A100-SXM4-40GB") == GPUS["a100"].peak
    assert key_of_driver("NVIDIA A100-SXM4-40GB") is None
    assert peak_of_driver("NVIDIA H100 PCIe") is None


@pytest.mark.parametrize("key", GPUS)
def test_an_entry_is_whole(key: str) -> None:
    gpu = GPUS[key]
    assert gpu.attention and gpu.driver_names and key == gpu.name.lower()
    for rate in (gpu.peak, gpu.matmul, gpu.bandwidth):
        assert rate.value > 1e11 and rate.source
    # No matmul runs past the data sheet, nor attention past a matmul.
    assert gpu.matmul.value <= gpu.full_wave_flops <= gpu.peak.value
    for rates in gpu.attention.values():
        assert rates.source
        assert max(*rates.forward, *rates.backward) * 1e12 < gpu.full_wave_flops
    assert targets.key_of_driver(gpu.driver_names[0]) == key


def test_the_figures_of_the_measured_product_are_its_waves() -> None:
    assert GPUS["h100"].full_wave_flops == pytest.approx(798e12 * 16 / (2048 / 132), rel=1e-12)
