"""Every recipe of configs/recipes, dry-run for the GPUs in its name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sd_kernels.spec import Backend
from sd_kernels.targets import GPUS
from sd_perf.errors import ConfigError
from sd_perf.presets import load_preset
from sd_perf.tools.estimate.dry_run import dry_run

BY_LIBRARIES = "h100x8_libraries"
"""the recipe whose libraries are not here"""
RECIPES = sorted(Path(__file__).parents[2].glob("configs/recipes/*.yaml"))
REFERENCE_POINTS = {256: 2.8e-7, 512: 2.3e-7, 1024: 1.25e-7, 2048: 1.25e-7}
"""learning rate per sample by global batch size: MLPerf's reference convergence points, v5.0"""


@pytest.mark.sampled(2)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_its_gpus(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if recipe.stem == BY_LIBRARIES:
        monkeypatch.setattr(Backend, "missing", Backend.unfit)
    gpu, ranks = re.fullmatch(r"(\w+)x(\d+)_\w+", recipe.stem).groups()
    config = load_preset(recipe)
    facts = dry_run(config, int(ranks), gpu)
    assert facts["memory_bytes"]["total"] < 0.9 * GPUS[gpu].memory
    assert facts["batch"]["accumulate_steps"] == 1
    assert Path(config.run.dir).name == recipe.stem


def test_a_missing_library_is_not_passed_over() -> None:
    recipe = next(path for path in RECIPES if path.stem == BY_LIBRARIES)
    with pytest.raises(ConfigError, match=r"^kernels\.attention: 'fa3' cannot be had on H100: "):
        dry_run(load_preset(recipe), 8, "h100")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_reference_point(recipe: Path) -> None:
    config = load_preset(recipe)
    batch = config.training.global_batch_size
    assert config.optimizer.base_learning_rate == REFERENCE_POINTS[batch]
    assert config.optimizer.warmup_steps == 1000
    assert config.checkpoint.every_samples == 512_000
    assert config.training.max_samples % 512_000 == 0
