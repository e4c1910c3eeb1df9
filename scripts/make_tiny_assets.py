"""Makes `assets/tiny/`: the autoencoder, the CLIP model and the feature net of the tiny world,
trained on its scenes.

    python scripts/make_tiny_assets.py                       # everything; about half an hour on one
    CPU core python scripts/make_tiny_assets.py --stages features report

Stages: autoencoder, clip, features (each trains one network and writes its file), report (measures
what is in the folder, and writes report.json there). Runs are seeded. Training sees scenes 0, 1, 2,
... of seed 1; the report measures scenes of seed 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from sd_perf.data.prepare.scenes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    Attributes,
    all_attributes,
    render,
)
from sd_perf.evaluation.feature_net import FeatureNet, read_feature_net
from sd_perf.evaluation.judge import judge
from sd_perf.models.open_clip_library import read_clip
from sd_perf.models.sources import read_autoencoder
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops
from sd_perf.models.vae import AutoencoderConfig, AutoencoderKL

define_missing_torchvision_ops()  # before the first import of open_clip
ASSETS = Path(__file__).parent.parent / "assets" / "tiny"
TRAIN_SEED, TEST_SEED = 1, 2
AUTOENCODER = AutoencoderConfig(channels=8, channel_mult=(1, 2, 4, 8), num_res_blocks=1, groups=4)
AUTOENCODER_STEPS, AUTOENCODER_BATCH = 3500, 8
CLIP_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 128, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
}
CLIP_STEPS, CLIP_BATCH = 700, 64
FEATURES_STEPS, FEATURES_BATCH = 1500, 32
KL_WEIGHT = 1e-3
"""of the mean KL per latent value, beside the mean error per pixel value"""


def scene_batch(start: int, count: int, seed: int) -> tuple[torch.Tensor, list]:
    """Images (count, 3, 64, 64) float32 in [-1, 1], and their scenes."""
    scenes = [render(seed, index) for index in range(start, start + count)]
    images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
    return images.float() / 127.5 - 1, scenes  # channels last, as rendered


def fit(
    parameters, loss_of: Callable[[int], torch.Tensor], steps: int, learning_rate: float, name: str
) -> None:
    """AdamW with a short warm-up and a cosine to 0; `loss_of(step)` is the loss to lower."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3
    )
    warmup, start, losses = 100, time.perf_counter(), []
    for step in range(steps):
        rate = (
            min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps)) * learning_rate
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 250 == 0:
            seconds = time.perf_counter() - start
            print(
                f"{name} {step + 1}/{steps} loss {np.mean(losses[-250:]):.4f} {seconds:.0f} s",
                flush=True,
            )


def train_autoencoder(folder: Path) -> None:
    torch.manual_seed(TRAIN_SEED)
    model = AutoencoderKL(AUTOENCODER).to(
        memory_format=torch.channels_last
    )  # a third faster on a CPU

    def loss_of(step: int) -> torch.Tensor:
        images, _ = scene_batch(step * AUTOENCODER_BATCH, AUTOENCODER_BATCH, TRAIN_SEED)
        mean, log_variance = model.encode(images).chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        decoded = model.decode(mean + (log_variance / 2).exp() * torch.randn_like(mean))
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + KL_WEIGHT * kl

    fit(model.parameters(), loss_of, AUTOENCODER_STEPS, 2e-3, "autoencoder")
    give_unit_variance(model)
    save(model.state_dict(), folder / "autoencoder.safetensors", dataclasses.asdict(AUTOENCODER))


@torch.no_grad()
def give_unit_variance(model: AutoencoderKL) -> None:
    """Rescales every latent channel to variance 1 over scenes, in the 1x1 convolutions at the
    latents' two sides.

    Pictures decode as before. Without it one channel has six times the variance of another, and the
    diffusion model, whose loss sees variance alone, learns the others' content (the colour blue)
    late.
    """
    images, _ = scene_batch(10**6, 512, TRAIN_SEED)
    mean, log_variance = model.encode(images).chunk(2, dim=1)
    deviation = (mean.var(dim=(0, 2, 3)) + log_variance.exp().mean(dim=(0, 2, 3))).sqrt()
    factor, shift = (
        torch.cat([1 / deviation, torch.ones(4)]),
        torch.cat([torch.zeros(4), -2 * deviation.log()]),
    )
    model.quant_conv.weight *= factor[:, None, None, None]
    model.quant_conv.bias.copy_(model.quant_conv.bias * factor + shift)
    model.post_quant_conv.weight *= deviation[None, :, None, None]


