"""The config's section `kernels`: it has a field for every op, and what it asks for is resolved or
refused."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from sd_kernels.registry import all_ops
from sd_kernels.targets import GPUS, Target
from sd_perf.config import Config, KernelsConfig, PrecisionConfig, TrainingConfig, UNetConfig
from sd_perf.errors import ConfigError
from sd_perf.fast.choice import choose_kernels, require_used
from sd_perf.presets import config_from_dict

FAST = UNetConfig(implementation="fast")
H100 = GPUS["h100"].target


def test_every_op_has_a_field() -> None:
    missing = all_ops().keys() - {field.name for field in fields(KernelsConfig)}
    assert not missing, (
        f"KernelsConfig of sd_perf/config/kernels.py lacks the registered ops {sorted(missing)}"
    )


def test_auto_for_a_declared_gpu_and_for_a_cpu() -> None:
    on_h100 = choose_kernels(Config(), H100)
    assert on_h100.keys() == all_ops().keys()
    assert on_h100["geglu"].backend == "triton" and on_h100["geglu"].passed_over == {}
    on_cpu = choose_kernels(Config(), Target("cpu", "cpu"))
    assert on_cpu["geglu"].backend == "reference"
    assert on_cpu["geglu"].passed_over == {"triton": "needs a CUDA GPU, this is cpu"}


def test_a_head_dim_that_cudnn_does_not_take() -> None:
    odd = Config(model=UNetConfig(model_channels=288, num_head_channels=36, transformer_groups=16))
    assert choose_kernels(odd, H100)["attention"].backend == "math"
    why = "4096 tokens, 8 heads, self: takes head dims that are multiples of 8 up to 128, not 36"
    assert choose_kernels(odd, H100)["attention"].passed_over["cudnn"] == why
    asked = replace(odd, kernels=KernelsConfig(attention="cudnn"))
    with pytest.raises(
        ConfigError, match=r"kernels\.attention: 'cudnn' cannot be had on H100: .*not 36"
    ):
        choose_kernels(asked, H100)


def test_a_deterministic_run_takes_attention_that_repeats_itself() -> None:
    training = TrainingConfig(deterministic=True)
    config = Config(model=FAST, training=training)
    chosen = choose_kernels(config, H100)["attention"]
    assert chosen.backend == "flash_sdpa"
    assert "deterministic" in chosen.passed_over["cudnn"]
    named = replace(config, kernels=KernelsConfig(attention="cudnn"))
    with pytest.raises(ConfigError, match=r"kernels\.attention: 'cudnn' .*this run is determinis"):
        choose_kernels(named, H100)


def test_a_tiny_model_runs_on_any_target() -> None:
    tiny = UNetConfig(
        model_channels=6,
        channel_mult=(1,),
        num_head_channels=3,
        resblock_groups=1,
        transformer_groups=1,
        attention_resolutions=(),
    )
    for target in (Target("cpu", "cpu"), *(gpu.target for gpu in GPUS.values())):
        assert choose_kernels(Config(model=tiny), target).keys() == all_ops().keys()


@pytest.mark.parametrize("model", [UNetConfig(), UNetConfig(model_channels=64, context_dim=128)])
def test_a_name_is_taken_for_any_model(model: UNetConfig) -> None:
    config = Config(model=model, kernels=KernelsConfig(geglu="reference"))
    assert choose_kernels(config, H100)["geglu"].wanted == "reference"


@pytest.mark.parametrize(
    ("kernels", "target", "words"),
    [
        (
            {"geglu": "tritn"},
            H100,
            r"kernels.geglu: 'tritn' is not a backend \(did you mean 'triton'\?\)",
        ),
        (
            {"geglu": "triton"},
            Target("cpu", "cpu"),
            "kernels.geglu: 'triton' cannot be had on cpu: needs a CUDA GPU",
        ),
        (
            {"strict": True},
            Target("cpu", "cpu"),
            "auto would take '.*' on cpu, which kernels.strict forbids",
        ),
    ],
)
def test_what_cannot_be_had_names_its_key(kernels: dict, target: Target, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose_kernels(Config(model=FAST, kernels=KernelsConfig(**kernels)), target)


def test_an_op_that_is_none_is_an_unknown_key() -> None:
    with pytest.raises(
        ConfigError, match=r"kernels.geglo: unknown key; did you mean kernels.geglu\?"
    ):
        config_from_dict({"kernels": {"geglo": "triton"}})


ASKED = [({"geglu": "triton"}, "geglu: 'triton'"), ({"strict": True}, "strict")]


@pytest.mark.parametrize("kernels", [{}, {"geglu": "reference"}])
def test_the_plain_model_takes_what_it_is(kernels: dict) -> None:
    require_used(Config(kernels=KernelsConfig(**kernels)))


@pytest.mark.parametrize(("kernels", "words"), ASKED)
def test_no_kernel_that_is_asked_for_is_ignored(kernels: dict, words: str) -> None:
    require_used(Config(model=FAST, kernels=KernelsConfig(**kernels)))
    with pytest.raises(ConfigError, match=f"kernels.{words}.*model.implementation is 'plain'"):
        require_used(Config(kernels=KernelsConfig(**kernels)))


NATIVE = PrecisionConfig(feed_forward="fp8_native")


@pytest.mark.parametrize(
    ("target", "backend"),
    [(H100, "triton"), (Target("cpu", "cpu"), "reference")],
    ids=["h100", "cpu"],
)
def test_native_fp8_is_had_on_fp8_units_and_on_a_cpu(target: Target, backend: str) -> None:
    assert (
        choose_kernels(Config(model=FAST, precision=NATIVE), target)["fp8_linear"].backend
        == backend
    )


def test_native_fp8_without_fp8_units_is_asked_for_by_name_or_refused() -> None:
    a100 = GPUS["a100"].target
    choose_kernels(
        Config(model=FAST, precision=NATIVE, kernels=KernelsConfig(fp8_linear="reference")), a100
    )
    words = (
        "^precision.feed_forward: 'fp8_native' .* bf16 on A100 .*8.9, A100 has "
        "8.0.*kernels.fp8_linear to reference"
    )
    with pytest.raises(ConfigError, match=words):
        choose_kernels(Config(model=FAST, precision=NATIVE), a100)


def test_a_kernel_of_fp8_needs_a_layer_in_fp8() -> None:
    kernels = KernelsConfig(fp8_linear="triton")
    require_used(Config(model=FAST, precision=NATIVE, kernels=kernels))
    with pytest.raises(
        ConfigError, match=r"^kernels.fp8_linear: 'triton' .*no layer of the section precision"
    ):
        require_used(Config(model=FAST, precision=PrecisionConfig(linear="bf16"), kernels=kernels))


def test_the_benchmarks_calls_are_judged_whatever_its_speed() -> None:
    def chosen(model: UNetConfig) -> dict:
        return choose_kernels(Config(model=model), H100)

    assert chosen(replace(FAST, activation_checkpointing=True, compile=True)) == chosen(
        UNetConfig()
    )
    assert chosen(replace(FAST, model_channels=288, num_head_channels=36)) != chosen(UNetConfig())
