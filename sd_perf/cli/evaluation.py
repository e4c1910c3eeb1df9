"""`sd-perf evaluate` and `sd-perf sample`: pictures of a run, with scores or from your prompts."""

from __future__ import annotations

from pathlib import Path

from sd_perf.cli.console import CONSOLE, print_plain
from sd_perf.cli.options import RunFolder, require_seed


def evaluate(run: RunFolder) -> int:
    """Score every checkpoint of a run that has no scores yet: FID, CLIP score; adds them to the
    MLPerf log.

    Args:
        run: run folder; its config's section evaluation says with what
    """
    import torch

    from sd_perf.evaluation.evaluate import evaluate_run, scores_table
    from sd_perf.runs.folder import read_run_config
    from sd_perf.runs.lock import RunLock

    config = read_run_config(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.training.cpu_threads is not None:
        torch.set_num_threads(config.training.cpu_threads)
    with RunLock() as lock:
        lock.take(run)
        evaluate_run(run, config, device, print_plain)
    CONSOLE.print(scores_table(run))
    return 0


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
    )
    print_plain(*paths)
    return 0
