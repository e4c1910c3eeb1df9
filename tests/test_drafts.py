"""Drafts of dead writers are removed, those of living ones are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sd_perf.drafts import ASIDE, draft_folder, remove_leftovers
from sd_perf.files import write_text
from tests.waiting import PATIENCE

LIVING = """
import sys
from pathlib import Path
from sd_perf.drafts import draft_folder
with draft_folder(Path(sys.argv[1]), "x") as folder:
    (folder / "x").write_text("half")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_of_the_dead_and_of_the_living(tmp_path):
    command = [sys.executable, "-c", LIVING, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen(command, **pipes) as living,
        subprocess.Popen(command, **pipes) as dead,
    ):
        drafts = [Path(process.stdout.readline().strip()) for process in (living, dead)]
        dead.kill()
        dead.wait()
        assert all(draft.is_dir() for draft in drafts)
        write_text(tmp_path / "y", "whole")
        assert [draft.is_dir() for draft in drafts] == [True, False]
        living.stdin.close()
        assert living.wait(PATIENCE) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["y"]


def test_only_folders_are_leftovers(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / f"{ASIDE}link").symlink_to(tmp_path / "kept")
    (tmp_path / f"{ASIDE}file").touch()
    (tmp_path / f"{ASIDE}folder.abc").mkdir()
    remove_leftovers(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"kept", f"{ASIDE}link", f"{ASIDE}file"}


def test_a_draft_is_removed_with_its_block(tmp_path):
    with draft_folder(tmp_path, "name") as folder:
        assert folder.parent == tmp_path and folder.name.startswith(f"{ASIDE}name.")
        (folder / "content").touch()
    assert not list(tmp_path.iterdir())
