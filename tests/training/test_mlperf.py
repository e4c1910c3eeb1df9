import pytest

from sd_perf.mlperf.compliance import check_log
from sd_perf.mlperf.log import LOG_NAME, MLPerfLog, read_log
from sd_perf.training.callbacks.base import Callback
from sd_perf.training.callbacks.checkpointer import Checkpointer
from sd_perf.training.callbacks.mlperf import MLPerfLogger

pytest.importorskip("mlperf_logging")


class StopAt(Callback):
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def on_step(self, trainer) -> None:
        if trainer.samples == self.samples:
            trainer.stop_reason = "SIGTERM"


def test_log_of_a_run_stopped_resumed_and_evaluated(make_config, make_trainer):
    """52 samples, stop, the rest to 120 with blocks of 40; evaluated, it passes the open division's
    check."""
    config = make_config(
        training={"max_samples": 120}, mlperf={"division": "open"}, evaluation={"num_prompts": 16}
    )
    for stop in (52, None):
        callbacks = [StopAt(stop), MLPerfLogger(config), Checkpointer()]
        trainer = make_trainer(config, callbacks, resume=stop is None)
        trainer.fit()
    path = trainer.folder / LOG_NAME
    events = read_log(path)
    blocks = [
        (event.key, event.metadata["samples_count"])
        for event in events
        if event.key.startswith("block")
    ]
    ends = (40, 80, 120)
    assert blocks == [
        pair for end in ends for pair in (("block_start", end - 40), ("block_stop", end))
    ]
    assert next(event.value for event in events if event.key == "seed") == trainer.seed
    assert (
        next(event.value for event in events if event.key == "train_samples")
        == trainer.loader.num_samples
    )

    log = MLPerfLog(path, config)
    now = events[-1].time_ms
    for samples, fid, clip in ((40, 9.0, 0.2), (80, 5.0, 0.6), (120, 4.0, 0.7)):
        log.add_evaluation(samples, fid, clip, now + samples, now + samples + 5)
    assert log.conclude(fid_target=6.0, clip_target=0.5) == "success"
    verdict = check_log(path, "open")
    assert verdict.passed and not verdict.findings, str(verdict)
    stop = read_log(path)[-1]
    assert stop.time_ms == next(
        e.time_ms for e in events if e.key == "block_stop" and e.metadata["samples_count"] == 80
    )
