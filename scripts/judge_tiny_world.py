"""Draws pictures of tiny-world captions with a run's newest checkpoint, and counts those that the judge accepts.

    python scripts/judge_tiny_world.py --source runs/tiny_world --output pictures.png

Prints JSON: the share of pictures that show their own caption (`honoured`) and that of pictures that show another
picture's caption (`shuffled`: pairs whose captions are the same by chance are left out).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sd_perf.config import SamplingConfig
from sd_perf.data.prepare.scenes import render
from sd_perf.evaluation.generate import generate
from sd_perf.evaluation.judge import describe, judge
from sd_perf.models.build import build_text_encoder, build_unet
from sd_perf.models.sources import newest_checkpoint, read_decoder, read_unet
from sd_perf.models.weight_files import load_into
from sd_perf.training.run_folder import read_run_config

ASSETS = Path(__file__).parent.parent / "assets" / "tiny"
PROMPT_SEED = 3
"""of the scenes whose captions are drawn; training and the assets see other seeds"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="run folder, or one of its checkpoints")
    parser.add_argument("--autoencoder", type=Path, default=ASSETS / "autoencoder.safetensors")
    parser.add_argument("--num", type=int, default=256, help="pictures")
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps")
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--output", type=Path, help="PNG with the first 64 pictures")
    options = parser.parse_args()

    checkpoint, run = newest_checkpoint(options.source)
    sampling = SamplingConfig(options.steps, options.guidance_scale)
    config = dataclasses.replace(read_run_config(run), sampling=sampling)
    cpu = torch.device("cpu")
    unet = build_unet(config.model, 0, cpu)
    load_into(unet, read_unet(checkpoint)[0], "the UNet", checkpoint)
    decode, text_encoder = read_decoder(options.autoencoder), build_text_encoder(config, cpu)
    prompts = [render(PROMPT_SEED, index).caption for index in range(options.num)]
    pictures = generate(unet.eval(), text_encoder, decode, prompts, config, seed=0, batch_size=32)
    images = pictures.permute(0, 2, 3, 1).numpy()
    others = zip(images, prompts, prompts[1:] + prompts[:1], strict=True)
    shuffled = [judge(image, other) for image, prompt, other in others if prompt != other]
    shares = {
        "honoured": float(np.mean([judge(image, prompt) for image, prompt in zip(images, prompts, strict=True)])),
        "shuffled": float(np.mean(shuffled)),
        "is_a_scene": float(np.mean([describe(image) is not None for image in images])),
    }
    print(json.dumps({"n": options.num, **shares}))
    if options.output:
        rows = [np.concatenate(list(images[i : i + 8]), axis=1) for i in range(0, min(64, options.num) // 8 * 8, 8)]
        Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8)).save(options.output)


if __name__ == "__main__":
    main()
