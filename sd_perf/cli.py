"""The command line: `sd-perf train | sample | export | data | doctor`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json as json_module
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from sd_perf.errors import UserError

try:
    import tyro
    from rich.console import Console
    from rich.table import Table

    from sd_perf.presets import load_preset
except ImportError as missing:
    sys.exit(f"sd-perf: the command line needs {missing.name}; pip install 'sd-perf[cli]'")

from sd_perf.config import Config, SamplingConfig

_INTERRUPTED = 75  # EX_TEMPFAIL: saved; run me again
_RANK = int(os.environ.get("RANK", "0"))
_Settings = Annotated[Config, tyro.conf.arg(name="")]
_console = Console(quiet=_RANK > 0)
_DESCRIPTION = "A fast, checkable trainer of the MLPerf text-to-image benchmark (Stable Diffusion v2)."


def train(
    config: Path, settings: _Settings, resume: bool = False, dry_run: bool = False, ranks: int = 1, json: bool = False
) -> int:
    """Train a UNet. Every field of the preset can be overridden.

    Args:
        config: YAML preset, such as configs/train_512_moments.yaml
        settings: fields of the preset
        resume: continue the run in its folder from its newest checkpoint (begin it where there is none)
        dry_run: print parameters, FLOPs, memory and batch arithmetic of the run, and exit
        ranks: processes that the dry run counts with
        json: print the dry run as JSON
    """
    if dry_run:
        return _dry_run(settings, ranks, json)
    from sd_perf.distributed.world import start_world, stop_world
    from sd_perf.training.launch import launch

    world = start_world(settings.training.device)
    try:
        stop_reason = launch(settings, world, resume, _console)
    finally:
        stop_world()
    if stop_reason is None:
        return 0
    again = f"sd-perf train --config {config} --run.dir {settings.run.dir} --resume"
    _console.print(f"stopped by {stop_reason} and saved; continue with:\n  {again}", soft_wrap=True, highlight=False)
    return _INTERRUPTED


def sample(
    source: Path,
    prompt: tuple[str, ...],
    autoencoder: Path,
    output: Path,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
) -> int:
    """Draw pictures from prompts with the weights of a run (DDIM).

    Args:
        source: run folder (its newest checkpoint) or one of its checkpoints
        prompt: one or more prompts
        autoencoder: file that holds the decoder: .onnx, or .ckpt or .safetensors in LDM names
        output: folder for the PNG files
        steps: DDIM steps (default: the run's sampling.steps)
        guidance_scale: 1 is no guidance (default: the run's sampling.guidance_scale)
        seed: of the initial noise
    """
    import torch

    from sd_perf.evaluation.generate import generate, save_pictures
    from sd_perf.models.build import build_text_encoder, build_unet
    from sd_perf.models.sources import newest_checkpoint, read_decoder, read_unet
    from sd_perf.models.weight_files import load_into
    from sd_perf.training.run_folder import read_run_config

    checkpoint, run = newest_checkpoint(source)
    config = read_run_config(run)
    sampling = SamplingConfig(
        steps=config.sampling.steps if steps is None else steps,
        guidance_scale=config.sampling.guidance_scale if guidance_scale is None else guidance_scale,
    )
    config = dataclasses.replace(config, sampling=sampling)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decode = read_decoder(autoencoder)
    unet = build_unet(config.model, 0, device)
    load_into(unet, read_unet(checkpoint)[0], "the UNet", checkpoint)
    images = generate(unet.eval(), build_text_encoder(config, device), decode, list(prompt), config, seed)
    for path in save_pictures(images, list(prompt), output):
        _console.print(path, highlight=False)
    return 0


def export(source: Path, output: Path, format: Literal["ldm", "diffusers"] = "ldm") -> int:
    """Write the UNet's weights for other tools.

    Args:
        source: run folder (its newest checkpoint), checkpoint, folder exported for diffusers, or LDM .ckpt/.safetensors
        output: file (ldm) or folder (diffusers) to write; must not exist
        format: ldm: one safetensors file in the names of Stable Diffusion checkpoints; diffusers: a folder with unet/
    """
    from sd_perf.models.sources import read_unet
    from sd_perf.models.weight_files import export_diffusers, export_ldm

    state, model = read_unet(source)
    if format == "ldm":
        export_ldm(state, output, {"sd_perf.source": str(source)})
    else:
        export_diffusers(state, model, output)
    _console.print(f"{len(state)} tensors of {source} -> {output}", highlight=False)
    return 0


def doctor(json: bool = False) -> int:
    """Say what is installed, what is missing and for what, and what torch can compute on.

    Args:
        json: print JSON
    """
    from sd_perf.doctor import examine

    report = examine()
    if json:
        return _print_json(report)
    devices = Table("device", "name", "memory", "capability", title="devices", title_justify="left")
    for device in report["devices"]:
        memory = f"{device['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in device else ""
        devices.add_row(device["device"], device["name"], memory, device.get("capability", ""))
    packages = Table("package", "version", "needed for", "if missing", title="packages", title_justify="left")
    for row in report["packages"]:
        missing = "" if row["version"] else row["install"].replace("[", r"\[")
        packages.add_row(row["package"], row["version"] or "[red]missing[/]", row["needed_for"], missing)
    _console.print(f"sd-perf {report['sd_perf']}, Python {report['python']}, {report['platform']}", highlight=False)
    _console.print(devices, packages)
    return 0


def prepare(
    config: Path,
    settings: _Settings,
    images: Path,
    autoencoder: Path,
    captions: Path | None = None,
    captions_per_image: int = 1,
    samples_per_shard: int = 1000,
) -> int:
    """Make moments shards (and text states, where data.context is precomputed) from a folder of captioned images.

    The shards go to data.path; the images are resized to 8 x data.latent_size pixels.

    Args:
        config: YAML preset of the run that will train on the shards
        settings: fields of the preset
        images: folder of images
        autoencoder: file that holds the encoder: .onnx, or .ckpt or .safetensors in LDM names
        captions: captions.jsonl with `file` and `captions` (default: in the images' folder or its parent)
        captions_per_image: samples made of each image, one per caption
        samples_per_shard: samples per tar file
    """
    import torch

    from sd_perf.data.prepare.photographs import prepare_moments, read_captioned_images
    from sd_perf.models.build import build_text_encoder
    from sd_perf.models.sources import read_encoder

    samples = read_captioned_images(images, captions or "", settings.data.allow_empty_captions)
    precomputed = settings.data.context == "precomputed"
    text_encoder = build_text_encoder(settings, torch.device("cpu")) if precomputed else None
    pixels = 8 * settings.data.latent_size
    folder = Path(settings.data.path)
    count = prepare_moments(
        samples,
        read_encoder(autoencoder),
        folder,
        pixels,
        samples_per_shard,
        text_encoder,
        captions_per_image=captions_per_image,
    )
    _console.print(f"{count} samples of {pixels}x{pixels} pixels -> {folder}", highlight=False)
    return 0


def synthetic(config: Path, settings: _Settings, samples: int = 4096) -> int:
    """Make moments shards of captioned latent patterns, for trying things out without pictures.

    Args:
        config: YAML preset of the run that will train on the shards
        settings: fields of the preset
        samples: how many
    """
    from sd_perf.data.synthetic import write_synthetic_shards

    data = settings.data
    folder, seed = Path(data.path), settings.training.seed or 0
    write_synthetic_shards(folder, samples, data.latent_size, data.context_tokens, settings.model.context_dim, seed)
    _console.print(f"{samples} synthetic samples -> {folder}", highlight=False)
    return 0


def data() -> int:
    """Make shards: `sd-perf data prepare` (from images), `sd-perf data synthetic`."""
    return _run(["data", "--help"])


_COMMANDS: dict[str, Callable[..., int]] = {
    "train": train,
    "sample": sample,
    "export": export,
    "data": data,
    "doctor": doctor,
}
_DATA_COMMANDS: dict[str, Callable[..., int]] = {"prepare": prepare, "synthetic": synthetic}


def main(arguments: list[str] | None = None) -> None:
    """Run a command; exits 0 done, 1 a bug, 2 bad input, 75 stopped and saved."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        code = _run([argument for argument in arguments if argument != "--debug"])
    except UserError as error:
        if debug:
            raise
        print(f"sd-perf: {f'rank {_RANK}: ' if _RANK else ''}{error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # the reader of our output has left; so that Python does not complain at exit:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    commands, prog = _COMMANDS, "sd-perf"
    if arguments[:1] == ["data"]:
        commands, prog, arguments = _DATA_COMMANDS, "sd-perf data", arguments[1:]
    chosen = commands.get(arguments[0]) if arguments else None
    if chosen in (train, prepare, synthetic):
        preset = _preset_of(arguments)
        commands = {**commands, arguments[0]: functools.partial(chosen, settings=preset)}
    return tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog=prog, description=_DESCRIPTION)


def _preset_of(arguments: list[str]) -> Config:
    """The preset that --config names: its fields are the defaults of the options that override them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        path = parser.parse_known_args(arguments)[0].config
    except argparse.ArgumentError:
        path = None  # "--config" without a value: tyro says so
    return load_preset(path) if path else Config()


def _dry_run(settings: Config, ranks: int, as_json: bool) -> int:
    from sd_perf.training.dry_run import dry_run

    facts = dry_run(settings, ranks)
    if as_json:
        return _print_json(facts)
    memory, batch = facts["memory_bytes"], facts["batch"]
    table = Table(show_header=False, title="dry run", title_justify="left")
    table.add_row("parameters", f"{facts['parameters']:,} in {facts['tensors']} tensors")
    table.add_row("forward", f"{facts['gflops_forward']:,.1f} GFLOP per sample")
    table.add_row("forward + backward", f"{facts['gflops_forward_backward']:,.1f} GFLOP per sample")
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items() if name != "total")
    table.add_row("memory per rank", f"{memory['total'] / 2**30:.2f} GiB: {parts}")
    table.add_row(
        "batch",
        f"{batch['global']} samples per step = {batch['ranks']} ranks x {batch['accumulate_steps']} "
        f"accumulation steps x {batch['per_rank_and_pass']}",
    )
    table.add_row("learning rate", f"{facts['learning_rate']:.4g} after {settings.optimizer.warmup_steps} steps")
    table.add_row("steps", f"{facts['steps']:,}, a checkpoint every {facts['steps_between_checkpoints']:,}")
    _console.print(table)
    return 0


def _print_json(value: Any) -> int:
    print(json_module.dumps(value, indent=2))
    return 0
