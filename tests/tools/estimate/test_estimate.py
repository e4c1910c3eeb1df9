"""The model of time and memory: its sums by hand, its directions, and what the documentation says
of it."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sd_kernels.reasons import Reason, refusal
from sd_kernels.registry import all_ops
from sd_kernels.sd_v2_shapes import SD_V2
from sd_kernels.spec import Matmul
from sd_kernels.targets import GPUS
from sd_perf.cli import main
from sd_perf.config import Config, UNetConfig
from sd_perf.errors import ConfigError
from sd_perf.fast.architecture import architecture
from sd_perf.presets import load_preset
from sd_perf.tools.estimate import predict as prediction
from sd_perf.tools.estimate.dry_run import dry_run
from sd_perf.tools.estimate.eager import plain
from sd_perf.tools.estimate.fused import cases, fused, saved_activations
from sd_perf.tools.estimate.predict import RECIPES, predict
from sd_perf.tools.estimate.published import BEST
from sd_perf.tools.estimate.roofline import Kernel, matmul_seconds
from sd_perf.tools.estimate.submission import submission

ROOT = Path(__file__).parents[3]
SMOKE = ROOT / "configs/smoke.yaml"
PUBLISHED_ROW = re.compile(
    r"\| (\w+) \| (\d+) \| .* \| (\d+) x (\d+) \| ([\d.]+) \| ([\d.]+) \| \+(\d+) % \|"
)
SHALLOW = UNetConfig(channel_mult=(2, 1), attention_resolutions=(2,), num_res_blocks=1)


@pytest.fixture(autouse=True)
def each_network_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager kernels depend on config and batch alone, and tracing the benchmark takes a second."""
    monkeypatch.setattr(prediction, "plain", traced)


traced = cache(plain)


@cache
def predicted(gpu: str, batch: int, ranks: int = 1) -> dict[str, Any]:
    return predict(Config(), gpu, batch, ranks)


def gflops(kernels: list[Kernel], backward: bool) -> Counter[str]:
    """Of one sample, by op."""
    total: Counter[str] = Counter()
    for kernel in kernels:
        if kernel.backward == backward:
            total[kernel.op.replace("skip_conv", "conv")] += kernel.calls * kernel.flops / 1e9
    return total


def moved(kernels: list[Kernel], op: str) -> float:
    return sum(kernel.calls * kernel.bytes for kernel in kernels if kernel.op == op)


@pytest.mark.parametrize("recipe", ["plain", "submission"])
def test_flops_of_the_benchmark(recipe: str) -> None:
    kernels = plain(Config(), 1)[0] if recipe == "plain" else list(submission(SD_V2, 1, 1))
    forward, backward = gflops(kernels, False), gflops(kernels, True)
    assert sum(forward.values()) == pytest.approx(804.26, abs=0.005)
    assert forward["conv"] == pytest.approx(418.4, abs=0.05)
    assert forward["linear"] == pytest.approx(259.8, abs=0.05)
    assert forward["attention"] == pytest.approx(126.1, abs=0.05)
    assert backward["attention"] == pytest.approx(2.5 * forward["attention"])
    # No gradient goes to the text; the first convolution's goes to the latents where the spec
    # counts it.
    assert backward["linear"] == pytest.approx(2 * forward["linear"] - 3.9, abs=0.05)
    assert backward["conv"] == pytest.approx(2 * forward["conv"], rel=3e-4)


def test_fused_takes_the_same_flops_but_for_upsampling() -> None:
    forward = gflops(list(fused(SD_V2, 1)), False)
    upsampled = forward.pop("upsample_conv")
    plain_one = 2 * 9 * (16**2 * 1280**2 + 32**2 * 1280**2 + 64**2 * 640**2) / 1e9
    assert sum(forward.values()) + plain_one == pytest.approx(804.26, abs=0.005)
    assert upsampled / plain_one == pytest.approx(4 / 9, rel=0.12)


def test_the_same_flops_and_kept_bytes_as_the_dry_run() -> None:
    config = load_preset(SMOKE)
    facts = dry_run(config, 1)
    forward = gflops(plain(config, 1)[0], False)
    assert sum(forward.values()) == pytest.approx(facts["gflops_forward"], abs=0.06)
    kernels = list(submission(architecture(config), 1, 1))
    assert sum(gflops(kernels, False).values()) == pytest.approx(facts["gflops_forward"], abs=0.06)


