"""Environment for tests of launch files: commands on the PATH, and network namespaces as hosts."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LAUNCH = Path(__file__).resolve().parent.parent / "docs" / "examples" / "launch"


def with_commands(folder: Path, **commands: str) -> dict[str, str]:
    """The environment, with this Python's `torchrun` and other commands first on the PATH.

    Args:
        folder: Where to put them.
        **commands: Shell scripts, by name.
    """
    folder.mkdir(exist_ok=True)
    torchrun = f'exec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"'
    for name, body in {"torchrun": torchrun, **commands}.items():
        file = folder / name
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


def why_no_namespaces() -> str | None:
    """What this machine lacks for network namespaces; None if nothing."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the command ip, of iproute2"
    probe = f"probe-{os.getpid()}"
    done = subprocess.run(
        ["ip", "netns", "add", probe], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return f"this kernel makes no network namespaces: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


@contextmanager
def two_hosts() -> Iterator[dict[str, str]]:
    """Two network namespaces connected by a veth pair: addresses by name of the namespace.

    Each has only its own loopback and this connection.
    """
    number = os.getpid()
    hosts = {f"host-a-{number}": "10.77.0.1", f"host-b-{number}": "10.77.0.2"}
    ends = dict(zip(hosts, (f"a{number}", f"b{number}"), strict=True))
    try:
        for host in hosts:
            ip("netns", "add", host)
        first, second = ends.values()
        ip("link", "add", first, "type", "veth", "peer", "name", second)
        for host, address in hosts.items():
            ip("link", "set", ends[host], "netns", host, "name", "cable")
            ip("-n", host, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", host, "link", "set", "cable", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in hosts:  # deletes the pair too
            subprocess.run(["ip", "netns", "delete", host], check=False)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
