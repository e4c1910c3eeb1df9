"""A real Slurm of two nodes on this machine, in a folder of its own: nothing is installed.

Munge, the controller and both nodes are Debian's programs, those on PATH or else those of packages
that are unpacked into a folder. Both nodes are slurmd processes of this machine, at ports of their
own; each counts two CPUs whatever there are.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from sd_perf.errors import UserError

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue")
PACKAGES = ("slurm-wlm", "munge")
NODES = ("n1", "n2")

CONFIG = """
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=20
MessageTimeout=60
MinJobAge=3600
JobRequeue=1
SlurmdParameters=config_overrides
{plugins}
NodeName=n1 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[1]} CPUs=2 RealMemory=4000
NodeName=n2 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=1:00:00 State=UP OverSubscribe=NO
"""
"""cred_expire is what a requeued job waits for, and SlurmdTimeout when a killed node is noticed"""


class VirtualCluster:
    """Controller and nodes. `environment` is that of who uses the cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLURM_")},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHON": sys.executable,
        }
        self._plugins = self._slurmstepd = ""

    def up(self, hidden: Path) -> None:
        """Start all. On n2 the folder `hidden` is empty. UserError where this cannot be."""
        require_root_and_programs()
        self._find_programs()
        for name in ("munge", "state", "log", "spool.n1", "spool.n2"):
            (self.folder / name).mkdir(parents=True, mode=0o700)
        key = self.folder / "munge/key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        host = socket.gethostname().split(".")[0]
        values = {"folder": self.folder, "host": host, "ports": _free_ports(3)}
        (self.folder / "slurm.conf").write_text(CONFIG.format(**values, plugins=self._plugins))
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        files = [
            f"--{word}-file={self.folder}/munge/{word}" for word in ("key", "pid", "log", "seed")
        ]
        self.call("munged", f"--socket={self.folder}/munge/socket", *files, "--force")
        self.call("slurmctld", "-c")
        self.start_node("n1")
        hide = f"mount -t tmpfs tmpfs '{hidden}' && exec slurmd -N n2 -d '{self._slurmstepd}'"
        self.call("unshare", "--mount", "sh", "-c", hide)
        self.wait(lambda: self.states() == {"idle"}, "both nodes are idle", 300)

    def start_node(self, name: str) -> None:
        self.call("slurmd", "-N", name, "-d", self._slurmstepd)

    def kill_node(self, name: str) -> None:
        """End a node as a power cut does: its daemon, and all that runs on it, at once."""
        log, tasks = str(self.folder / f"log/slurmd.{name}.log"), []
        daemons = [process for process in _processes() if log in _open_files(process)]
        mark = f"SLURMD_NODENAME={name}\0".encode(), f"SLURM_CONF={self.folder}".encode()
        for process in _processes():
            with contextlib.suppress(OSError):
                environment = (process / "environ").read_bytes()
                tasks += [process] * all(word in environment for word in mark)
        # First those that would report the end of the others.
        for process in (*daemons, *tasks):
            _kill(int(process.name))

    def down(self) -> None:
        """End all jobs, then the daemons; slurmd would wait for its jobs otherwise."""
        subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True)
        self.wait(lambda: not self.call("squeue", "--noheader"), "the queue is empty", 300)
        for name in ("slurmd.n1", "slurmd.n2", "slurmctld", "munge/pid"):
            path = self.folder / (name if name == "munge/pid" else f"{name}.pid")
            if path.exists():
                _kill(int(path.read_text()), signal.SIGTERM)

    def call(self, *command: object, code: int = 0) -> str:
        """Run a command of Slurm, or one that uses it; what it printed, with its exit code
        checked."""
        done = subprocess.run(
            list(map(str, command)),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode != code:
            raise RuntimeError((command, done.returncode, done.stdout, done.stderr))
        return done.stdout + done.stderr

    def states(self) -> set[str]:
        return set(self.call("sinfo", "--noheader", "-N", "--format", "%t").split())

    def field(self, job: str, name: str) -> str:
        """A field of a job, such as JobState."""
        text = self.call("scontrol", "show", "job", job, "--oneliner")
        return text.split(f" {name}=")[1].split()[0]

    def wait(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"not within {seconds:g} s: {what}\n{self.logs()}")
            time.sleep(0.2)

    def logs(self) -> str:
        """The last lines of all daemons, for a failed test."""
        texts = {path.name: path.read_text() for path in (self.folder / "log").glob("*.log")}
        return "\n".join(f"{name}:\n{text[-2000:]}" for name, text in texts.items())

    def _find_programs(self) -> None:
        """Take Slurm's programs from PATH, else from packages unpacked below this folder."""
        path = _path()
        if not all(shutil.which(name, path=path) for name in PROGRAMS):
            root = unpack_packages(self.folder / "packages")
            path = f"{root}/usr/sbin:{root}/usr/bin:{path}"
            libraries = [str(p) for p in root.glob("usr/lib/*-linux-gnu")]
            [plugins] = root.glob("usr/lib/*-linux-gnu/slurm-wlm")
            self.environment["LD_LIBRARY_PATH"] = ":".join([*libraries, str(plugins)])
            self._plugins = f"PluginDir={plugins}"
        self.environment["PATH"] = path
        # slurmd looks for it where the package is installed, which an unpacked one is not.
        self._slurmstepd = shutil.which("slurmstepd", path=path) or ""


def require_root_and_programs() -> None:
    """UserError where no Slurm can be started on this machine."""
    if os.geteuid() != 0:
        raise UserError(
            "needs root: Slurm's daemons change users, and a folder is hidden on a node"
        )
    if not (shutil.which("apt-get") or all(shutil.which(name, path=_path()) for name in PROGRAMS)):
        raise UserError("needs Slurm and munge, or apt-get to fetch them")


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def unpack_packages(folder: Path) -> Path:
    """Fetch Slurm's packages, and what they need, by apt; unpack them; the folder they are in."""
    archives, root = folder / "archives", folder / "root"
    (archives / "partial").mkdir(parents=True)
    fetch = ["apt-get", "install", "--yes", "--no-install-recommends", "--download-only"]
    options = ["-o", f"Dir::Cache::archives={archives}", "-o", "Debug::NoLocking=1"]
    subprocess.run(["apt-get", "update"], capture_output=True)
    done = subprocess.run([*fetch, *options, *PACKAGES], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"needs Slurm and munge, which apt-get does not get: {done.stderr[-200:]}")
    for package in archives.glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", str(package), str(root)], check=True)
    for link in root.glob("usr/*bin/*-wlm"):  # Debian's alternatives would make these names
        plain = link.with_name(link.name.removesuffix("-wlm"))
        if not plain.exists():
            plain.symlink_to(link.name)
    return root


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _processes() -> list[Path]:
    return list(Path("/proc").glob("[0-9]*"))


def _open_files(process: Path) -> set[str]:
    names = set()
    with contextlib.suppress(OSError):
        for link in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                names.add(str(link.readlink()))
    return names


def _kill(process: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)
