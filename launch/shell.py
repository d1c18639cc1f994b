"""Commands on a cluster's login node: this machine, or another one over NeMo-Run's SSH tunnel."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.launch import nemo

PATIENCE = 120.0
"""Seconds that a command may be silent for."""


@dataclass(frozen=True)
class Answer:
    """The result of a command."""

    code: int
    out: str
    error: str

    @property
    def said(self) -> str:
        """The command's error message, on one line."""
        return " ".join((self.error.strip() or self.out.strip() or f"exit code {self.code}").split())


@dataclass(frozen=True)
class Shell:
    """A machine that runs bash commands; without `host`, this machine.

    Args:
        before: shell lines that run before each command.
    """

    host: str | None = None
    user: str | None = None
    port: int | None = None
    identity: str | None = None
    before: str = ""

    @property
    def name(self) -> str:
        """The machine's name for messages."""
        return self.host or socket.gethostname()

    def ask(self, command: str, stdin: bytes = b"", without: Collection[str] = ()) -> Answer:
        """Runs a command, which may fail.

        Args:
            without: environment variables of this process to hide from the command; a command on another machine never
                gets them.

        Raises:
            ConfigError: there is no connection.
        """
        command = self.before + command
        if self.host is not None:
            return self._over_ssh(command, stdin)
        environment = {name: value for name, value in os.environ.items() if name not in without}
        try:
            done = subprocess.run(
                ["bash", "-c", command], input=stdin, capture_output=True, timeout=PATIENCE, env=environment
            )
        except subprocess.TimeoutExpired:
            return Answer(124, "", f"no answer in {PATIENCE:g} s")
        return Answer(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))

    def succeeds(self, command: str) -> bool:
        """Whether a command exits with 0."""
        return self.ask(command).code == 0

    def _over_ssh(self, command: str, stdin: bytes) -> Answer:
        # Not the tunnel's own `run`: that reads what it is to send one character every 10 ms.
        client = _client(self)
        try:
            pipe, out, error = client.exec_command(f"bash -c {shlex.quote(command)}", timeout=PATIENCE)
            with contextlib.suppress(OSError):  # a command that has ended already says why
                pipe.write(stdin)
            pipe.channel.shutdown_write()
            printed, complained = out.read(), error.read()
            code = out.channel.recv_exit_status()
        except TimeoutError:
            return Answer(124, "", f"no answer in {PATIENCE:g} s")
        except Exception as broken:  # paramiko has no common base class for them
            raise ConfigError(Problem("executor.host", self.host, f"the connection broke: {broken!r}")) from broken
        return Answer(code, printed.decode(errors="replace"), complained.decode(errors="replace"))


def _client(shell: Shell) -> Any:
    """The SSH client of the machine's tunnel; it is connected, or reconnected.

    Raises:
        ConfigError: it cannot be connected.
    """
    tunnel = _tunnel(shell)
    message = f"cannot connect to {tunnel.user or 'its default user'}@{shell.host}: "
    try:
        return nemo.connect(tunnel)
    except PermissionError as error:
        message += f"{error}; set executor.user or executor.identity"
        raise ConfigError(Problem("executor.host", shell.host, message)) from None
    except Exception as error:
        raise ConfigError(Problem("executor.host", shell.host, f"{message}{error}")) from error


_tunnels: dict[Shell, Any] = {}


def _tunnel(shell: Shell) -> Any:
    """The tunnel to the machine; this process opens it once."""
    if shell not in _tunnels:
        _tunnels[shell] = nemo.open_tunnel(shell.host or "", shell.user or "", shell.port, shell.identity)
    return _tunnels[shell]
