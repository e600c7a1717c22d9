"""A checkpoint comes back as it went in, or is refused in a sentence; a kill or a full disk at any moment leaves whole ones."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrl import checkpoint
from mmrl.errors import CheckpointError, MMRLError, TrainingError

FILES = ("policy.safetensors", "optimizer.safetensors", "meta.json")


def sections(number: int = 1) -> dict[str, dict[str, Tensor]]:
    return {"policy": {"weight": torch.full((3, 4), float(number))}, "optimizer": {"actor/0/step": torch.tensor(float(number))}}


def save(folder: Path, number: int, keep: int = 10) -> Path:
    return checkpoint.save(folder, number, sections(number), {"iteration": number, "fingerprint": "pi0 width 96"}, keep)


def names(folder: Path) -> list[str]:
    """Everything in the folder, hidden entries included."""
    return sorted(os.listdir(folder))


def flip_byte(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 0x01
    file.write_bytes(data)


def test_sections_and_meta_come_back_as_they_went_in(tmp_path: Path) -> None:
    w = torch.randn(4, 6)
    tensors = {
        "w": w,
        "tied": w,
        "row": w[1:2],
        "transposed": w.t(),
        "strided": w[:, ::2],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "trained": torch.nn.Parameter(torch.randn(2)),
        "bf16": torch.randn(3).bfloat16(),
        "bool": torch.tensor([True, False]),
        "int64": torch.tensor([2**62, -1]),
        "uint8": torch.arange(250, 256, dtype=torch.uint8),
        "not finite": torch.tensor([math.nan, math.inf]),
    }
    meta = {"stage": 1, "elapsed": 0.1 + 0.2, "nested": {"list": [1, None, "ü"], "best": -math.inf}}
    path = checkpoint.save(tmp_path / "runs" / "checkpoints", 120, {"policy": tensors, "nothing": {}}, meta, keep=1)
    assert path.name == "000120"
    loaded, loaded_meta = checkpoint.load(path)
    assert loaded_meta == meta
    assert loaded.keys() == {"policy", "nothing"}
    assert loaded["nothing"] == {}
    assert loaded["policy"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded["policy"][name].dtype == tensor.dtype, name
        torch.testing.assert_close(loaded["policy"][name], tensor.detach(), rtol=0, atol=0, equal_nan=True, msg=name)


def test_loaded_tensors_outlive_their_checkpoint_and_do_not_share_memory(tmp_path: Path) -> None:
    w = torch.arange(6.0)
    path = checkpoint.save(tmp_path, 1, {"policy": {"w": w, "tied": w}}, {}, keep=1)
    tensors = checkpoint.load(path)[0]["policy"]
    shutil.rmtree(path)
    tensors["w"].add_(1)
    assert torch.equal(tensors["w"], w + 1)
    assert torch.equal(tensors["tied"], w)


def test_a_checkpoint_is_safetensors_and_json_alone(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert names(path) == sorted(FILES)
    for name in FILES[:2]:
        header = (path / name).read_bytes()
        assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert not any(b"torch" in (path / name).read_bytes() for name in FILES)


def test_the_newest_keep_stay(tmp_path: Path) -> None:
    for number in (1, 2, 10, 999999, 1000000):
        save(tmp_path, number, keep=3)
    assert names(tmp_path) == ["000010", "1000000", "999999"]
    found = checkpoint.latest(tmp_path)
    assert found == (tmp_path / "1000000", None)
    save(tmp_path, 1000001, keep=1)
    assert names(tmp_path) == ["1000001"]
    with pytest.raises(ValueError, match="keep is 0"):
        save(tmp_path, 1000002, keep=0)


def test_a_run_that_went_back_removes_what_it_left_behind(tmp_path: Path) -> None:
    for number in (10, 20, 30):
        save(tmp_path, number)
    save(tmp_path, 15, keep=2)
    assert names(tmp_path) == ["000010", "000015"]


def test_saving_a_number_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    flip_byte(save(tmp_path, 2) / FILES[0], -1)
    save(tmp_path, 2)
    assert checkpoint.latest(tmp_path) == (tmp_path / "000002", None)
    assert names(tmp_path) == ["000001", "000002"]


def test_leftovers_and_strangers(tmp_path: Path) -> None:
    """A killed save's folders go, a checkpoint that had stepped aside comes back, other people's files stay."""
    save(tmp_path, 3).rename(tmp_path / ".replaced-000003")
    (tmp_path / ".writing-000004").mkdir()
    (tmp_path / ".writing-000004" / FILES[0]).write_text("half")
    (tmp_path / ".removed-000001").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "best").mkdir()
    assert checkpoint.any_saved(tmp_path)
    assert checkpoint.latest(tmp_path).path == tmp_path / "000003"
    save(tmp_path, 4)
    assert names(tmp_path) == ["000003", "000004", "best", "notes.txt"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "grow", "missing"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_found(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    file = path / name
    data = file.read_bytes()
    {
        "flip": lambda: flip_byte(file, data.index(b"96") if name == "meta.json" else len(data) - 2),
        "truncate": lambda: file.write_bytes(data[: len(data) // 2]),
        "empty": lambda: file.write_bytes(b""),
        "grow": lambda: file.write_bytes(data + b"x"),
        "missing": file.unlink,
    }[damage]()
    assert checkpoint.any_saved(tmp_path)
    with pytest.raises(CheckpointError, match=rf"checkpoint {path} is damaged: {name} .*; remove the folder"):
        checkpoint.load(path)
    found = checkpoint.latest(tmp_path)
    assert found.path == tmp_path / "000001"
    assert found.warning is not None
    assert name in found.warning and "continuing from the earlier checkpoint" in found.warning
    assert checkpoint.load(found.path)[1]["iteration"] == 1

    (tmp_path / "000001" / FILES[0]).unlink()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint: .*000002 is damaged.*000001 is damaged"):
        checkpoint.latest(tmp_path)


def test_no_byte_of_a_checkpoint_can_change_unnoticed(tmp_path: Path) -> None:
    """Every byte of the tensor files; of meta.json, every byte of a value (a space for a tab is no damage)."""
    path = save(tmp_path, 1)
    original = checkpoint.load(path)
    for name in FILES:
        data = (path / name).read_bytes()
        for position in range(len(data)):
            if name == "meta.json" and data[position : position + 1].isspace():
                continue
            flip_byte(path / name, position)
            with pytest.raises(CheckpointError):
                checkpoint.load(path)
            (path / name).write_bytes(data)
    assert checkpoint.load(path)[1] == original[1]


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    document = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(document | {"format": 99}))
    with pytest.raises(CheckpointError, match="has checkpoint format 99, this version reads 1"):
        checkpoint.load(path)


@pytest.mark.parametrize("text", ["[]", "7", "null", "{}", '{"format": 1}', "\xff"])
def test_meta_that_is_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 1)
    (path / "meta.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"meta\.json"):
        checkpoint.load(path)


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    (tmp_path / ".writing-000001").mkdir()
    assert not checkpoint.any_saved(tmp_path)
    assert not checkpoint.any_saved(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        checkpoint.latest(tmp_path)
    with pytest.raises(CheckpointError, match="holds no complete checkpoint; start the run again without --resume"):
        checkpoint.latest(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*000007"):
        checkpoint.load(tmp_path / "000007")


def test_another_policy_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    meta = checkpoint.load(path)[1]
    checkpoint.check_fingerprint(meta, "pi0 width 96", path)
    with pytest.raises(CheckpointError, match=r"000001 holds another policy: .* 'pi0 width 96', .* 'pi0 width 128'"):
        checkpoint.check_fingerprint(meta, "pi0 width 128", path)


@pytest.mark.parametrize(("section", "meta"), [("../policy", {}), ("", {}), ("policy", {"weights": {1, 2}})])
def test_a_mistake_of_the_caller_leaves_nothing_behind(tmp_path: Path, section: str, meta: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        checkpoint.save(tmp_path, 1, {section: {"w": torch.ones(1)}}, meta, keep=1)
    assert names(tmp_path) == []


def test_everything_is_on_the_disk_before_the_rename_and_the_rename_before_save_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut needs, and a kill cannot show: the order of flushes and renames."""
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        events.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def noted_rename(source: Path, target: Path) -> None:
        events.append(f"rename {source.name} {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    save(tmp_path, 1)
    writing = ".writing-000001"
    assert sorted(events[:3]) == sorted(f"flush {name}" for name in FILES)
    assert events[3:] == [f"flush {writing}", f"rename {writing} 000001", f"flush {tmp_path.name}"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB; where mounting one is not allowed, the tests below rely on their simulated failures alone."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("mounting a small disk needs root; test_failures_while_writing simulates it")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    save(small_disk / "c", 1)
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*000002: No space left on device; free some space"):
        checkpoint.save(small_disk / "c", 2, {"a": {"w": torch.zeros(1000)}, "b": {"w": torch.zeros(200_000)}}, {}, keep=1)
    assert names(small_disk / "c") == ["000001"]
    assert checkpoint.latest(small_disk / "c") == (small_disk / "c" / "000001", None)
    (small_disk / "text").write_text("old")
    with pytest.raises(TrainingError, match=r"cannot write .*text: No space left"):
        checkpoint.atomic_write_text(small_disk / "text", "x" * 300_000)
    assert (small_disk / "text").read_text() == "old"
    assert names(small_disk) == ["c", "text"]


def test_a_file_size_limit(tmp_path: Path) -> None:
    """``ulimit -f``: the system refuses the bytes beyond it, as a quota does."""
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match="000002: File too large; free some space"):
            checkpoint.save(tmp_path, 2, {"policy": {"w": torch.zeros(100_000)}}, {}, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["000001"]
    assert checkpoint.latest(tmp_path).path == tmp_path / "000001"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "open", "rename"])
