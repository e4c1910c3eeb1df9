"""What the dry run says of the presets' data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sd_perf.presets import load_preset
from sd_perf.tools.estimate.dry_run import as_table, dry_run
from tests.small_run import small_config

CONFIGS = Path(__file__).parents[3] / "configs"
BYTES = {
    "train_512_moments": 4 * 8 * 64 * 64,
    "train_512": 4 * 3 * 512 * 512,
    "train_512_encoded": 2 * (8 * 64 * 64 + 77 * 1024),
}
"""of a sample on its way to the step"""


@pytest.mark.slow
@pytest.mark.parametrize("name", BYTES)
def test_the_benchmarks_presets(name):
    facts = dry_run(load_preset(CONFIGS / f"{name}.yaml"), 8, "h100")
    assert facts["data"]["bytes_per_sample"] == BYTES[name]
    assert facts["parameters"] == 865_910_724


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "card"), [(4, 24e9), (1, 80e9)])
def test_the_preset_for_fine_tuning_fits_its_cards(accumulate, card):
    config = load_preset(CONFIGS / "finetune_512.yaml")
    training = dataclasses.replace(config.training, accumulate_steps=accumulate)
    facts = dry_run(dataclasses.replace(config, training=training), 1, "h100")
    assert facts["memory_bytes"]["total"] < 0.9 * card
    assert facts["begins_from"].startswith(f"the weights in {config.model.init}")
    assert (facts["predicts"], facts["parameters"]) == ("epsilon", 865_910_724)


def test_the_table_has_the_bytes_of_a_sample(tmp_path):
    table = as_table(dry_run(small_config(tmp_path), 1))
    cells = [str(cell) for column in table.columns for cell in column.cells]
    # 8 x 8 latents of 4 channels; the text of synthetic samples is drawn in the step's encoder
    assert "synthetic: 2,048 bytes a sample" in cells
