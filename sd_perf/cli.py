"""The command line: `sd-perf train | evaluate | sample | export | data | mlperf | report | estimate
| doctor`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json as json_module
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from sd_perf.errors import ConfigError, UserError

try:
    import tyro
    from rich.console import Console

    from sd_perf.presets import load_preset
except ImportError as missing:
    sys.exit(f"sd-perf: the command line needs {missing.name}; pip install 'sd-perf[cli]'")

from sd_perf.config import Config, SamplingConfig

_INTERRUPTED = 75  # EX_TEMPFAIL: saved; run me again
_CTRL_C = 130  # 128 + SIGINT, as shells have it
_RANK, _LOCAL_RANK = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
_Run = tyro.conf.Positional[Path]
_Target = Literal["here", "a100", "h100", "h200", "b200"]
_Settings = Annotated[Config, tyro.conf.arg(name="")]
_console = Console(quiet=_RANK > 0)
_DESCRIPTION = (
    "A fast, checkable trainer of the MLPerf text-to-image benchmark (Stable Diffusion v2). "
    "Bad input is one sentence and exit code 2; --debug, with any command, adds the traceback."
)


def train(
    config: Path,
    settings: _Settings,
    resume: bool = False,
    fresh: bool = False,
    dry_run: bool = False,
    ranks: int = 1,
    target: _Target = "here",
    json: bool = False,
) -> int:
    """Train a UNet. Every field of the preset can be overridden.

    Args:
        config: YAML preset, such as configs/train_512_moments.yaml
        settings: fields of the preset
        resume: continue the run in its folder from its newest checkpoint (begin it where there is
            none)
        fresh: move a complete run in the folder aside (runs/smoke becomes runs/smoke.1, ...) and
            begin anew
        dry_run: print parameters, FLOPs, memory, batch arithmetic and kernels of the run, and exit
        ranks: processes that the dry run counts with
        target: GPU that the dry run chooses kernels for
        json: print the dry run as JSON
    """
    if dry_run:
        return _dry_run(settings, ranks, target, json)
    from sd_perf.distributed.world import start_world, stop_world
    from sd_perf.training.launch import launch

    world = start_world(settings.training.device)
    try:
        stop_reason = launch(settings, world, resume, fresh, _console)
    finally:
        stop_world()
    if stop_reason is None:
        return 0
    again = f"sd-perf train --config {config} --run.dir {settings.run.dir} --resume"
    _console.print(
        f"stopped by {stop_reason} and saved; continue with:\n  {again}",
        soft_wrap=True,
        highlight=False,
    )
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

    from sd_perf.evaluation.generate import generate, picture_paths, save_pictures
    from sd_perf.models.build import build_sampling_unet, build_text_encoder
    from sd_perf.models.sources import newest_checkpoint, read_decoder, read_unet
    from sd_perf.models.weight_files import load_into
    from sd_perf.runs.folder import read_run_config

    if not prompt:
        raise UserError("--prompt: give one or more prompts")
    checkpoint, run = newest_checkpoint(source)
    config = read_run_config(run)
    sampling = SamplingConfig(
        steps=config.sampling.steps if steps is None else steps,
        guidance_scale=config.sampling.guidance_scale if guidance_scale is None else guidance_scale,
    )
    config = dataclasses.replace(config, sampling=sampling)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet = build_sampling_unet(config, device)
    load_into(unet, read_unet(checkpoint)[0], "the UNet", checkpoint)
    decode, text_encoder = read_decoder(autoencoder), build_text_encoder(config, device)
    paths = picture_paths(list(prompt), output)
    save_pictures(generate(unet, text_encoder, decode, list(prompt), config, seed), paths)
    _console.print(*paths, sep="\n", highlight=False, soft_wrap=True)
    return 0


def export(source: Path, output: Path, format: Literal["ldm", "diffusers"] = "ldm") -> int:
    """Write the UNet's weights for other tools.

    Args:
        source: run folder (its newest checkpoint), checkpoint, folder exported for diffusers, or
            LDM .ckpt/.safetensors
        output: file (ldm) or folder (diffusers) to write; must not exist
        format: ldm: one safetensors file in the names of Stable Diffusion checkpoints; diffusers: a
            folder with unet/
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