def all_captions() -> list[str]:
    return [attributes.caption for attributes in all_attributes()]


def train_clip(folder: Path) -> None:
    """Contrastive training of open_clip's model. Many scenes share a caption, so captions of a
    batch are distinct, and each caption's target is spread over all the pictures that it is true
    of."""
    from open_clip import CLIP, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, SimpleTokenizer

    torch.manual_seed(TRAIN_SEED)
    model = CLIP(**CLIP_CONFIG)
    whole = SimpleTokenizer(context_length=model.context_length)([*all_captions(), ""])
    ids = (
        whole.unique()
    )  # sorted, so that the end token stays the largest, where open_clip looks for it
    # Rows of tokens that never occur would only decay; a small embedding is the same training, ten
    # times faster.
    model.token_embedding = torch.nn.Embedding(len(ids), model.token_embedding.embedding_dim)
    torch.nn.init.normal_(model.token_embedding.weight, std=0.02)
    tokens = torch.searchsorted(ids, whole[:-1])
    number = {caption: i for i, caption in enumerate(all_captions())}
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    )

    def loss_of(step: int) -> torch.Tensor:
        images, scenes = scene_batch(step * CLIP_BATCH, CLIP_BATCH, TRAIN_SEED)
        captions = torch.tensor([number[scene.caption] for scene in scenes])
        distinct, target = captions.unique(return_inverse=True)
        pictures = model.encode_image(((images + 1) / 2 - mean) / std, normalize=True)
        texts = model.encode_text(tokens[distinct], normalize=True)
        logits = (
            model.logit_scale.exp().clamp(max=100) * pictures @ texts.T
        )  # (pictures, distinct captions)
        shared = F.one_hot(target, len(distinct)).float()
        return (
            F.cross_entropy(logits, target)
            + F.cross_entropy(logits.T, shared.T / shared.sum(0)[:, None])
        ) / 2

    fit(model.parameters(), loss_of, CLIP_STEPS, 1e-3, "clip")
    state = model.state_dict()
    state["token_embedding.rows"], state["token_embedding.ids"] = (
        state.pop("token_embedding.weight"),
        ids,
    )
    state.pop("attn_mask", None)
    save(state, folder / "clip.safetensors", CLIP_CONFIG)
    (folder / "clip.json").write_text(json.dumps(CLIP_CONFIG, indent=2) + "\n")


def train_features(folder: Path) -> None:
    """The feature net learns to read from 64 numbers a scene's attributes, its background, and how
    much blur or noise was put on it: a net that has seen clean scenes alone is blind to a little of
    either, and so is its distance."""
    torch.manual_seed(TRAIN_SEED)
    net = FeatureNet().to(memory_format=torch.channels_last)
    heads = torch.nn.ModuleList(torch.nn.Linear(64, count) for count in (4, 2, 2, 4, 2, 3))

    def loss_of(step: int) -> torch.Tensor:
        clean, scenes = scene_batch(step * FEATURES_BATCH, FEATURES_BATCH, TRAIN_SEED)
        blur, noise = (
            float(torch.rand(())) * (step % 2 == which) for which in (0, 1)
        )  # one of the two, by turns
        images = blurred((clean + 1) / 2, 3 * blur + 1e-3)
        features = net((images + 0.3 * noise * torch.randn_like(images)).clamp(0, 1))
        *outputs, levels = [head(features) for head in heads]
        targets = torch.tensor([attribute_numbers(scene.attributes) for scene in scenes]).T
        wanted = torch.stack(
            [clean[:, 0, 0, 0], *(torch.full((FEATURES_BATCH,), level) for level in (blur, noise))],
            1,
        )
        right = sum(
            F.cross_entropy(output, target) for output, target in zip(outputs, targets, strict=True)
        )
        return right + 5 * F.mse_loss(levels, wanted)

    fit([*net.parameters(), *heads.parameters()], loss_of, FEATURES_STEPS, 1e-3, "features")
    save(net.state_dict(), folder / "features.safetensors", dataclasses.asdict(net.config))


def attribute_numbers(attributes: Attributes) -> list[int]:
    colours = list(COLOURS)
    first = [colours.index(attributes.first_colour), SHAPES.index(attributes.first_shape)]
    second = [colours.index(attributes.second_colour), SHAPES.index(attributes.second_shape)]
    return [*first, RELATIONS.index(attributes.relation), *second]


