"""`sd-perf train`, and its dry run."""

from __future__ import annotations

from pathlib import Path

from sd_perf.cli.console import CONSOLE, print_json, print_plain, table_console
from sd_perf.cli.options import Settings, TargetName, require_between
from sd_perf.commands import resume_command
from sd_perf.config import Config
from sd_perf.distributed.launcher import MAX_RANKS
from sd_perf.errors import RankLostError
from sd_perf.stopping import STOPPED


def train(
    config: Path,
    settings: Settings,
    resume: bool = False,
    fresh: bool = False,
    dry_run: bool = False,
    explain: bool = False,
    ranks: int = 1,
    target: TargetName = "here",
    json: bool = False,
) -> int:
    """Train a UNet. Every field of the preset can be overridden.

    Args:
        config: YAML preset, such as configs/train_512_moments.yaml
        settings: fields of the preset
        resume: continue the run in its folder from its newest checkpoint (begin it where there is
            none)
        fresh: move a complete run in the folder aside (runs/smoke becomes runs/smoke.1, ...) and
            begin anew
        dry_run: print parameters, FLOPs, memory, batch arithmetic and kernels of the run, and exit;
            with resume or fresh, also refuse what the run folder does not allow
        explain: say in ten lines what the run will do and write, and exit
        ranks: processes that the dry run and the explanation count with
        target: GPU that the dry run chooses kernels for
        json: print the dry run as JSON
    """
    if explain:
        return _explain(settings, ranks, resume=resume, fresh=fresh)
    if dry_run:
        if resume or fresh:  # what would refuse them is told now
            _require_start(settings, resume=resume, fresh=fresh)
        return _dry_run(settings, ranks, target, as_json=json)
    from sd_perf.distributed.world import is_overdue, start_world, stop_world
    from sd_perf.tools.estimate.out_of_memory import is_out_of_memory, out_of_memory
    from sd_perf.training.launch import launch

    world = start_world(settings.training.device, *settings.run.patience)
    try:
        stop_reason = launch(settings, world, resume=resume, fresh=fresh, console=CONSOLE)
        world.part()
    except (MemoryError, RuntimeError) as error:
        if is_overdue(error):
            raise _overdue(settings.run.collective_seconds) from error
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(settings, world) from error
    # Not after an error: to leave in order can take all ranks, and the process ends anyway.
    stop_world(world)
    if stop_reason is None:
        return 0
    how = "continue with" if world.size == 1 else "continue, under the same launcher, with"
    print_plain(f"stopped by {stop_reason} and saved; {how}:", f"  {resume_command()}")
    return STOPPED


def _overdue(seconds: int) -> RankLostError:
    return RankLostError(
        f"run.collective_seconds: a collective has not ended in {seconds} s, though no process of "
        "the run is gone or silent; look where each stands (py-spy dump), or raise it"
    )


def _explain(settings: Config, ranks: int, *, resume: bool, fresh: bool) -> int:
    from sd_perf.tools.explain import explain
    from sd_perf.training.launch import require_allowed

    require_between("--ranks", ranks, 1, MAX_RANKS)
    require_allowed(settings)
    lines = explain(settings, resume=resume, fresh=fresh, ranks=ranks)
    print_plain(*(f"{what:8} {words}" for what, words in lines.items()))
    return 0


def _require_start(settings: Config, *, resume: bool, fresh: bool) -> None:
    from sd_perf.runs.folder import settle_run

    settle_run(settings, resume=resume, fresh=fresh)


def _dry_run(settings: Config, ranks: int, target: str, as_json: bool) -> int:
    from sd_perf.tools.estimate.dry_run import as_table, dry_run
    from sd_perf.training.kernels_table import kernels_table
    from sd_perf.training.launch import require_allowed

    require_between("--ranks", ranks, 1, MAX_RANKS)
    require_allowed(settings)
    facts = dry_run(settings, ranks, target)
    if as_json:
        print_json(facts)
    else:
        table_console().print(as_table(facts), *kernels_table(facts["target"], facts["kernels"]))
    return 0
