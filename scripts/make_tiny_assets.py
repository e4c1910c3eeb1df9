"""Trains the networks of the tiny world on its scenes, and writes them to `assets/tiny/`.

    python scripts/make_tiny_assets.py
    python scripts/make_tiny_assets.py --stages features report

The first takes about half an hour on one CPU core. Stages: autoencoder, clip and features each
train one network and write its file; report measures what is in the folder and writes report.json
there. Runs are seeded. Training sees scenes 0, 1, 2, ... of seed 1, the report scenes of seed 2.
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
from sd_perf.models.readers import read_autoencoder
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
"""weight of the mean KL divergence per latent value; the mean error per pixel value has weight 1"""


def scene_batch(start: int, count: int, seed: int) -> tuple[torch.Tensor, list]:
    """Images (count, 3, 64, 64) float32 in [-1, 1] of scenes from `start` on, and the scenes."""
    scenes = [render(seed, index) for index in range(start, start + count)]
    # The permuted tensor stays in channels_last layout, in which CPU convolutions are faster.
    images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
    return images.float() / 127.5 - 1, scenes


def fit(
    parameters, loss_of: Callable[[int], torch.Tensor], steps: int, learning_rate: float, name: str
) -> None:
    """Train with AdamW, a short linear warm-up and a cosine to 0; `loss_of(step)` is the loss."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3
    )
    warmup, start, losses = 100, time.perf_counter(), []
    for step in range(steps):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        rate = min((step + 1) / warmup, cosine) * learning_rate
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
    """Train the autoencoder on L1 and squared error of the pixels and the KL divergence."""
    torch.manual_seed(TRAIN_SEED)
    # channels_last is a third faster on a CPU
    model = AutoencoderKL(AUTOENCODER).to(memory_format=torch.channels_last)

    def loss_of(step: int) -> torch.Tensor:
        images, _ = scene_batch(step * AUTOENCODER_BATCH, AUTOENCODER_BATCH, TRAIN_SEED)
        mean, log_variance = model.encode(images).chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        decoded = model.decode(mean + (log_variance / 2).exp() * torch.randn_like(mean))
        # of the posterior from the standard normal: Kingma & Welling (arXiv 1312.6114), appendix B
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + KL_WEIGHT * kl

    fit(model.parameters(), loss_of, AUTOENCODER_STEPS, 2e-3, "autoencoder")
    give_unit_variance(model)
    save(model.state_dict(), folder / "autoencoder.safetensors", dataclasses.asdict(AUTOENCODER))


@torch.no_grad()
def give_unit_variance(model: AutoencoderKL) -> None:
    """Rescale every latent channel to variance 1 over scenes; pictures decode as before.

    The factors go into the 1x1 convolutions before and after the latents. Without them one channel
    has six times the variance of another. The diffusion loss weighs channels by their variance, so
    the model would learn the content of the others (the colour blue) late.
    """
    images, _ = scene_batch(10**6, 512, TRAIN_SEED)
    mean, log_variance = model.encode(images).chunk(2, dim=1)
    deviation = (mean.var(dim=(0, 2, 3)) + log_variance.exp().mean(dim=(0, 2, 3))).sqrt()
    # Means are divided by the deviation, log-variances lowered by the log of its square.
    factor = torch.cat([1 / deviation, torch.ones(4)])
    shift = torch.cat([torch.zeros(4), -2 * deviation.log()])
    model.quant_conv.weight *= factor[:, None, None, None]
    model.quant_conv.bias.copy_(model.quant_conv.bias * factor + shift)
    model.post_quant_conv.weight *= deviation[None, :, None, None]


def all_captions() -> list[str]:
    """The 96 captions of the tiny world."""
    return [attributes.caption for attributes in all_attributes()]


def train_clip(folder: Path) -> None:
    """Train open_clip's model contrastively (Radford et al. 2021, arXiv 2103.00020, figure 3).

    Many scenes share a caption. So each caption of a batch is taken once, and its target is spread
    evenly over all the pictures that show it.
    """
    from open_clip import CLIP, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, SimpleTokenizer

    torch.manual_seed(TRAIN_SEED)
    model = CLIP(**CLIP_CONFIG)
    whole = SimpleTokenizer(context_length=model.context_length)([*all_captions(), ""])
    # unique() sorts, so the end token stays the largest: open_clip finds it by argmax.
    ids = whole.unique()
    # The embedding is trained for the tokens that occur. The other 49,000 rows would only decay,
    # and make training ten times slower.
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
        # (pictures, distinct captions)
        logits = model.logit_scale.exp().clamp(max=100) * pictures @ texts.T
        shared = F.one_hot(target, len(distinct)).float()
        picture_loss = F.cross_entropy(logits, target)
        caption_loss = F.cross_entropy(logits.T, shared.T / shared.sum(0)[:, None])
        return (picture_loss + caption_loss) / 2

    fit(model.parameters(), loss_of, CLIP_STEPS, 1e-3, "clip")
    state = model.state_dict()
    # sd_perf.models.open_clip_library puts the rows back into an embedding of all tokens.
    state["token_embedding.rows"] = state.pop("token_embedding.weight")
    state["token_embedding.ids"] = ids
    state.pop("attn_mask", None)
    save(state, folder / "clip.safetensors", CLIP_CONFIG)
    (folder / "clip.json").write_text(json.dumps(CLIP_CONFIG, indent=2) + "\n")


