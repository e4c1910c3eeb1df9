"""Notices that another process of the run is gone or silent, and names it.

Every rank keeps a connection to rank 0 and sends a byte each second. The system closes the
connections of a process that dies, so that is known at once; a process that is stopped, or whose
machine is cut off, falls silent. torch's own collectives report neither by name: gloo says that a
connection was closed, and waits half an hour for a silent peer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import secrets
import selectors
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sd_perf.distributed.launcher import Place
from sd_perf.errors import RankLostError
from sd_perf.stopping import STOP

BEAT = 1.0
"""seconds between signs of life"""
_PATIENCE = 10.0
"""seconds from an error of a collective to the news of who caused it"""
_GRACE = 30.0
"""seconds for the main thread to leave a collective, before the process is ended without it"""
_BYE = b"!"


@dataclasses.dataclass
class _Peer:
    rank: int
    host: str
    heard: float


class Watchdog:
    """The connection of this rank to rank 0, and on rank 0 those to all others, in one thread.

    `silence` is in seconds. `start` is called by all ranks.
    """

    def __init__(self, place: Place, silence: float) -> None:
        self.place = place
        self.silence = silence
        self.lost = ""
        """who is gone, in words; empty while all are there"""
        self._is_lost, self._handled = threading.Event(), threading.Event()
        self._released = False
        self._connections: dict[socket.socket, _Peer] = {}
        self._selector = selectors.DefaultSelector()

    def start(self, store: Any) -> None:
        """Connect the ranks; they find rank 0's port in the store (of torch.distributed)."""
        watch: Callable[..., None]
        arguments: tuple[Any, ...]
        if self.place.rank == 0:
            token, server = secrets.token_hex(8), _server()
            store.set("watchdog", f"{token} {server.getsockname()[1]} {_this_process()}")
            watch, arguments = self._watch_all, (server, token)
        else:
            token, port, first = store.get("watchdog").decode().split(" ", 2)
            connection = socket.create_connection((self.place.address, int(port)), timeout=30)
            connection.sendall(f"{token} {self.place.rank} {_this_process()}\n".encode())
            self._connections[connection] = _Peer(0, first, time.monotonic())
            watch, arguments = self._watch_first, (connection,)
        threading.Thread(target=watch, args=arguments, name="watchdog", daemon=True).start()

    def release(self) -> None:
        """From here on nobody need wait for this process, nor it for others."""
        self._released = True
        self._send(_BYE)

    @contextlib.contextmanager
    def named(self, what_is_kept: Callable[[], str]) -> Iterator[None]:
        """Turn an error of torch in the block that a lost rank caused into RankLostError.

        `what_is_kept` names the newest checkpoint.
        """
        try:
            yield
        except RankLostError:  # it has been named
            STOP.hold()
            self._handled.set()
            raise
        except RuntimeError as error:
            STOP.hold()  # torchrun sends SIGTERM to all that are left
            if not self._is_lost.wait(_PATIENCE):
                raise
            self._handled.set()
            raise RankLostError(f"{self.lost}; {what_is_kept()}") from error

    def _watch_all(self, server: socket.socket, token: str) -> None:
        """Rank 0: hear the others, and tell all of one that is lost."""
        self._selector.register(server, selectors.EVENT_READ)
        start = before = beat = time.monotonic()
        while not self._released and not self.lost:
            ready = [key.fileobj for key, _ in self._selector.select(BEAT / 4)]
            now = time.monotonic()
            if now - before > 5 * BEAT:  # it is this process that was stopped
                start = now
                for peer in self._connections.values():
                    peer.heard = max(peer.heard, now)
            before = now
            for one in ready:
                if one is server:
                    self._accept(server)
                elif one in self._connections:
                    self._hear(one)
                else:
                    self._admit(one, token)  # type: ignore[arg-type]
            if now - beat > BEAT:
                beat = now
                self._send(b".")
            self._judge(now, start)
        if self.lost and not self._released:
            self._send(f"{self.lost}\n".encode())
            self._leave()

    def _accept(self, server: socket.socket) -> None:
        connection, _ = server.accept()
        connection.settimeout(2)  # for what is sent: nothing is read that has not come
        self._selector.register(connection, selectors.EVENT_READ)

    def _admit(self, connection: socket.socket, token: str) -> None:
        """Take the first words of a connection, which say who it is; close it where they do not."""
        try:
            words, _, more = connection.recv(1000).partition(b"\n")
            told, rank, host = words.split(b" ", 2)
            if not secrets.compare_digest(told, token.encode()):
                raise ValueError("no process of this run")
            self._connections[connection] = _Peer(int(rank), host.decode(), time.monotonic())
        except (OSError, ValueError):
            self._selector.unregister(connection)
            connection.close()
            return
        if _BYE in more:
            self._hear_no_more(connection)

    def _hear(self, connection: socket.socket) -> None:
        peer = self._connections[connection]
        try:
            heard = connection.recv(4096)
        except OSError:
            heard = b""
        peer.heard = time.monotonic()
        if not heard and not self.lost:
            self.lost = f"rank {peer.rank} on {peer.host} is gone"
        if _BYE in heard or not heard:
            self._hear_no_more(connection)

    def _hear_no_more(self, connection: socket.socket) -> None:
        """It is kept, so that a rank that left in order does not count as absent."""
        self._selector.unregister(connection)
        self._connections[connection].heard = float("inf")

    def _judge(self, now: float, start: float) -> None:
        silent = [peer for peer in self._connections.values() if now - peer.heard > self.silence]
        absent = set(range(1, self.place.size)) - {p.rank for p in self._connections.values()}
        if silent and not self.lost:
            peer = silent[0]
            self.lost = f"rank {peer.rank} on {peer.host} is silent for {self.silence:g} s"
        elif absent and now - start > self.silence and not self.lost:
            self.lost = f"rank {min(absent)} gave no sign of life within {self.silence:g} s"

    def _watch_first(self, connection: socket.socket) -> None:
        """Another rank: hear rank 0, and from it who is lost."""
        connection.settimeout(BEAT)
        first, beat = self._connections[connection], 0.0
        before = time.monotonic()
        while not self._released and not self.lost:
            try:
                if time.monotonic() - beat > BEAT / 2:
                    beat = time.monotonic()
                    connection.sendall(b".")
                heard: bytes | None = connection.recv(4096)
            except TimeoutError:
                heard = None
            except OSError:
                heard = b""
            now = time.monotonic()
            if heard or now - before > 5 * BEAT:  # or this process was stopped itself
                first.heard = now
            before = now
            if heard and _BYE in heard:
                return
            told = (heard or b"").strip(b".").decode(errors="replace").strip()
            if heard == b"":
                self.lost = f"rank 0 on {first.host} is gone"
            elif told:
                self.lost = told
            elif now - first.heard > self.silence:
                self.lost = f"rank 0 on {first.host} is silent for {self.silence:g} s"
        if self.lost and not self._released:
            self._leave()

    def _send(self, message: bytes) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.sendall(message)

    def _leave(self) -> None:
        """End this process: by its main thread, or, where that is stuck, without it."""
        self._is_lost.set()
        _cut_connections()
        if self._handled.wait(_GRACE):
            return
        print(f"sd-perf: rank {self.place.rank}: {self.lost}", file=sys.stderr, flush=True)
        os._exit(RankLostError.exit_code)


def _this_process() -> str:
    return f"{platform.node()} (process {os.getpid()})"


def _server() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _cut_connections() -> None:
    """Close this process's network connections, which wakes whoever waits in a collective."""
    folder = Path("/proc/self/fd")
    for descriptor in list(folder.iterdir()) if folder.is_dir() else []:
        with contextlib.suppress(OSError):
            _cut(int(descriptor.name))


def _cut(descriptor: int) -> None:
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.getpeername()  # OSError where it listens: gloo aborts when that is cut
            connection.shutdown(socket.SHUT_RDWR)
