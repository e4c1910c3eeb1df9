"""The model card of exported weights: README.md, as model hubs show it.

It says what the run's folder says, and where that is silent it says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sd_perf import __version__
from sd_perf.config import Config, DiffusionConfig, UNetConfig
from sd_perf.fetch.manifest import artefacts
from sd_perf.fetch.receipt import Receipt
from sd_perf.models.companions import Named
from sd_perf.models.diffusers_folder import LOAD_UNET, needs_loader
from sd_perf.runs.scores import read_scores, rounded
from sd_perf.tools.config_text import as_yaml
from sd_perf.tools.scores import SCORES

_FRONT = """---
library_name: diffusers
pipeline_tag: text-to-image
tags:
- text-to-image
- stable-diffusion
- sd-perf
---
"""
_UNKNOWN = "not known to sd-perf; state it here before you pass the weights on"


@dataclass(frozen=True)
class Trained:
    """The run, and the checkpoint of it, that weights are of."""

    folder: Path
    config: Config
    samples: int
    """position of the checkpoint"""
    steps: int
    dataset: int
    """samples in the data set"""


@dataclass(frozen=True)
class Exported:
    """What was exported, as far as a card tells it."""

    source: Path
    """run, checkpoint or file, as it was named"""
    trained: Trained | None
    """None where the source is no run"""
    model: UNetConfig
    diffusion: DiffusionConfig
    parameters: int
    dtype: str
    ema: bool
    named: Named
    missing: tuple[str, ...]
    """parts of a pipeline that are not in the folder"""


def model_card(exported: Exported) -> str:
    """The card as Markdown."""
    trained = exported.trained
    sections = {"Use": _use(exported)}
    if trained:
        config = as_yaml(trained.config, changed_only=True)
        sections |= {
            "Scores": _scores(trained, exported.ema),
            "Data": _table(("", ""), _data(trained)),
            "Config": f"What differs from sd-perf's defaults:\n\n```yaml\n{config}```\n",
        }
    sections["Licences"] = _table(("what", "licence"), _licences(exported))
    title = trained.folder.resolve().name if trained else exported.source.name
    body = "".join(f"\n## {name}\n\n{text}" for name, text in sections.items())
    return f"{_FRONT}\n# {title}\n\n{_table(('', ''), _facts(exported))}{body}"


def _facts(exported: Exported) -> Iterator[tuple[str, ...]]:
    """What the weights are, and where they come from."""
    model, trained = exported.model, exported.trained
    groups = f"{model.resblock_groups} in ResBlocks and head"
    yield "network", f"UNet of Stable Diffusion v2's kind, {exported.parameters:,} parameters"
    yield "GroupNorm groups", f"{groups}, {model.transformer_groups} before transformers"
    yield "predicts", exported.diffusion.prediction
    yield "weights", f"{'moving average, ' if exported.ema else ''}{exported.dtype}"
    if trained:
        config = trained.config
        batch = config.training.global_batch_size
        yield "trained on", f"{trained.samples:,} samples: {trained.steps:,} steps of {batch:,}"
        seeded = f"random weights, seed {config.training.seed}"
        yield "began from", config.model.init or seeded
    yield "exported by", f"sd-perf {__version__}, from {exported.source}"


def _use(exported: Exported) -> str:
    if exported.missing:
        missing = "".join(f"- {part}\n" for part in exported.missing)
        return (
            "This folder is no whole pipeline: give its `unet/` and `scheduler/` to one that has "
            f"the rest. Missing are\n\n{missing}"
        )
    drawn = option = remark = ""
    if exported.trained:
        sampling = exported.trained.config.sampling
        drawn = f", num_inference_steps={sampling.steps}, guidance_scale={sampling.guidance_scale}"
    if needs_loader(exported.model):
        option = ", trust_remote_code=True"
        remark = (
            "\nIts norms have two numbers of groups, which stock diffusers cannot express; "
            f"`unet/{LOAD_UNET.name}` sets them.\n"
        )
    return (
        "```python\nfrom diffusers import StableDiffusionPipeline\n\n"
        f'pipeline = StableDiffusionPipeline.from_pretrained("FOLDER"{option})\n'
        f'pipeline("a caption"{drawn}).images[0].save("picture.png")\n```\n{remark}'
    )


def _scores(trained: Trained, ema: bool) -> str:
    """FID, CLIP score and the like, up to the position of the weights."""
    scores = read_scores(trained.folder, ema=ema)
    lines = [line for line in scores if line["samples"] <= trained.samples]
    shown = [score for score in SCORES if score.lines(lines)]
    if not shown:
        return "These weights have not been scored.\n"
    head = ("samples", *(score.name for score in shown), "pictures")
    rows = [
        (
            f"{line['samples']:,}",
            *(score.text(line) if score.lines([line]) else "" for score in shown),
            f"{line['n']:,}",
        )
        for line in lines
    ]
    evaluation = trained.config.evaluation
    how = f"Prompts: `{evaluation.prompts}`. Features of the FID: `{evaluation.features}`."
    how += " Drawn in bf16." * rounded(lines)
    return f"{_table(head, rows)}\n{how}\n"


def _data(trained: Trained) -> Iterator[tuple[str, ...]]:
    data = trained.config.data
    yield "samples in the set", f"{trained.dataset:,}"
    yield "stored as", data.format
    yield "folder", data.path if data.format != "synthetic" else "none: drawn from the seed"
    yield "captions left out", f"{100 * data.drop_captions:g} %"


def _licences(exported: Exported) -> Iterator[tuple[str, ...]]:
    """A line for each thing whose licence bears on the weights."""
    files = {"autoencoder": exported.named.autoencoder, "text encoder": exported.named.text_weights}
    if exported.trained:
        config = exported.trained.config
        data = config.data.path if config.data.format != "synthetic" else ""
        files |= {"data": data, "first weights": config.model.init}
    yield "these weights", _UNKNOWN
    for what, file in files.items():
        if file and file != "random":
            yield f"{what}: {file}", _terms(Path(file))


def _terms(path: Path) -> str:
    """The terms under which `sd-perf fetch` got a file, or what is in a folder."""
    folder = path if path.is_dir() else path.parent
    receipt = Receipt(folder)
    terms = [
        artefact.terms
        for name, artefact in artefacts().items()
        if any(path in (folder, folder / file.name) for file in receipt.recorded(name))
    ]
    return "; ".join(terms) or _UNKNOWN


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(map(_one_cell, line))} |\n" for line in lines)


def _one_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
