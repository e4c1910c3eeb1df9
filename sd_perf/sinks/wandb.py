"""Weights & Biases, online or to files in RUN/wandb that `wandb sync` sends later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sd_perf.config import LoggingConfig
from sd_perf.errors import UserError
from sd_perf.files import one_line
from sd_perf.optional import optional
from sd_perf.sinks.sink import SinkRun


class WandbSink:
    """One run of W&B under the run's own id, so that a resumed run continues its curves.

    The x axis is the position in samples. A point that a resumed run gives again stands there
    twice, because a history of W&B only grows.
    """

    keeps_values = True

    def __init__(self, run: SinkRun, logging: LoggingConfig) -> None:
        self._wandb = optional("wandb", "logging.sinks: wandb needs its client", "wandb")
        settings = self._wandb.Settings(silent=True, console="off", disable_git=True)
        try:
            self._run = self._wandb.init(
                project=logging.wandb_project,
                id=run.run_id,
                name=run.folder.resolve().name,
                resume="allow",
                mode=logging.wandb_mode,
                dir=str(run.folder),
                config=dict(run.config),
                settings=settings,
            )
        except self._wandb.Error as error:
            raise UserError(
                f"logging.sinks: wandb cannot begin ({one_line(error)}); log in with `wandb login`"
                ", or keep its files here with --logging.wandb-mode offline"
            ) from error
        self._run.define_metric("samples")
        self._run.define_metric("*", step_metric="samples")

    def values(self, group: str, samples: int, values: Mapping[str, float]) -> None:
        numbers = {f"{group}/{name}": value for name, value in values.items()}
        self._run.log({"samples": samples, **numbers})

    def picture(self, samples: int, path: Path) -> None:
        image = self._wandb.Image(str(path), caption=f"{samples:,} samples")
        self._run.log({"samples": samples, "pictures": image})

    def close(self) -> None:
        self._run.finish()