def test_failures_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str) -> None:
    save(tmp_path, 1)
    real = getattr(os, call)

    with monkeypatch.context() as patch:

        def fail_once(*args: Any, **kwargs: Any) -> Any:
            patch.setattr(os, call, real)
            raise OSError(number, os.strerror(number))

        patch.setattr(os, call, fail_once)
        with pytest.raises(CheckpointError, match=rf"000002: {os.strerror(number)}; free some space"):
            save(tmp_path, 2)
    assert names(tmp_path) == ["000001"]
    assert checkpoint.latest(tmp_path) == (tmp_path / "000001", None)


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Permissions do not bind root, so a test run as root becomes nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_an_unwritable_folder(tmp_path: Path, unprivileged: None) -> None:
    folder = tmp_path
    with contextlib.suppress(PermissionError):  # where nobody may not even change the mode, it may not write either
        folder.chmod(0o555)
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*000001: Permission denied; .* choose a folder"):
        save(folder / "checkpoints", 1)
    with pytest.raises(TrainingError, match=r"cannot write .*config\.yaml: Permission denied"):
        checkpoint.atomic_write_text(folder / "config.yaml", "a: 1")


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(MMRLError, match=r"cannot write checkpoint .*checkpoints/000001"):
        save(tmp_path / "checkpoints", 1)


