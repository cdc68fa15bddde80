"""The command line in processes of their own, which start in milliseconds.

Importing PyTorch takes seconds, so they are forked from a server that has imported everything already (one for each
test worker). What libraries read while they are imported, such as `HF_HUB_CACHE`, the server has read: a test of that
starts `python -m reglue` itself.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
COMMANDS = (
    *("autoencode", "compress", "edit", "evaluate", "export_run", "info", "perceive", "prepare", "probe"),
    *("prototypes", "report", "sample", "synthesise", "train", "verify"),
)
SERVER.set_forkserver_preload(
    [
        *(f"reglue.commands.{name}" for name in COMMANDS),
        *("diffusers.models.autoencoders.autoencoder_kl", "reglue.portable.diffusers", "timm.models"),
    ]
)


class Reglue:
    """A running `reglue ARGUMENTS`, with the interface of a subprocess.Popen whose output is piped as text.

    `prelude` is Python code to run before the command; `environment` is added to the environment of the tests.
    """

    def __init__(self, *arguments: str | Path, prelude: str = "", **environment: str) -> None:
        self.args = [str(argument) for argument in arguments]
        self._folder = tempfile.TemporaryDirectory()
        self._process = SERVER.Process(
            target=_main, args=(self.args, {**os.environ, **environment}, prelude, self._folder.name)
        )
        self._process.start()
        atexit.register(self.kill)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def said(self) -> str:
        """What it has written to stdout so far."""
        return Path(self._folder.name, "stdout").read_text() if Path(self._folder.name, "stdout").exists() else ""

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait until it ends. Returns (stdout, stderr); raises TimeoutExpired after `timeout` seconds."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        atexit.unregister(self.kill)
        out, err = (Path(self._folder.name, name).read_text() for name in ("stdout", "stderr"))
        return out, err

    def result(self, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait until it ends, as subprocess.run does: a process that takes too long is killed."""
        try:
            out, err = self.communicate(timeout)
        finally:
            self.kill()
        assert self.returncode is not None
        assert not check or self.returncode == 0, err[-3000:]
        return subprocess.CompletedProcess(self.args, self.returncode, out, err)


def start_ranks(count: int, *arguments: str | Path, preludes: tuple[str, ...] = ()) -> list[Reglue]:
    """`count` processes of one group, as SLURM would start them: unlike torchrun, nothing ends all when one fails.

    The first ranks run the preludes, if there are any.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    preludes = (*preludes, *[""] * count)[:count]
    return [
        Reglue(*arguments, prelude=prelude, RANK=str(rank), LOCAL_RANK=str(rank), **world)
        for rank, prelude in enumerate(preludes)
    ]


def run_ranks(count: int, *arguments: str | Path, check: bool = True) -> list[subprocess.CompletedProcess[str]]:
    """Run a command in `count` processes of one group, until all have ended."""
    return [process.result(check) for process in start_ranks(count, *arguments)]


def _main(arguments: list[str], environment: dict[str, str], prelude: str, folder: str) -> None:
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        file = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream.fileno())
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["reglue", *arguments]
    exec(prelude, {})
    from reglue.__main__ import main

    main()