def save(state: dict[str, torch.Tensor], path: Path, config: dict, **facts: object) -> None:
    """Tensors as float16 (whole numbers as they are); config as JSON in the file's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {
        name: value.half() if value.is_floating_point() else value for name, value in state.items()
    }
    made = {"torch": torch.__version__, "seed": TRAIN_SEED, **facts}
    metadata = {"config": json.dumps(config), **{key: str(value) for key, value in made.items()}}
    save_file(
        {name: value.contiguous() for name, value in halves.items()},
        path,
        {"format": "pt", **metadata},
    )


def report(folder: Path) -> None:
    """Measures the files on fresh scenes, and writes the numbers as JSON beside them."""
    images, scenes = scene_batch(0, 1024, TEST_SEED)
    numbers = {
        "bytes": {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    }
    numbers |= measure_autoencoder(folder, images[:512], scenes[:512])
    numbers |= measure_clip(folder, images[:256], [scene.caption for scene in scenes[:256]])
    numbers |= {"frechet_distance_n_512": measure_features(folder, (images + 1) / 2)}
    (folder / "report.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(json.dumps(numbers, indent=2))


@torch.no_grad()
def measure_autoencoder(folder: Path, images: torch.Tensor, scenes: list) -> dict:
    model = read_autoencoder(folder / "autoencoder.safetensors")
    mean, log_variance = model.encode(images).chunk(2, dim=1)
    decoded = model.decode(mean).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (decoded - images).square().mean(dim=(1, 2, 3)))
    pictures = ((decoded + 1) / 2).permute(0, 2, 3, 1).numpy()
    accepted = [
        judge(picture, scene.caption) for picture, scene in zip(pictures, scenes, strict=True)
    ]
    deviation = (mean.var() + log_variance.exp().mean()).sqrt()
    return {
        "psnr_db": float(psnr.mean()),
        "judge_accepts_reconstructions": float(np.mean(accepted)),
        "latent_mean": float(mean.mean()),
        "latent_scale": float(1 / deviation),
        "posterior_std_over_latent_std": float((log_variance / 2).exp().mean() / deviation),
    }


@torch.no_grad()
def measure_clip(folder: Path, images: torch.Tensor, captions: list[str]) -> dict:
    """Both ways; a scene's caption is right, whichever of the scenes that share it is meant."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    model, tokenizer = read_clip("clip", str(folder / "clip.json"), folder / "clip.safetensors")
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    )
    pictures = model.encode_image(((images + 1) / 2 - mean) / std, normalize=True)
    similarity = pictures @ model.encode_text(tokenizer(all_captions()), normalize=True).T
    own = torch.tensor([all_captions().index(caption) for caption in captions])
    present = own.unique()
    return {
        "retrieval_picture_to_caption_r1_of_96": float(
            (similarity.argmax(1) == own).float().mean()
        ),
        "retrieval_caption_to_picture_p1_of_256": float(
            (own[similarity.argmax(0)[present]] == present).float().mean()
        ),
        "clip_score_own_caption": float(similarity[torch.arange(len(own)), own].mean()),
        "clip_score_shuffled_caption": float(
            similarity[torch.arange(len(own)), own.roll(1)].mean()
        ),
    }


@torch.no_grad()
def measure_features(folder: Path, images: torch.Tensor) -> dict:
    """Frechet distance between 512 scenes and 512 others, the latter as they are, blurred, or with
    noise."""
    net, (reference, others) = read_feature_net(folder / "features.safetensors"), images.chunk(2)
    noise = torch.randn(others.shape, generator=torch.Generator().manual_seed(0))
    changed = {"unchanged": others}
    changed |= {f"blur sigma {sigma}": blurred(others, sigma) for sigma in (1, 2, 4)}
    changed |= {
        f"noise sigma {sigma}": (others + sigma * noise).clamp(0, 1) for sigma in (0.1, 0.2, 0.4)
    }
    expected = net(reference)
    return {name: frechet_distance(expected, net(pictures)) for name, pictures in changed.items()}


def blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of sigma pixels; borders are repeated."""
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-torch.arange(-radius, radius + 1).float().square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(images, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Between Gaussians of the features (n, D): |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))."""
    a, b = a.double(), b.double()
    s, t = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(s)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ t @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + s.trace() + t.trace() - 2 * cross)


STAGES = {
    "autoencoder": train_autoencoder,
    "clip": train_clip,
    "features": train_features,
    "report": report,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--output", type=Path, default=ASSETS)
    options = parser.parse_args()
    for stage in options.stages:
        start = time.perf_counter()
        STAGES[stage](options.output)
        print(
            f"{stage}: {(time.perf_counter() - start) / 60:.1f} minutes on {platform.machine()}",
            flush=True,
        )


if __name__ == "__main__":
    main()
