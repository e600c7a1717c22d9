"""Embeddings of prompts on disk: read back bit for bit, by nobody whose encoders are others, in the room that they may take."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrl.errors import ConfigError
from policies.diffusion import Diffusion
from policies.diffusion_parts import disk
from policies.diffusion_parts.disk import DiskCache, encoders_digest
from policies.diffusion_parts.options import PromptCache
from tests.policies import tiny_diffusion as tiny

KILOBYTE = 1e-6  # in gigabytes


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_sd3(tmp_path_factory.mktemp("sd3"))


def cache(folder: Path, kilobytes: float = 1000.0) -> DiskCache:
    return DiskCache(PromptCache(str(folder), kilobytes * KILOBYTE))


def some(seed: int = 0, numbers: int = 30) -> dict[str, Tensor]:
    table = torch.randn(2, numbers, generator=torch.Generator().manual_seed(seed))
    return {"embeds": table.bfloat16()[:, ::2], "mask": torch.tensor([[True, False]]), "number": table[0, 0], "pooled": table}


def name(number: int) -> str:
    return f"{number:032x}"


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def same(ours: Any, theirs: Any) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours
    )


def asked(policy: Diffusion) -> list[str]:
    """What its text encoders are asked from here on."""
    texts: list[str] = []
    encode: Any = policy.family.encode
    policy.family.encode = lambda what, **how: (texts.extend(what), encode(what, **how))[1]  # type: ignore[method-assign]
    return texts


# -- the files ---------------------------------------------------------------------------------------------------------


def test_what_is_put_is_got_bit_for_bit(tmp_path: Path) -> None:
    first, second = cache(tmp_path), cache(tmp_path)
    assert first.get(name(1)) is None
    first.put(name(1), some())
    assert same(second.get(name(1)), some()) and second.get(name(2)) is None and second.dropped == 0
    assert [path.suffix for path in files(tmp_path)] == [".safetensors"], "nothing half-written is left"


def damage_pixels(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


def damage_name(data: bytes) -> bytes:
    return data.replace(b'"pooled"', b'"poolad"')


@pytest.mark.parametrize("damage", [damage_pixels, damage_name, lambda data: data[:-9], lambda data: b"", lambda data: b"{" * 99])
def test_a_damaged_file_is_dropped_counted_and_made_again(tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture) -> None:
    kept = cache(tmp_path)
    kept.put(name(1), some())
    (path,) = files(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    assert kept.get(name(1)) is None and kept.dropped == 1 and files(tmp_path) == [] and "damaged" in caplog.text
    kept.put(name(1), some())
    assert same(kept.get(name(1)), some()) and kept.dropped == 1


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    size = len(_bytes(tmp_path))
    kept = cache(tmp_path, 4.5 * size / 1000)
    for number in range(4):
        kept.put(name(number), some())
        _age(tmp_path, number, 100 - number)
    assert kept.get(name(0)) is not None  # and so it is the one that was used last
    kept.put(name(4), some())
    assert [number for number in range(5) if kept.get(name(number)) is not None] == [0, 2, 3, 4]
    kept.put(name(5), some(numbers=3000))
    assert kept.get(name(5)) is None and len(files(tmp_path)) == 4, "what would take all the room is not kept"


def _bytes(folder: Path) -> bytes:
    kept = cache(folder / "size")
    kept.put(name(0), some())
    (path,) = files(folder / "size")
    data = path.read_bytes()
    path.unlink()
    return data


def _age(folder: Path, number: int, seconds: float) -> None:
    path = folder / name(number)[:2] / f"{name(number)}.safetensors"
    used = path.stat().st_mtime - seconds
    os.utime(path, (used, used))


def test_only_its_own_files_are_removed_and_what_nobody_finished(tmp_path: Path) -> None:
    kept = cache(tmp_path, 1.0)
    notes, old, new = tmp_path / "00" / "notes.txt", tmp_path / "00" / "x.part", tmp_path / "00" / "y.part"
    notes.parent.mkdir()
    for path in (notes, old, new):
        path.write_bytes(b"-" * 2000)
    os.utime(old, (0, 0))
    for number in range(8):
        kept.put(name(number), some(number))
    assert notes.exists() and new.exists() and not old.exists()
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 1000


def test_others_that_write_there_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_LOOK", 4)
    size = len(_bytes(tmp_path))
    ours, theirs = cache(tmp_path, 10.5 * size / 1000), cache(tmp_path)
    for number in range(13):  # ours counts five of them, and sees all thirteen
        (ours if number % 3 == 0 else theirs).put(name(number), some())
        _age(tmp_path, number, 100 - number)
    assert sum(theirs.get(name(number)) is not None for number in range(13)) == 9


def _write(folder: str, start: int) -> None:
    kept = cache(Path(folder), 6.0)
    for number in range(40):
        at = (start + number) % 10
        found = kept.get(name(at))
        assert found is None or same(found, some(at))
        kept.put(name(at), some(at))
    os._exit(1 if kept.dropped else 0)


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(str(tmp_path), start)) for start in (0, 5)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert files(tmp_path) and all(path.suffix == ".safetensors" for path in files(tmp_path))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file: cannot be written .* set policy\.prompt_cache\.folder"):
        cache(tmp_path / "file")


# -- the policy --------------------------------------------------------------------------------------------------------


def test_a_second_policy_asks_no_encoder_and_draws_the_same(sd3: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"prompt_cache": {"folder": str(tmp_path)}}
    first, second, plain = tiny.build(sd3, **fields), tiny.build(sd3, **fields), tiny.build(sd3)
    ours, theirs = asked(first), asked(second)
    made = [policy.act(tiny.observe(), tiny.draws(), explore=True).trace["clean"] for policy in (first, second, plain)]
    assert sorted(ours) == sorted({*tiny.TEXTS, ""}) and theirs == []
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    # The branch without text is a prompt of its own.
    second.act(tiny.observe(("",)), tiny.draws(0, 1), explore=True)
    assert theirs == [""]


def changed_weight(policy: Diffusion) -> None:
    policy.family.pipeline.text_encoder.text_model.final_layer_norm.weight.data[0] += 1e-3


def changed_config(policy: Diffusion) -> None:
    policy.family.pipeline.text_encoder_2.config.num_attention_heads = 4


def changed_tokenizer(policy: Diffusion) -> None:
    policy.family.pipeline.tokenizer.add_tokens(["quite"])


def changed_option(policy: Diffusion) -> None:
    policy.family.max_text_tokens = 4


def changed_vae(policy: Diffusion) -> None:
    policy.family.edits = True  # pictures that are shown are part of an embedding then


@pytest.mark.parametrize("change", [changed_weight, changed_config, changed_tokenizer, changed_option, changed_vae])
def test_another_encoder_reads_nothing_of_it(sd3: str, tmp_path: Path, change: Any) -> None:
    fields: dict[str, Any] = {"prompt_cache": {"folder": str(tmp_path)}}
    first, same_one, other = (tiny.build(sd3, **fields) for _ in range(3))
    assert encoders_digest(first.family) == encoders_digest(same_one.family)
    tiny.stir(same_one, seed=8)
    assert encoders_digest(first.family) == encoders_digest(same_one.family), "the network is no part of it"
    change(other)
    assert encoders_digest(first.family) != encoders_digest(other.family)


def test_encoders_that_learn_are_not_kept(sd3: str) -> None:
    with pytest.raises(ValueError, match="prompt_cache is not used with train 'text_encoders'"):
        tiny.config(sd3, train="text_encoders", prompt_cache={})