def test_atomic_write_replaces_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs" / "report.html"
    checkpoint.atomic_write_text(path, "grün")
    checkpoint.atomic_write_bytes(path, b"\x00new")
    assert path.read_bytes() == b"\x00new"

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.atomic_write_bytes(path, b"newer")
    assert path.read_bytes() == b"\x00new"
    assert names(path.parent) == ["report.html"]


# First one kill before each file operation of a save in turn, then kills at random moments. A child saves 1, 2, 2, 3, 4, 4, ...
# (every other number twice, so that replacing is killed too), keeps 2, and acknowledges each number on a pipe once it is saved.
# The children are forks because the imports take long.
KILLS = """
    import os, random, signal, struct, sys, time, torch
    from pathlib import Path
    from mmrl import checkpoint

    folder, rng = Path(sys.argv[1]), random.Random(0)

    def save(number):
        tensors = {"w": torch.full((50_000,), float(number)), "v": torch.tensor(number)}
        checkpoint.save(folder, number, {"policy": tensors, "optimizer": dict(tensors)}, {"iteration": number}, keep=2)

    def start(body):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                body()
            finally:
                os._exit(1)
        return child

    def check(at_least):
        path, warning = checkpoint.latest(folder)
        sections, meta = checkpoint.load(path)
        number = meta["iteration"]
        assert warning is None, warning
        for visible in folder.glob("0*"):
            checkpoint.verify(visible)  # the older ones are whole too: none is seen half removed
        assert int(path.name) == number >= at_least, (path, at_least)
        assert all((t["w"] == number).all() and t["v"] == number for t in sections.values())
        return number

    def die_at(operation, number):
        count = 0
        def counted(function):
            def wrapper(*args, **kwargs):
                nonlocal count
                count += 1
                if count > operation:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return wrapper
        for name in ("open", "mkdir", "fsync", "rename", "rmdir", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        save(number)
        os._exit(0)

    save(1), save(2)
    swept = 0
    for again in (1, 0):  # saving 2 a second time, then 3
        for operation in range(1000):
            number = 3 - again
            child = start(lambda: die_at(operation, number))
            _, status = os.waitpid(child, 0)
            check(2)
            swept += 1
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0, "the save failed"
                break
            if not again:  # back to where 3 was not saved, leftovers included
                for path in folder.glob("000003"):
                    path.rename(folder / ".writing-000003")

    def save_forever(first, pipe):
        number = first
        while True:
            save(number)
            os.write(pipe, struct.pack("q", number))
            if number % 2 == 0:
                save(number)
            number += 1

    last = check(3)
    for kill in range(10):
        receive, send = os.pipe()
        child = start(lambda: save_forever(last + 1, send))
        acknowledged = [struct.unpack("q", os.read(receive, 8))[0] for _ in range(kill % 4)]  # wait for 0 to 3 saves
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(send)
        acknowledged += [number for (number,) in struct.iter_unpack("q", os.read(receive, 1 << 16))]
        last = check(max(acknowledged, default=last))
        os.close(receive)
    save(last + 1)
    print(swept, last, sorted(os.listdir(folder)) == [f"{last:06d}", f"{last + 1:06d}"])
"""


def run_program(program: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(checkpoint.__file__).parents[1]), *sys.path])}
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_kill_at_any_moment_leaves_the_last_acknowledged_checkpoint_or_a_newer_one(tmp_path: Path) -> None:
    swept, last, tidy = run_program(KILLS, str(tmp_path)).split()
    assert int(swept) > 20  # kills before single file operations
    assert int(last) >= 3 + 13  # ten kills that waited for 0, 1, 2, 3, 0, ... saves
    assert tidy == "True"