@pytest.mark.parametrize(("strategy", "shares"), [("ddp", 1), ("zero1", 8)])
def test_the_average_of_the_weights_takes_time(strategy: str, shares: int) -> None:
    """Average and master are read and the average is written: 12 bytes a parameter."""
    smoke = load_preset(SMOKE)
    without, with_average = (
        predict(replace(smoke, training=replace(smoke.training, **changes)), "h100", 16, ranks=8)
        for changes in ({"strategy": strategy}, {"strategy": strategy, "ema_decay": 0.999})
    )
    parameters = architecture(smoke).parameters
    for name, divided in {"plain": 1, "submission": 8, "fused": shares}.items():
        before, after = without["recipes"][name], with_average["recipes"][name]
        row = after["by_op"]["average"]
        assert row["gigabytes"] * 16e9 == pytest.approx(12 * parameters / divided)
        assert "average" not in before["by_op"]
        if name != "plain":  # there the host may be the slower one
            more = after["ms_per_sample"] - before["ms_per_sample"]
            assert more == pytest.approx(row["ms_per_sample"])
        assert after["memory_bytes"]["workspace"] == before["memory_bytes"]["workspace"]


def test_bytes_by_hand() -> None:
    batch = 3
    kernels = list(fused(SD_V2, batch))
    # GEGLU: 8C in and 4C out; backward reads both again and writes 8C. Four million numbers a
    # sample at C = 320.
    tokens = 5 * (4096 * 320 + 1024 * 640 + 256 * 1280) + 64 * 1280
    assert moved(kernels, "geglu") == batch * tokens * (12 + 20) * 2
    # LayerNorm: 2, 4 and 4 forward, 4 each backward.
    assert moved(kernels, "layer_norm") == batch * tokens * (2 + 4 + 4 + 12) * 2
    # Sums that no norm follows: three passes, and those of images read a gradient for a bias.
    images = 4096 * 320 + 1024 * 640 + 256 * 1280 + 64 * 1280 + 256 * 1280 + 1024 * 640
    assert moved(kernels, "residual_add") == batch * ((tokens + images) * 3 + images) * 2
    # AdamW: 12 bytes read and written, 2 read; and step and rate.
    assert moved(kernels, "adamw") == 865_910_724 * 26 + 8
    # Skips that are downsampled: a sum of three passes each; biases of the times' linear layers.
    skips = 4096 * 320 + 1024 * 640 + 256 * 1280
    times_out = sum([320] * 5 + [640] * 5 + [1280] * 12)
    times = 1280 + 1280 + times_out
    # Copies read and write: of each gradient into the flat buffer, and of the packed gradients of
    # texts and times.
    widths = [320] * 5 + [640] * 5 + [1280] * 6
    gradients = batch * (sum(2 * C * 77 for C in widths) + times_out)
    copies = 4 * (865_910_724 + gradients)
    assert moved(kernels, "elementwise") == batch * (skips * 3 + times) * 2 + copies
    # The 1x1 convolutions: one matmul, forward and for each gradient.
    skip_convs = [kernel for kernel in kernels if kernel.op == "skip_conv"]
    assert sum(kernel.calls for kernel in skip_convs) == 3 * 14


def test_a_product_fills_whole_waves() -> None:
    gpu, flops = GPUS["h100"], 2.0 * 8192**3
    assert flops / matmul_seconds(Matmul(8192, 8192, 8192), gpu) == pytest.approx(798e12, rel=1e-6)
    # One tile more than a wave: smaller tiles and split sums share it out, but not for nothing.
    one, more = (matmul_seconds(Matmul(128 * n, 256, 64), gpu) for n in (132, 133))
    assert one == pytest.approx(2.0 * 132 * 128 * 256 * 64 / (gpu.full_wave_flops))
    assert more == pytest.approx(1.5 * one)
    # A weight's gradient has few outputs and a long sum, which is split.
    assert matmul_seconds(Matmul(320, 2880, 262144), gpu) < 2.0 * 320 * 2880 * 262144 / 798e12 * 1.5


def test_cases_are_those_of_the_specs() -> None:
    for op, spec in all_ops().items():
        if spec.cases_of is not None:
            assert cases(op, SD_V2, 64) == [case for case in spec.cases if case.calls], op
    assert {op for op, spec in all_ops().items() if spec.cases_of is None} == {"fp8_linear"}
    assert architecture(Config()) == SD_V2


