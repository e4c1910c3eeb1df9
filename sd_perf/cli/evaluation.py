"""`sd-perf evaluate`, `score` and `sample`: pictures, their scores, and those of your prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from sd_perf.cli.console import CONSOLE, print_json, print_plain
from sd_perf.cli.options import RunFolder, require_between, require_seed
from sd_perf.cli.progress import progress
from sd_perf.errors import UserError

MAX_WAIT_MINUTES = 100_000


def evaluate(
    run: RunFolder,
    checkpoint: int | None = None,
    num_prompts: int | None = None,
    keep_pictures: Path | None = None,
    until_passed: bool = False,
    wait: float | None = None,
    ema: bool = False,
    precision: Literal["fp32", "bf16"] | None = None,
) -> int:
    """Score the checkpoints of a run that have no scores yet: FID, CLIP score; adds them to the
    MLPerf log.

    Under torchrun or srun the prompts are divided over all processes. An evaluation that was
    stopped goes on from the pictures that it had drawn.

    Args:
        run: run folder; its config's section evaluation says with what
        checkpoint: position of the only checkpoint to score, in samples
        num_prompts: draw so few of the prompts, for a first look that is printed and not recorded
        keep_pictures: folder for all pictures, named by their place among the prompts
        until_passed: stop after the first checkpoint that passes both targets
        wait: score checkpoints of a run that is under way as they come, and end with it, or when
            none came and nobody trained for so many minutes
        ema: score the average of the weights (training.ema_decay), into scores_ema.jsonl alone
        precision: of drawing and of FID's network (default: the run's evaluation.precision); a run
            that has scores of another precision is refused
    """
    import torch

    from sd_perf.distributed.world import start_world, stop_world
    from sd_perf.evaluation.evaluate import Wanted, evaluate_run, scores_table
    from sd_perf.runs.folder import read_run_config
    from sd_perf.runs.lock import EVALUATION_LOCK_NAME, RunLock
    from sd_perf.sinks.feed import send_evaluation

    config = read_run_config(run)
    if num_prompts is not None:
        require_between("--num-prompts", num_prompts, 2, config.evaluation.num_prompts)
    if wait is not None and not 0 < wait < MAX_WAIT_MINUTES:
        raise UserError(f"--wait: {wait} cannot be used; it is minutes, above 0 and below 100,000")
    wanted = Wanted(checkpoint, num_prompts, until_passed, wait, keep_pictures, ema, precision)
    world = start_world("auto", *config.run.patience)
    if config.training.cpu_threads is not None:
        torch.set_num_threads(config.training.cpu_threads)
    tell = print_plain if world.is_main else lambda line: None
    with RunLock(EVALUATION_LOCK_NAME) as evaluating, RunLock() as writing:
        world.on_main(lambda: evaluating.take(run))
        if wait is None:
            world.on_main(lambda: writing.take(run))
        evaluate_run(run, config, world, tell, wanted)
        # A run that trains sends its scores itself.
        sends = world.is_main and config.logging.sinks
        if sends and (wait is None or RunLock().is_free(run)):
            send_evaluation(run, config, tell)
    if world.is_main:
        CONSOLE.print(scores_table(run, ema))
    world.part()
    stop_world(world)
    return 0


def score(
    images: Path,
    statistics: Path | None = None,
    features: Path | None = None,
    captions: Path | None = None,
    clip_weights: Path | None = None,
    clip_model: str = "ViT-H-14",
    workers: int = 8,
    json: bool = False,
) -> int:
    """Score any folder of pictures as the benchmark does: FID against real pictures, CLIP score
    with captions.

    Pictures are taken as they are stored. FID is pytorch-fid's to rounding.

    Args:
        images: folder of the pictures
        statistics: .npz of the real pictures (mu, sigma), or a folder of real pictures
        features: weights of FID's Inception (pt_inception-2015-12-05-6726825d.pth)
        captions: captions.jsonl that names the pictures, or a .tsv with a column `caption`, a row
            for each picture in the order of their names
        clip_weights: weights of the CLIP model (open_clip_pytorch_model.bin of ViT-H-14)
        clip_model: open_clip's name of the CLIP model, or the path of its JSON
        workers: threads that decode
        json: print JSON
    """
    import torch

    from sd_perf.evaluation.score_folder import FEW, Scoring, score_folder

    require_between("--workers", workers, 1, 1024)
    for one, other in (
        (("--statistics", statistics), ("--features", features)),
        (("--captions", captions), ("--clip-weights", clip_weights)),
    ):
        given = [name for name, value in (one, other) if value is not None]
        if len(given) == 1:
            missing = ({one[0], other[0]} - set(given)).pop()
            raise UserError(f"{given[0]} needs {missing}, too")
    if statistics is None and captions is None:
        raise UserError("name what to score: --statistics and --features, --captions, or both")
    scoring = Scoring(features, statistics, captions, clip_model, clip_weights, workers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with progress("pictures") as report:
        scores = score_folder(images, scoring, device, report)
    if json:
        print_json(dataclasses.asdict(scores))
        return 0
    told = [f"FID {scores.fid:.4f}"] if scores.fid is not None else []
    told += [f"CLIP score {scores.clip:.4f}"] if scores.clip is not None else []
    print_plain(f"{', '.join(told)} (n = {scores.n:,})")
    if scores.fid is not None and scores.n < FEW:
        print_plain(f"FID of fewer than {FEW:,} pictures is biased: compare it at equal n alone")
    return 0


def sample(
    source: Path,
    prompt: tuple[str, ...],
    output: Path,
    autoencoder: Path | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    ema: bool = False,
) -> int:
    """Draw pictures from prompts with the weights of a run (DDIM).

    Args:
        source: run folder (its newest checkpoint) or one of its checkpoints
        prompt: one or more prompts
        output: folder for the PNG files
        autoencoder: file that holds the decoder: .onnx, or .ckpt or .safetensors in LDM names
            (default: the run's evaluation.autoencoder)
        steps: DDIM steps (default: the run's sampling.steps)
        guidance_scale: 1 is no guidance (default: the run's sampling.guidance_scale)
        seed: of the initial noise
        ema: draw with the moving average of the weights, which training.ema_decay keeps
    """
    from sd_perf.evaluation.draw import draw_prompts

    require_seed("--seed", seed)
    paths = draw_prompts(
        source,
        list(prompt),
        autoencoder,
        output,
        steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        ema=ema,
    )
    print_plain(*paths)
    return 0
