"""Whether all processes of a run are alive: if one ends, the others end too and say which one.

Every process but the first holds a connection to the first. The system closes it when a process
dies, in whatever way, so that no sign of life has to be computed; where a whole machine is gone,
its keep-alive packets stay out, and the connection ends after half a minute.

    1 ──┐
    2 ──┼─► 0      0 sees which one is gone, and tells all others; if 0 is gone, all see it
    3 ──┘
"""

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vqllm.errors import ProcessError, VqllmError

KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""Seconds without a packet, seconds between questions, questions without an answer."""
CONNECT_SECONDS = 30.0
GRACE = 20.0
"""Seconds in which processes end by themselves after an error that may be that of all."""
MOMENT = 5.0
"""Seconds in which it is known why a process that this one waited for was not there."""
ENDED = 1
"""Exit code of a process that ends because another one did."""


@dataclass(frozen=True)
class ProcessNote:
    """Which process this is, for messages."""

    rank: int
    host: str
    pid: int

    @classmethod
    def own(cls, rank: int) -> "ProcessNote":
        return cls(rank, socket.gethostname(), os.getpid())

    def __str__(self) -> str:
        return f"process {self.rank} (host {self.host}, pid {self.pid})"


class Watch:
    """A thread that ends this process when another one of the run has ended."""

    def __init__(
        self, rank: int, notes: Sequence[ProcessNote], gather: Callable[[Any], list[Any]]
    ) -> None:
        """Connect. All processes make theirs at the same time.

        Args:
            notes: of all processes, by rank.
            gather: the values of all processes.
        """
        self._notes, self._rank = notes, rank
        self._closing, self._gone = threading.Event(), threading.Event()
        self._message = ""
        """about a process that ended with an error"""
        self._lock = threading.Lock()
        server = socket.create_server(("", 0), backlog=len(notes)) if rank == 0 else None
        port = gather(server.getsockname()[1] if server else None)[0]
        self._links: dict[int, socket.socket] = {}
        if server is not None:
            server.settimeout(CONNECT_SECONDS)
            for _ in notes[1:]:
                link, _ = server.accept()
                self._links[int.from_bytes(_read(link, 4), "little")] = link
            server.close()
        else:
            host = os.environ.get("MASTER_ADDR", notes[0].host)
            self._links[0] = link = socket.create_connection((host, port), CONNECT_SECONDS)
            link.sendall(rank.to_bytes(4, "little"))
        for other, link in self._links.items():
            _keep_alive(link)
            threading.Thread(target=self._listen, args=(other, link), daemon=True).start()

    def close(self, error: BaseException | None = None) -> None:
        """The work is done, or ends with an error of this process.

        Raises:
            ProcessError: the error is that another process was not there any more.
        """
        failed = isinstance(error, Exception) and not isinstance(error, VqllmError)
        if failed:
            self._gone.wait(MOMENT)
        self._closing.set()
        if failed and self._message:
            raise ProcessError(self._message) from error
        self._tell(self._links, {"rank": self._rank, "error": _reason(error)})
        for link in self._links.values():
            link.close()

    def _tell(self, ranks: Any, what: dict[str, Any]) -> None:
        line = json.dumps(what).encode() + b"\n"
        with self._lock:
            for other in ranks:
                try:
                    self._links[other].sendall(line)
                except OSError:
                    continue  # it is gone, which its own thread finds

    def _listen(self, other: int, link: socket.socket) -> None:
        """Wait for a word of another process, or for its end."""
        try:
            with link.makefile("rb") as lines:
                line = lines.readline()
        except (OSError, ValueError):
            line = b""
        if self._closing.is_set():
            return
        told = json.loads(line) if line.endswith(b"\n") else {"rank": other, "error": ""}
        if told["error"] is None:
            return
        if self._rank == 0:
            self._tell(self._links.keys() - {other}, told)
        self._end(self._notes[told["rank"]], told["error"])

    def _end(self, gone: ProcessNote, reason: str) -> None:
        how = f" with an error: {reason}" if reason else ": it was killed, or its machine is gone"
        message = (
            f"{gone} ended{how}. All processes of this run end; what is finished is kept: the same "
            "command goes on, with any number of processes."
        )
        if reason:
            # Waiting for it fails in this process too, or the error is that of all of them.
            self._message = message
            self._gone.set()
            if self._closing.wait(GRACE):
                return
        sys.stderr.write(f"vqllm: {message}\n")
        sys.stderr.flush()
        os._exit(ENDED)


def _reason(error: BaseException | None) -> str | None:
    """What other processes are told."""
    if error is None:
        return None
    return str(error) or type(error).__name__ if isinstance(error, Exception) else "stopped"


def _read(link: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := link.recv(size - len(data))):
        data += more
    return data


def _keep_alive(link: socket.socket) -> None:
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):  # not on every system
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