def test_kept_bytes_of_a_transformer_by_hand() -> None:
    with_one, without = (
        replace(SD_V2, widths=(320,), side=8, blocks=1, transformer_levels=levels)
        for levels in ((0,), ())
    )
    rows, C = 64, 320
    each = 2 * C  # norm at the entrance: itself and its sum
    each += 3 * 2 * C + 12 * C + C  # three norms, GEGLU's input and output, the feed-forward's sum
    each += (
        4 * C + 2 * 5 + 2 * C + 2 * 5
    )  # self: q k v, output; cross: q, output; a float32 a row and head
    text = 2 * 77 * C
    assert (
        saved_activations(with_one, 2) - saved_activations(without, 2)
        == 2 * 3 * (rows * each + text) * 2
    )


@pytest.mark.slow
def test_directions() -> None:
    for recipe in RECIPES:
        rate = {
            (gpu, batch): predicted(gpu, batch)["recipes"][recipe]
            for gpu in ("h100", "h200")
            for batch in (32, 64)
        }
        for batch in (32, 64):
            assert (
                rate["h200", batch]["samples_per_second"]
                >= rate["h100", batch]["samples_per_second"]
            )
            assert rate["h200", batch]["largest_batch"] > rate["h100", batch]["largest_batch"]
        assert rate["h100", 64]["samples_per_second"] >= rate["h100", 32]["samples_per_second"]
    recipes = predicted("h100", 64)["recipes"]
    assert (
        recipes["plain"]["ms_per_sample"]
        > recipes["submission"]["ms_per_sample"]
        > recipes["fused"]["ms_per_sample"]
    )
    # The optimizer's state of eight GPUs.
    assert (
        predicted("h100", 64, 8)["recipes"]["submission"]["ms_per_sample"]
        < recipes["submission"]["ms_per_sample"]
    )


def test_memory() -> None:
    facts = predicted("h100", 64)
    memory, N = facts["memory_bytes"], 865_910_724
    assert [memory[name] for name in ("weights", "masters", "gradients", "moments")] == [
        2 * N,
        2 * N,
        2 * N,
        8 * N,
    ]
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total") < 80e9
    note = "plain: batch 64 does not fit into H100 80 GB; the largest that does is 48"
    assert facts["notes"] == [note]
    assert predicted("h200", 64)["notes"] == []


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(Config(model=SHALLOW), id="shallow"),
        pytest.param(Config(), id="benchmark", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("gpu", "recipe"), [("h100", "fused"), ("h100", "submission"), ("a100", "plain")]
)
def test_one_sample_more_than_the_largest_batch_does_not_fit(
    config: Config, gpu: str, recipe: str
) -> None:
    largest = predict(config, gpu, 64)["recipes"][recipe]["largest_batch"]
    fits, too_large = (
        predict(config, gpu, batch)["recipes"][recipe]["memory_bytes"]
        for batch in (largest, largest + 1)
    )
    assert fits["total"] <= GPUS[gpu].memory < too_large["total"]


def test_a_slow_host_makes_eager_wait() -> None:
    recipes = predict(load_preset(SMOKE), "h100", 1)["recipes"]
    assert recipes["plain"]["by_op"]["waiting"]["ms_per_sample"] > 0
    assert "waiting" not in recipes["fused"]["by_op"]


def test_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "new" / "bars.png"
    arguments = ["estimate", "--config", str(SMOKE), "--gpu", "b200", "--batch", "8"]
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--json", "--png", str(png)])
    assert left.value.code == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["gpu"], facts["batch"], set(facts["recipes"])) == ("b200", 8, set(RECIPES))
    for figures in (facts, *facts["recipes"].values()):
        assert {
            "samples_per_second",
            "ms_per_sample",
            "by_op",
            "memory_bytes",
            "largest_batch",
        } <= set(figures)
        spent = sum(row["ms_per_sample"] for row in figures["by_op"].values())
        assert (
            figures["ms_per_sample"]
            == pytest.approx(spent)
            == pytest.approx(1e3 / figures["samples_per_second"])
        )
    assert {name: facts[name] for name in facts["recipes"]["fused"]} == facts["recipes"]["fused"]
    assert png.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0
    page = capsys.readouterr().out
    assert (
        "B200 180 GB, batch 8" in page
        and "largest batch" in page
        and "One GPU: no communication." in page
    )
    # Nobody has published a rate of cuDNN's attention there; one entry says what was reached.
    assert "fused with attention by cudnn (FlashAttention 2): at most" in " ".join(page.split())
    assert "attention by cudnn on B200: no rate is known" in " ".join(page.split())


