"""Small shards for the data tests.

Sample i has moments full of i, caption "caption i" and context full of -i.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from sd_perf.config import DataConfig
from sd_perf.data.shard_writer import ShardWriter

SIDE, TOKENS, CONTEXT_DIM = 2, 3, 5


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., DataConfig]:
    def make(
        num: int = 10, bad: Iterable[int] = (), name: str = "shards", context: bool = True, **fields
    ) -> DataConfig:
        bad = set(bad)
        with ShardWriter(tmp_path / name, samples_per_shard=4) as writer:
            for i in range(num):
                moments = np.full((8, SIDE, SIDE), np.nan if i in bad else i)
                states = np.full((TOKENS, CONTEXT_DIM), -i, np.float16) if context else None
                writer.write(moments, f"caption {i}", {"number": i}, states)
        return DataConfig(
            path=str(tmp_path / name),
            latent_size=SIDE,
            context="precomputed",
            context_tokens=TOKENS,
            **fields,
        )

    return make
