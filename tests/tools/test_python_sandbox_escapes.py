"""Attacks on the Python tool, at every level of isolation that this machine reaches.

Each attack of ``sandbox_attacks`` prints ESCAPED if it gets what it wants. It must not; what it met instead must be what is
expected; nothing outside may have changed; and the next call must work. Those that harm nobody also run without isolation, where
they must succeed: an attack that fails everywhere shows nothing.
"""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mmrl.errors import MMRLError
from mmrl.messages import ToolResult
from mmrl.registry import ROOT
from tests.tools.sandbox_attacks import ATTACKS, FILES, PREFIX, Attack
from tools.python_sandbox import PACKAGES, PythonSandbox
from tools.python_sandbox_parts import pool, shell
from tools.python_sandbox_parts.shell import LEVELS, Level

WALLS = LEVELS[:-1]
SECRET = "the trainer's own"


@cache
def sandbox(level: Level, memory_mb: int = 256, packages: tuple[str, ...] = PACKAGES) -> PythonSandbox:
    limits = {"memory_mb": memory_mb, "disk_mb": 16, "output_characters": 2000}
    config = PythonSandbox.Config(isolation=level, unsafe=level == "none", warm=1, packages=packages, **limits)
    return PythonSandbox(config)


class World:
    """What lies outside: a secret, another process, servers."""

    def __init__(self, folder: Path) -> None:
        self.secret = folder / "secret.txt"
        self.secret.write_text(SECRET)
        self.before = self._stat()
        self.victim = subprocess.Popen(["sleep", "600"])
        self.servers = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
        self.abstract, self.socket = f"\0mmrl-{os.getpid()}", str(folder / "socket")
        for server, address in zip(self.servers[1:], (self.abstract, self.socket), strict=True):
            server.bind(address)
            server.listen()
        for server in self.servers:
            server.setblocking(False)
        self.names = {
            "SECRET": str(self.secret),
            "TRAINER": os.getpid(),
            "VICTIM": self.victim.pid,
            "PORT": self.servers[0].getsockname()[1],
            "ABSTRACT": self.abstract,
            "SOCKET": self.socket,
            "PROJECT": str(ROOT),
            "NUMPY": np.__file__,
        }
        self.package = Path(np.__file__).read_bytes()

    def attack(self, attack: Attack, level: Level, packages: tuple[str, ...] = PACKAGES) -> ToolResult:
        names = "\n".join(f"{name} = {value!r}" for name, value in self.names.items())
        return sandbox(level, attack.memory_mb, packages).run(f"{names}\n{PREFIX}\n{attack.code}", timeout_s=attack.timeout_s)

    def connections(self) -> int:
        """How many came in since the last time."""
        count = 0
        for server in self.servers:
            with suppress(BlockingIOError):
                server.accept()[0].close()
                count += 1
        return count

    def assert_unharmed(self) -> None:
        assert self.secret.read_text() == SECRET and self._stat() == self.before
        assert sorted(path.name for path in self.secret.parent.iterdir()) == ["secret.txt", "socket"]
        assert self.victim.poll() is None
        assert self.connections() == 0
        assert Path(np.__file__).read_bytes() == self.package
        assert not Path("/evil").exists() and not Path("/dev/shm/evil").exists() and not Path("/usr/lib/evil").exists()

    def _stat(self) -> tuple[int, ...]:
        stat = self.secret.stat()
        return stat.st_mode, stat.st_uid, stat.st_gid, stat.st_nlink, stat.st_mtime_ns, stat.st_ino

    def close(self) -> None:
        self.victim.kill()
        self.victim.wait()
        for server in self.servers:
            server.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("outside"))
    yield world
    world.close()


@pytest.fixture
def reach(require: Callable[[str], None]) -> Callable[[Level], None]:
    def need(level: Level) -> None:
        if level == "bubblewrap":
            require("bubblewrap")
            sandbox(level)
        try:
            sandbox(level)
        except MMRLError as error:
            pytest.skip(str(error))

    return need


def fits(attack: Attack) -> None:
    if attack.x86 and platform.machine() != "x86_64":
        pytest.skip("the attack names system calls of x86_64")


@pytest.mark.parametrize("level", WALLS)
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_contained(name: str, level: Level, world: World, reach: Callable[[Level], None]) -> None:
    attack = ATTACKS[name]
    reach(level)
    fits(attack)
    result = world.attack(attack, level)
    assert "ESCAPED" not in result.text
    assert re.search(attack.expect, result.text), result.text
    assert result.details == {"isolation": level}
    world.assert_unharmed()
    assert sandbox(level, attack.memory_mb).run("6 * 7").text == "42"


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if attack.control])
def test_without_isolation_the_attack_succeeds(name: str, world: World) -> None:
    fits(ATTACKS[name])
    assert "ESCAPED" in world.attack(ATTACKS[name], "none").text
    world.connections()


@pytest.fixture(scope="module")
def kernel_without_landlock() -> Iterator[None]:
    """Interpreters that are started now find no Landlock."""
    with pytest.MonkeyPatch.context() as patch:
        hide = "from tools.python_sandbox_parts import confine; confine.landlock_version = lambda: 0; "
        patch.setattr(shell, "_BOOT", shell._BOOT.replace("from tools", hide + "from tools"))
        yield


@pytest.mark.parametrize("name", FILES)
def test_bubblewrap_hides_files_by_itself(
    name: str, world: World, require: Callable[[str], None], kernel_without_landlock: None
) -> None:
    require("bubblewrap")
    fits(FILES[name])
    result = world.attack(FILES[name], "bubblewrap", packages=("matplotlib", "numpy"))  # interpreters of their own
    assert "ESCAPED" not in result.text
    assert re.search(FILES[name].expect, result.text), result.text
    world.assert_unharmed()


@pytest.mark.parametrize("level", ["namespaces", "landlock"])
def test_without_landlock_only_bubblewrap_is_a_wall(level: Level, kernel_without_landlock: None) -> None:
    with pytest.raises(MMRLError, match="Landlock is not in this kernel"):
        pool.require(level, ("matplotlib", "numpy"))


def test_there_are_enough_attacks() -> None:
    assert len(ATTACKS) >= 40
    assert sum(attack.control for attack in ATTACKS.values()) >= 20