def test_what_is_installed_and_what_to_expect() -> None:
    facts = predicted("h100", 64)
    installed, submitted = facts["installed"], predicted("h100", 64, 4)["recipes"]["submission"]
    assert (installed["attention"], installed["attention_rates"]) == ("cudnn", "cuDNN")
    assert facts["samples_per_second"] > installed["samples_per_second"]
    # The best entries of H100 and H200, over the estimate of their own way.
    low, high = installed["shares_reached"]
    assert high == pytest.approx(145.0 / submitted["samples_per_second"])
    assert installed["expected"] == [
        share * installed["samples_per_second"] for share in (low, high)
    ]
    assert predicted("a100", 64)["installed"]["expected"] is None
    named = replace(Config(), kernels=replace(Config().kernels, attention="fa3"))
    with_fa3 = predict(named, "h100", 64)["installed"]
    assert facts["installed"]["by_op"]["elementwise"]["gigabytes"] == pytest.approx(
        with_fa3["by_op"]["elementwise"]["gigabytes"] + 9.363 / 64, abs=1e-4
    )
    assert with_fa3["samples_per_second"] == pytest.approx(facts["samples_per_second"])
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    ranges = [
        "{:.0f} to {:.0f}".format(*predicted(gpu, 64)["installed"]["expected"])
        for gpu in ("h100", "h200")
    ]
    sentence = "To be expected are {} samples/s on an H100 and {} on an H200."
    assert sentence.format(*ranges) in page
    rows = PUBLISHED_ROW.findall(page)
    documented = {
        (gpu.lower(), int(batch), int(gpus), float(rate))
        for gpu, batch, nodes, gpus, rate, *_ in rows
        if nodes == "1"
    }
    assert set(BEST) <= documented


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--gpu", "h10"],
            "--gpu: 'h10' is not known (did you mean 'h100'?); choose a100, h100, h200, b200",
        ),
        (["--gpu", "tpu"], "--gpu: 'tpu' is not known; choose a100, h100, h200, b200"),
        (["--batch", "0"], "--batch: 0 cannot be used; it must be at least 1"),
        (["--ranks", "-1"], "--ranks: -1 cannot be used; it must be at least 1"),
    ],
)
def test_bad_input(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["estimate", "--config", str(SMOKE), *options])
    assert left.value.code == 2
    assert capsys.readouterr().err.strip() == f"sd-perf: {sentence}"


def test_a_picture_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for png in (tmp_path, Path("/proc/x/bars.png")):
        with pytest.raises(SystemExit) as left:
            main(["estimate", "--config", str(SMOKE), "--batch", "2", "--png", str(png)])
        assert left.value.code == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"sd-perf: {png} cannot be written (") and line.endswith(
            "choose another --png"
        )


def test_a_shape_that_no_backend_takes_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = all_ops()["geglu"]

    def refuses(case: Any, dtype: torch.dtype) -> Reason | None:
        return None if case.shape["L"] > 16 else refusal("takes more than 16 tokens")

    backends = (replace(spec.backends[0], refuses=refuses), spec.backends[-1])
    monkeypatch.setitem(all_ops(), "geglu", replace(spec, backends=backends))
    notes = predict(load_preset(SMOKE), "h100", 2)["notes"]
    assert notes[:1] == ["geglu, 16 tokens, 512: takes more than 16 tokens; counted as if it could"]


def test_figures_of_another_precision_say_so() -> None:
    note = "training.precision is fp32; these figures are of bfloat16"
    for precision, notes in (("fp32", [note]), ("bf16", [])):
        training = replace(load_preset(SMOKE).training, precision=precision)
        assert predict(replace(load_preset(SMOKE), training=training), "h100", 2)["notes"] == notes


def test_other_architectures() -> None:
    config = Config(model=SHALLOW)
    forward = [
        gflops(list(kernels), False)
        for kernels in (plain(config, 1)[0], submission(architecture(config), 1, 1))
    ]
    assert sum(forward[0].values()) == pytest.approx(sum(forward[1].values()))
    with pytest.raises(ConfigError):
        predict(config, "", 1)