def train_features(folder: Path) -> None:
    """Train the feature net so that its 64 features tell what a Fréchet distance should notice.

    Linear heads on the features must predict a scene's attributes, its background, and how much
    blur or noise was added. A net trained on clean scenes alone does not notice a little of either.
    """
    torch.manual_seed(TRAIN_SEED)
    net = FeatureNet().to(memory_format=torch.channels_last)
    # the counts of `attribute_numbers`, then three levels: background, blur, noise
    heads = torch.nn.ModuleList(torch.nn.Linear(64, count) for count in (4, 2, 2, 4, 2, 3))

    def loss_of(step: int) -> torch.Tensor:
        clean, scenes = scene_batch(step * FEATURES_BATCH, FEATURES_BATCH, TRAIN_SEED)
        # By turns blur and noise. Both are drawn at every step: the seeded stream depends on it.
        blur, noise = (float(torch.rand(())) * (step % 2 == which) for which in (0, 1))
        images = blurred((clean + 1) / 2, 3 * blur + 1e-3)
        features = net((images + 0.3 * noise * torch.randn_like(images)).clamp(0, 1))
        *outputs, levels = [head(features) for head in heads]
        targets = torch.tensor([attribute_numbers(scene.attributes) for scene in scenes]).T
        background = clean[:, 0, 0, 0]  # no shape reaches the corner
        added = [torch.full((FEATURES_BATCH,), level) for level in (blur, noise)]
        pairs = zip(outputs, targets, strict=True)
        attribute_loss = sum(F.cross_entropy(output, target) for output, target in pairs)
        level_loss = F.mse_loss(levels, torch.stack([background, *added], 1))
        return attribute_loss + 5 * level_loss

    fit([*net.parameters(), *heads.parameters()], loss_of, FEATURES_STEPS, 1e-3, "features")
    save(net.state_dict(), folder / "features.safetensors", dataclasses.asdict(net.config))


def attribute_numbers(attributes: Attributes) -> list[int]:
    """Class numbers: first colour and shape, relation, second colour and shape."""
    colours = list(COLOURS)
    first = [colours.index(attributes.first_colour), SHAPES.index(attributes.first_shape)]
    second = [colours.index(attributes.second_colour), SHAPES.index(attributes.second_shape)]
    return [*first, RELATIONS.index(attributes.relation), *second]


def save(state: dict[str, torch.Tensor], path: Path, config: dict, **facts: object) -> None:
    """Write a state dict, floats as float16, with the config as JSON in the file's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in state.items()
    }
    made = {"torch": torch.__version__, "seed": TRAIN_SEED, **facts}
    metadata = {"config": json.dumps(config), **{key: str(value) for key, value in made.items()}}
    save_file(tensors, path, {"format": "pt", **metadata})


def write_report(folder: Path) -> None:
    """Measure the networks in the folder on new scenes; write and print the numbers as JSON."""
    images, scenes = scene_batch(0, 1024, TEST_SEED)
    files = sorted(folder.glob("*.safetensors"))
    numbers: dict[str, object] = {"bytes": {path.name: path.stat().st_size for path in files}}
    numbers |= measure_autoencoder(folder, images[:512], scenes[:512])
    numbers |= measure_clip(folder, images[:256], [scene.caption for scene in scenes[:256]])
    numbers |= {"frechet_distance_n_512": measure_features(folder, (images + 1) / 2)}
    (folder / "report.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(json.dumps(numbers, indent=2))


@torch.no_grad()
def measure_autoencoder(folder: Path, images: torch.Tensor, scenes: list) -> dict:
    """PSNR and judged share of reconstructions; mean and scale of the latents."""
    model = read_autoencoder(folder / "autoencoder.safetensors")
    mean, log_variance = model.encode(images).chunk(2, dim=1)
    decoded = model.decode(mean).clamp(-1, 1)
    # of images in [-1, 1], whose range squared is 4
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
    """Retrieval in both directions, and the mean cosine of right and wrong captions.

    A caption is right for every picture that shows it.
    """
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
    """Fréchet distances of 512 scenes to 512 others: unchanged, blurred, and with noise."""
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
    """Images (B, 3, H, W) with Gaussian blur of sigma pixels; the border pixels are repeated."""
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-torch.arange(-radius, radius + 1).float().square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(images, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Fréchet distance of features (n, D) and (n', D): |m - m'|² + tr(S + S' - 2 (S S')^(1/2)).

    Heusel et al. 2017 (arXiv 1706.08500), equation 6. The trace of the root is computed by
    eigenvalues, as `sd_perf.evaluation.fid` explains.
    """
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
    "report": write_report,
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