def report(run: _Run) -> int:
    """Write RUN/report.html: curves, scores, pictures, verdict and configuration of a run in one
    file to pass on.

    Args:
        run: run folder
    """
    from sd_perf.tools.report.page import write_report

    _console.print(write_report(run), highlight=False, soft_wrap=True)
    return 0


def evaluate(run: _Run) -> int:
    """Score every checkpoint of a run that has no scores yet: FID, CLIP score; adds them to the
    MLPerf log.

    Args:
        run: run folder; its config's section evaluation says with what
    """
    import torch

    from sd_perf.evaluation.evaluate import evaluate_run, scores_table
    from sd_perf.runs.folder import read_run_config

    config = read_run_config(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.training.cpu_threads is not None:
        torch.set_num_threads(config.training.cpu_threads)
    evaluate_run(
        run, config, device, functools.partial(_console.print, highlight=False, soft_wrap=True)
    )
    _console.print(scores_table(run))
    return 0


def check(run: _Run) -> int:
    """Run the official compliance checker on a run's MLPerf log; exits 1 where the log fails.

    Args:
        run: run folder, or an MLPerf log
    """
    from sd_perf.mlperf.check import check as check_log
    from sd_perf.mlperf.log import LOG_NAME

    verdict = check_log(run / LOG_NAME if run.is_dir() else run)
    _console.print(str(verdict), highlight=False, soft_wrap=True)
    return 0 if verdict.passed else 1


def estimate(
    config: Path,
    settings: _Settings,
    gpu: str = "h100",
    batch: int = 64,
    ranks: int = 1,
    png: Path | None = None,
    json: bool = False,
) -> int:
    """Predict time and memory of a training step on a GPU that need not be here: where the time
    goes, and what fits.

    All figures are of bfloat16, and a floor of time. The fused way is what the ops of sd_kernels
    amount to in one CUDA graph, not a step that the trainer has yet.

    Args:
        config: YAML preset
        settings: fields of the preset
        gpu: a100, h100, h200 or b200
        batch: samples of a step
        ranks: GPUs that share the optimizer state of the MLPerf submission's way
        png: file to draw the ms per sample to, by op
        json: print JSON
    """
    from sd_perf.tools.estimate.page import draw, tables
    from sd_perf.tools.estimate.predict import predict

    facts = predict(settings, gpu, batch, ranks)
    if png is not None:
        draw(facts, png)
    if json:
        return _print_json(facts)
    _page().print(*tables(facts), sep="\n", highlight=False)
    return 0


def parity(
    config: Path,
    settings: _Settings,
    level: tuple[Literal["op", "block", "unet", "grad", "step", "trajectory", "world"], ...] = (),
    json: bool = False,
) -> int:
    """Compare the fast network with the plain one, level by level; exits 1 where one is further off
    than it may be.

    Writes parity.json and parity.html to the folder <run.dir>.parity. Runs with an MLPerf log need
    a green record.

    Args:
        config: YAML preset
        settings: fields of the preset
        level: levels to compare (default: all but trajectory, which takes minutes, and world, six
            whole runs)
        json: print the record as JSON
    """
    from sd_perf.runs.parity_record import USUAL
    from sd_perf.tools.parity.page import screen
    from sd_perf.tools.parity.run import run_parity

    record, folder = run_parity(
        settings, level or USUAL, functools.partial(print, file=sys.stderr, flush=True)
    )
    if json:
        _print_json(record)
    else:
        _page().print(
            *screen(record), f"{folder}/parity.html", sep="\n", highlight=False, soft_wrap=True
        )
    return 0 if record["ok"] else 1


def doctor(target: _Target = "here", json: bool = False) -> int:
    """Say what is installed, what is missing and for what, what torch can compute on, and which
    kernels can be had.

    Args:
        target: GPU that kernels are chosen for
        json: print JSON
    """
    from sd_perf.tools.doctor import examine, screen

    report = examine(target)
    if json:
        return _print_json(report)
    _page().print(*screen(report), sep="\n", highlight=False)
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
    """Make moments shards (and text states, where data.context is precomputed) from a folder of
    captioned images.

    The shards go to data.path; the images are resized to 8 x data.latent_size pixels.

    Args:
        config: YAML preset of the run that will train on the shards
        settings: fields of the preset
        images: folder of images with a captions.jsonl, or of raw shards (*.tar of .jpg, .txt,
            .json)
        autoencoder: file that holds the encoder: .onnx, or .ckpt or .safetensors in LDM names
        captions: captions.jsonl with `file` and `captions` (default: in the images' folder or its
            parent)
        captions_per_image: samples made of each image, one per caption
        samples_per_shard: samples per tar file
    """
    import torch

    from sd_perf.data.prepare.photographs import prepare_moments
    from sd_perf.data.prepare.raw_shards import read_images
    from sd_perf.models.build import build_text_encoder
    from sd_perf.models.sources import read_encoder

    _require("--captions-per-image", captions_per_image, captions_per_image >= 1, "at least 1")
    _require(
        "--samples-per-shard", samples_per_shard, 1 <= samples_per_shard <= 10_000, "1 to 10000"
    )
    folder = settings.data.path
    settings.data.require(bool(folder), "path", "the folder to write the shards to")
    samples = read_images(images, captions, settings.data.allow_empty_captions)
    precomputed = settings.data.context == "precomputed"
    text_encoder = build_text_encoder(settings, torch.device("cpu")) if precomputed else None
    pixels, encode = 8 * settings.data.latent_size, read_encoder(autoencoder)
    count = prepare_moments(
        samples,
        encode,
        folder,
        pixels,
        samples_per_shard,
        text_encoder,
        captions_per_image=captions_per_image,
    )
    _console.print(f"{count} samples of {pixels}x{pixels} pixels -> {folder}", highlight=False)
    return 0


def scenes(
    output: Path,
    samples: int = 4096,
    seed: int = 1,
    uncaptioned_every: int = 0,
    shards: bool = False,
) -> int:
    """Draw captioned 64x64 pictures of two coloured shapes: the tiny world, which trains in minutes
    on a CPU.

    Args:
        output: new folder
        samples: how many pictures
        seed: of the pictures
        uncaptioned_every: each n-th picture gets the empty caption, which guidance needs; 0: none
            does
        shards: raw shards (tar files of images and captions) instead of PNG files with a
            captions.jsonl
    """
    from sd_perf.data.prepare.scenes import write_scene_shards, write_scenes

    _require("--samples", samples, samples >= 1, "at least 1")
    _require("--uncaptioned-every", uncaptioned_every, uncaptioned_every >= 0, "0 or more")
    write = write_scene_shards if shards else write_scenes
    write(output, samples, seed, uncaptioned_every)
    _console.print(f"{samples} scenes -> {output}", highlight=False, soft_wrap=True)
    return 0


def statistics(config: Path, settings: _Settings, images: Path) -> int:
    """Write the statistics that FID compares with (evaluation.statistics) from a folder of
    captioned images.

    Args:
        config: YAML preset of the run
        settings: fields of the preset
        images: folder of images with a captions.jsonl, or of raw shards (*.tar of .jpg, .txt,
            .json)
    """
    from sd_perf.evaluation.evaluate import write_statistics

    count = write_statistics(images, settings)
    _console.print(
        f"statistics of {count} images -> {settings.evaluation.statistics}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def data() -> int:
    """Make data: `sd-perf data prepare` (shards from images), `scenes`, `statistics`."""
    return _run(["data", "--help"])


def mlperf() -> int:
    """MLPerf logs: `sd-perf mlperf check`."""
    return _run(["mlperf", "--help"])


_COMMANDS: dict[str, Callable[..., int]] = {
    "train": train,
    "evaluate": evaluate,
    "sample": sample,
    "export": export,
    "data": data,
    "mlperf": mlperf,
    "report": report,
    "estimate": estimate,
    "parity": parity,
    "doctor": doctor,
}
_GROUPS: dict[str, dict[str, Callable[..., int]]] = {
    "data": {"prepare": prepare, "scenes": scenes, "statistics": statistics},
    "mlperf": {"check": check},
}


def main(arguments: list[str] | None = None) -> None:
    """Run a command; exits 0 done, 1 a bug, 2 bad input, 75 stopped and saved, 130 stopped by
    Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    logging.basicConfig(
        level=logging.INFO if debug else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    code: str | int | None
    try:
        code = _run([argument for argument in arguments if argument != "--debug"])
    except SystemExit as leaving:  # tyro has said why, or another rank will
        code = leaving.code
    except _bad_input() as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, ConfigError):  # all have read it, one of a node says it
            _let_first_rank_speak()
        print(f"sd-perf: {f'rank {_RANK}: ' if _RANK else ''}{error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        if not _RANK:
            print("sd-perf: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(_CTRL_C)
    except (
        BrokenPipeError
    ):  # the reader of our output has left; so that Python does not complain at exit:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    if code:
        _let_first_rank_speak()
    sys.exit(code)


def _let_first_rank_speak() -> None:
    """Wait to be ended: a launcher ends all processes of a node when one fails, were it before
    another has spoken."""
    if _LOCAL_RANK:
        time.sleep(10)


def _bad_input() -> tuple[type[Exception], ...]:
    """The errors that are one sentence. Only code that loaded the kernels, and torch with them,
    raises theirs."""
    kernels = sys.modules.get("sd_kernels.errors")
    return (UserError, kernels.KernelError) if kernels else (UserError,)


def _run(arguments: list[str]) -> int:
    commands, prog = _COMMANDS, "sd-perf"
    if arguments and arguments[0] in _GROUPS:
        commands, prog, arguments = _GROUPS[arguments[0]], f"sd-perf {arguments[0]}", arguments[1:]
    chosen = commands.get(arguments[0]) if arguments else None
    if chosen in (train, estimate, parity, prepare, statistics):
        preset = _preset_of(arguments)
        commands = {**commands, arguments[0]: functools.partial(chosen, settings=preset)}
    return tyro.extras.subcommand_cli_from_dict(
        commands,
        args=arguments,
        prog=prog,
        description=_DESCRIPTION,
        console_outputs=_LOCAL_RANK == 0,
    )


def _preset_of(arguments: list[str]) -> Config:
    """The preset that --config names: its fields are the defaults of the options that override
    them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        path = parser.parse_known_args(arguments)[0].config
    except argparse.ArgumentError:
        path = None  # "--config" without a value: tyro says so
    return load_preset(path) if path else Config()


def _dry_run(settings: Config, ranks: int, target: _Target, as_json: bool) -> int:
    from sd_perf.tools.estimate.dry_run import as_table, dry_run
    from sd_perf.training.kernels_table import kernels_table
    from sd_perf.training.launch import require_allowed

    _require("--ranks", ranks, ranks >= 1, "at least 1")
    require_allowed(settings)
    facts = dry_run(settings, ranks, target)
    if as_json:
        return _print_json(facts)
    _page().print(as_table(facts), *kernels_table(facts["target"], facts["kernels"]))
    return 0


def _require(option: str, value: Any, ok: bool, right: str) -> None:
    """UserError with an option's value and what would be right, unless it is ok."""
    if not ok:
        raise UserError(f"{option}: {value!r} cannot be used; it must be {right}")


def _page() -> Console:
    """The console; 100 columns wide, not 80, where the output is no terminal."""
    return _console if _console.is_terminal else Console(width=100)


def _print_json(value: Any) -> int:
    print(json_module.dumps(value, indent=2))
    return 0
