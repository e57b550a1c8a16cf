"""Truncated, damaged and hostile GGUF files end in one line: nothing crashes, hangs or takes much memory."""

from __future__ import annotations

import random
import re
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind

from litgpt_kv.__main__ import main
from litgpt_kv.convert.checkpoint import convert
from litgpt_kv.convert.configs import config_of
from litgpt_kv.convert.gguf_file import GGUFFile
from tests.convert.tiny import CHATML, make_model, write_gguf

MANY = 2**60


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "m.gguf"
    write_gguf(path, "smollm", make_model("smollm"), quant=Kind.Q8_0)
    return path.read_bytes()


def refused(path: Path, out: Path) -> str:
    """The message with which a file is refused; it is one line and names the file, and nothing was left."""
    with pytest.raises(ValueError) as error:
        convert(path, out)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600 and path.name in message
    assert not out.exists() and not list(out.parent.glob(".*.tmp"))
    return message


def test_every_truncation_is_refused(whole: bytes, tmp_path: Path) -> None:
    rng = random.Random(3)
    path = tmp_path / "m.gguf"
    for size in [0, 1, 4, 7, 8, 23, 24, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(60))]:
        path.write_bytes(whole[:size])
        refused(path, tmp_path / "out")


def test_flipped_bytes_are_refused_or_change_a_weight(whole: bytes, tmp_path: Path) -> None:
    """In the head, where the meaning is; a flipped byte of a name or a number may still be a good file."""
    rng = random.Random(4)
    path, seen = tmp_path / "m.gguf", {"refused": 0, "converted": 0}
    head = whole.index(b"output_norm.weight") + 4000
    for n in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3])):
            data[rng.randrange(4, min(head, len(data)))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        path.write_bytes(data)
        try:
            convert(path, tmp_path / str(n))
            seen["converted"] += 1
        except ValueError as error:
            assert "\n" not in str(error) and path.name in str(error)
            seen["refused"] += 1
    assert seen["refused"] > 20 and seen["converted"] > 5


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def file_of(keys: list[bytes], tensors: list[bytes] = (), counts: tuple[int, int] | None = None) -> bytes:
    """A file of so many encoded keys and tensors; `counts` (tensors, keys) may lie."""
    counts = (len(tensors), len(keys)) if counts is None else counts
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(keys) + b"".join(tensors) + bytes(4096)


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return text(b"a") + struct.pack("<IIQ", 9, kind, count) + data


def number(key: bytes, value: int) -> bytes:
    return text(key) + struct.pack("<II", 4, value)


def tensor(name: bytes, sizes: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


HOSTILE = {
    "no-gguf": (b"PK\x03\x04" + bytes(100), "no GGUF file"),
    "version": (b"GGUF" + struct.pack("<IQQ", 77, 0, 0), "version 77"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensors": (file_of([], counts=(MANY, 0)), "tensors, over the limit"),
    "keys": (file_of([], counts=(0, MANY)), "keys, over the limit"),
    "few-keys": (file_of([], counts=(0, 60_000)), "cannot be read"),
    "bytes": (file_of([array(0, MANY)]), "over|more than the limit"),
    "bytes-in-limit": (file_of([array(0, 2**22)]), "truncated or damaged"),
    "texts": (file_of([array(8, 2**22)]), "truncated or damaged"),
    "text": (file_of([text(b"a") + struct.pack("<IQ", 8, MANY)]), "truncated or damaged"),
    "name": (file_of([struct.pack("<Q", MANY)]), "a name of"),
    "deep": (file_of([text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 500]), "nested deeper"),
    "kind": (file_of([text(b"a") + struct.pack("<I", 99)]), "unknown type 99"),
    "no-utf8": (file_of([text(b"\xff\xfe") + struct.pack("<II", 4, 1)]), "no UTF-8"),
    "twice": (file_of([number(b"a", 1), number(b"a", 2)]), "key 'a' twice"),
    "alignment": (file_of([number(b"general.alignment", 3)]), "power of two"),
    "alignment-0": (file_of([number(b"general.alignment", 0)]), "power of two"),
    "dimensions": (file_of([], [text(b"t") + struct.pack("<I", 2**31)]), "dimensions"),
    "sizes": (file_of([], [tensor(b"t", (2**62, 2**62))]), "has the sizes"),
    "no-size": (file_of([], [tensor(b"t", (0, 4))]), "has the sizes"),
    "large": (file_of([], [tensor(b"t", (2**39, 2**39))]), "truncated"),
    "offset": (file_of([], [tensor(b"t", (8,), offset=2**63)]), "truncated"),
    "unaligned": (file_of([], [tensor(b"t", (8,), offset=5)]), "multiple of 32"),
    "type": (file_of([], [tensor(b"t", (32,), kind=255)]), "unknown type 255"),
    "blocks": (file_of([], [tensor(b"t", (33,), kind=2)]), "no whole blocks"),
    "same-tensor": (file_of([], [tensor(b"t", (8,))] * 2), "tensor 't' twice"),
    "overlap": (file_of([], [tensor(b"%d" % n, (512,)) for n in range(400)]), "tensors overlap"),
    "nothing": (file_of([]), "lack 'general.architecture'"),
    "control": (file_of([text(b"general.architecture") + struct.pack("<I", 8) + text(b"\x1b[31m\nx")]), r"\\x1b\[31m"),
    "unknown": (file_of([text(b"general.architecture") + struct.pack("<I", 8) + text(b"mamba")]), "'mamba' is not one"),
    "number": (file_of([number(b"general.architecture", 1)]), "must be str, got 1"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name: str, tmp_path: Path) -> None:
    data, says = HOSTILE[name]
    (tmp_path / "m.gguf").write_bytes(data)
    message = refused(tmp_path / "m.gguf", tmp_path / "out")

    assert re.search(says, message), message


def test_memory_and_time_are_bounded(tmp_path: Path) -> None:
    began = time.monotonic()
    for name, (data, _) in HOSTILE.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(data)
        tracemalloc.start()
        with pytest.raises(ValueError):
            config_of(GGUFFile(path))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20_000_000, name
    assert time.monotonic() - began < 20


# -- files that are whole, but not what they say -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"llama.block_count": 3}, "2 layers, and its metadata say 3"),
        ({"llama.block_count": 10**9}, "n_layer is over the limit"),
        ({"llama.embedding_length": 64}, "does not fit its metadata|contradict"),
        ({"llama.embedding_length": 0}, "embedding_length must be positive"),
        ({"llama.attention.head_count": 0}, "head_count must be positive"),
        ({"llama.attention.head_count_kv": 3}, "do not divide"),
        ({"llama.attention.head_count_kv": [2, 1]}, "differs between layers"),
        ({"llama.attention.value_length": 4}, "litgpt has one size"),
        ({"llama.rope.dimension_count": 99}, "more than the head size"),
        ({"llama.rope.freq_base": float("nan")}, "must be finite"),
        ({"llama.rope.freq_base": 10000.5}, "whole numbers"),
        ({"llama.rope.scaling.type": "yarn"}, "scaled by 'yarn'"),
        ({"llama.context_length": "long"}, "context_length must be int or list"),
        ({"llama.context_length": 2**31}, "block_size is over the limit"),
        ({"llama.expert_count": 8}, "mixture of 8 experts"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"tokenizer.ggml.tokens": ["x"] * 9999}, "9,999 tokens for 320"),
        ({"general.name": 7}, "general.name must be str"),
    ],
    ids=lambda value: "-".join(f"{k}={v}"[:30] for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_metadata_that_do_not_fit(
    change: dict, says: str, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").write_bytes(whole)
    read = GGUFFile._read
    monkeypatch.setattr(GGUFFile, "_read", lambda self: (read(self), self.metadata.update(change)))
    message = refused(tmp_path / "m.gguf", tmp_path / "out")

    assert re.search(says, message), message


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b"blk.1.attn_q.weight", b"blk.1.attn_x.weight", "lacks the tensor 'blk.1.attn_q.weight'"),
        (b"blk.1.attn_q.weight", b"blk.9.attn_q.weight", "3 layers"),
        (b"output_norm.weight", b"output_morn.weight", "lacks the tensor 'output_norm.weight'"),
    ],
)
def test_tensors_that_are_not_litgpts(old: bytes, new: bytes, says: str, whole: bytes, tmp_path: Path) -> None:
    assert whole.count(old) == 1
    (tmp_path / "m.gguf").write_bytes(whole.replace(old, new))
    assert says in refused(tmp_path / "m.gguf", tmp_path / "out")


def test_a_tensor_too_many_is_refused(whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(whole)
    read = GGUFFile._read

    def more(self: GGUFFile) -> None:
        read(self)
        self.tensors["blk.0.attn_output.bias"] = self.tensors["blk.0.attn_norm.weight"]

    monkeypatch.setattr(GGUFFile, "_read", more)
    assert "'blk.0.attn_output.bias', which litgpt's model lacks" in refused(tmp_path / "m.gguf", tmp_path / "out")


def test_weights_that_are_not_finite_are_refused(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(whole)
    start = GGUFFile(tmp_path / "m.gguf").tensors["blk.1.ffn_down.weight"].start
    data = bytearray(whole)
    data[start : start + 2] = b"\x00\x7c"  # the first scale, float16: infinity
    (tmp_path / "m.gguf").write_bytes(data)
    assert "'blk.1.ffn_down.weight' has numbers that are not finite" in refused(tmp_path / "m.gguf", tmp_path / "out")


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command(whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_gguf(tmp_path / "chat.gguf", "qwen2", make_model("qwen2"), template=CHATML)
    folder = tmp_path / "made" / "here"
    main(["convert_gguf", str(tmp_path / "chat.gguf"), "--out", str(folder)])
    done = capsys.readouterr()
    assert "MB of weights in float32, prompt style" in done.out and f"litgpt_kv chat {folder}" in done.err
    main(["generate", str(folder), "--prompt", "Hi", "--max-new-tokens", "3", "--accelerator", "cpu"])
    assert "Hi" in capsys.readouterr().out
    (tmp_path / "m.gguf").write_bytes(whole[:5000])
    for arguments, says in (
        ([str(tmp_path / "m.gguf"), "--out", str(tmp_path / "new")], "truncated"),
        ([str(tmp_path / "none.gguf"), "--out", str(tmp_path / "new")], "there is no such file"),
        ([str(tmp_path), "--out", str(tmp_path / "new")], "it is no file"),
        ([str(tmp_path / "chat.gguf"), "--out", str(folder)], "is there already"),
        ([str(tmp_path / "chat.gguf"), "--out", str(tmp_path / "chat.gguf")], "is there already"),
        ([str(tmp_path / "chat.gguf"), "--out", str(tmp_path / "chat.gguf" / "x")], "cannot be written"),
        ([str(tmp_path / "chat.gguf"), "--out", str(tmp_path / "new"), "--dtype", "int3"], "dtype must be one of"),
        ([str(tmp_path / "chat.gguf")], "out"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["convert_gguf", *arguments])
        error = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 2 and len(error) == 1 and says in error[0], error
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_said_before(whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(whole)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert "do not fit the 0.0 GB that the disk has free" in refused(tmp_path / "m.gguf", tmp_path / "out")
