"""Options and commands that do not parse or cannot be used: exit code 2, and nothing is written."""

from __future__ import annotations

import json

import pytest

from sd_kernels.errors import KernelError
from tests.cli.bad_input import (
    FAST,
    matches,
)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            ["--training.max-sample", "4"],
            ["--training.max-sample", "Perhaps you meant", "--training.max-samples INT"],
        ),
        (["--rezume"], ["--rezume", "Perhaps you meant", "--resume"]),
        (["--training.max-samples", "many"], ["--training.max-samples", "'many'"]),
        (["--training.precision", "fp16"], ["--training.precision", "'fp16'", "'fp32', 'bf16'"]),
        (["--model.channel-mult", "1", "x"], ["--model.channel-mult"]),
        (["--config"], ["--config"]),
    ],
)
def test_options_that_do_not_parse(options, parts, preset, run, sd_perf):
    code, _, errors = sd_perf("train", "--config", preset, "--run.dir", run, *options)
    assert code == 2 and "Traceback" not in errors and not run.exists()
    matches(errors, *parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--training.max-samples", "0"], ["training.max_samples: 0", "at least 1"]),
        (["--optimizer.beta-1", "2"], ["optimizer.beta_1: 2.0", "in [0, 1)"]),
        (
            ["--training.accumulate-steps", "3"],
            ["training.global_batch_size: 4", "a multiple of", "1 x 3"],
        ),
        (
            ["--sampling.steps", "2000"],
            ["sampling.steps: 2000", "at most diffusion.num_timesteps (1000)"],
        ),
        (
            ["--kernels.geglu", "triton"],
            ["kernels.geglu: 'triton'", "auto or reference", "is 'plain'"],
        ),
        (["--kernels.strict"], ["kernels.strict: True", "is 'plain'"]),
        (
            ["--precision.text", "fp8_native"],
            ["precision.text: 'fp8_native'", "bf16, since", "is 'plain'"],
        ),
        (
            ["--kernels.geglu", "triton", "--dry-run"],
            ["kernels.geglu: 'triton'", "auto or reference", "is 'plain'"],
        ),
        (["--mlperf.division", "closed", "--dry-run"], ["is not allowed in the closed division"]),
        (
            [*FAST, "--kernels.geglu", "tritn", "--dry-run"],
            ["kernels.geglu: 'tritn'", "did you mean 'triton'?"],
        ),
        (["--dry-run", "--ranks", "0"], ["--ranks: 0 cannot be used; it must be at least 1"]),
        (["--dry-run", "--ranks", "-2"], ["--ranks: -2 cannot be used; it must be at least 1"]),
        (["--dry-run", "--ranks", 10**12], ["--ranks: 1000000000000", "at most 100,000"]),
        (
            ["--training.global-batch-size", 4 * 10**12],
            ["training.global_batch_size: 4000000000000", "at most 1,000,000"],
        ),
        (["--optimizer.epsilon", "inf"], ["optimizer.epsilon: inf", "finite"]),
        (
            ["--training.global-batch-size", 10**6, "--data.latent-size", 2048],
            ["training needs at least", "of memory on cpu", "are available; make the model"],
        ),
        (["--resume", "--fresh"], ["--resume", "--fresh", "give one of them"]),
    ],
)
def test_options_that_cannot_be_used(options, parts, preset, run, refused):
    matches(refused("train", "--config", preset, "--run.dir", run, *options), *parts)
    assert not run.exists()


@pytest.mark.parametrize(
    ("command", "option", "value", "right"),
    [
        (["data", "scenes"], "--samples", 10**12, "at most 10,000,000"),
        (["data", "scenes"], "--samples", 0, "at least 1"),
        (["data", "scenes"], "--seed", -1, "in [0, 2**63)"),
        (["data", "scenes"], "--seed", 2**64, "in [0, 2**63)"),
        (["sample", "--source", "x", "--prompt", "a", "--autoencoder", "a"], "--seed", -1, "in [0"),
        (["estimate"], "--batch", 0, "at least 1"),
        (["estimate"], "--batch", 4 * 10**12, "at most 1,000,000"),
        (["estimate"], "--ranks", -3, "at least 1"),
        (["estimate"], "--ranks", 10**12, "at most 100,000"),
    ],
)
def test_whole_numbers_have_limits(command, option, value, right, preset, tmp_path, refused):
    place = ["--config", preset] if command == ["estimate"] else ["--output", tmp_path / "out"]
    matches(refused(*command, *place, option, value), f"{option}: {value}", right)
    assert not (tmp_path / "out").exists()


def test_dry_run_for_a_declared_gpu(preset, run, sd_perf):
    command = [
        "train",
        "--config",
        preset,
        "--run.dir",
        run,
        "--dry-run",
        *FAST,
        "--kernels.geglu",
        "triton",
    ]
    code, output, _ = sd_perf(*command, "--target", "h100", "--json")
    facts = json.loads(output)
    assert (
        code == 0 and facts["target"] == "H100" and facts["kernels"]["geglu"]["backend"] == "triton"
    )
    assert set(facts["linear_layers"].values()) == {"fp32"}
    code, output, _ = sd_perf(*command, "--target", "a100")
    assert code == 0 and "kernels on A100" in output and "named in the config" in output
    code, _, errors = sd_perf(*command, "--target", "h101")
    assert code == 2 and "'h101'" in errors and not run.exists()


def test_an_operators_error(preset, run, refused, monkeypatch):
    def refuse(*_):
        raise KernelError("geglu: got torch.int32; takes float32, bfloat16 or float16")

    monkeypatch.setattr("sd_perf.tools.estimate.dry_run.dry_run", refuse)
    matches(
        refused("train", "--config", preset, "--run.dir", run, "--dry-run"),
        "geglu: got torch.int32",
    )


def test_unknown_command(sd_perf):
    code, _, errors = sd_perf("trian")
    assert code == 2 and "trian" in errors and "Traceback" not in errors
