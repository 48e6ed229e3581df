"""Shards: round trips, atomic writing, and every way in which a folder can be bad."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from shard_samples import (
    GEOMETRY,
    change_tensors,
    header_of,
    make_shards,
    picture_frame,
    text_frame,
)

from l4cli.data.packing import BestFitPacker, Rows
from l4cli.data.pieces import Splitter
from l4cli.data.shards import ShardSet, ShardWriter
from l4cli.errors import L4Error
from l4cli.text import load_tokenizer


def packed(*frames, seq_len: int = 64) -> Rows:
    tokenizer = load_tokenizer("bytes")
    splitter, packer = Splitter(seq_len), BestFitPacker(seq_len, 64 * seq_len, None)
    splitter.begin_stream("x", lambda: (tokenizer.image_start_id, tokenizer.image_end_id))
    parts = [rows for frame in frames for rows in packer.add(splitter.add(frame))]
    return Rows.join(parts + list(packer.finish()))


@pytest.mark.parametrize("options", [{}, {"shard_rows": 3}, {"shard_bytes": 2000}])
def test_round_trip(tmp_path, options) -> None:
    frames = [text_frame(0), picture_frame(1), text_frame(2)]
    index = make_shards(tmp_path / "s", *frames, **options)
    rows, shards = packed(*frames), ShardSet.open(tmp_path / "s")
    assert shards.num_rows == rows.num_rows == index["num_rows"]
    assert (len(index["shards"]) > 1) == bool(options)
    assert shards.num_tokens == sum(frame.num_tokens for frame in frames)
    assert shards.index["fill"] == shards.num_tokens / (shards.num_rows * 64)
    assert shards.num_media == len(frames[1].media)
    assert shards.geometry == GEOMETRY
    assert shards.tokenizer().fingerprint == shards.fingerprint
    label = 0
    for i in range(rows.num_rows):
        row = shards.row(i)
        np.testing.assert_array_equal(row.input_ids, rows.input_ids[i])
        np.testing.assert_array_equal(row.document_ids, rows.document_ids[i])
        assert rows.loss_mask is not None
        mask = np.ones(64) if row.loss_mask is None else row.loss_mask
        # Padding has no mask of its own.
        is_token = row.document_ids > 0
        np.testing.assert_array_equal(mask[is_token], rows.loss_mask[i][is_token])
        mine = np.flatnonzero(rows.media_rows == i)
        assert row.media == [rows.media[m] for m in mine]
        np.testing.assert_array_equal(row.media_positions, rows.media_positions[mine])
        np.testing.assert_array_equal(row.media_tiles, rows.media_tiles[mine])
        num = int(rows.num_documents[i])
        codes = rows.labels["lang"][label : label + num].tolist()
        values = [None if code < 0 else ["el", "en"][code] for code in codes]
        assert row.labels.get("lang", [None] * num) == values
        label += num
    assert shards.verify() == []


def test_shards_are_plain_safetensors(tmp_path) -> None:
    make_shards(tmp_path / "s", picture_frame(0), text_frame(1))
    tensors = load_file(tmp_path / "s" / "shard-00000.safetensors")
    assert {name: tensor.dtype.name for name, tensor in tensors.items()} == {
        "input_ids": "uint32",
        "document_ids": "int32",
        "loss_mask": "uint8",
        "media": "uint8",
        "media_offsets": "int64",
        "media_positions": "int64",
        "media_tiles": "int32",
        "document_offsets": "int64",
        "label.lang": "int32",
    }
    patch = load_tokenizer("bytes").patch_id
    flat = tensors["input_ids"].reshape(-1)
    assert (flat[tensors["media_positions"]] == patch).all()
    assert (flat[tensors["media_positions"] - 1] != patch).all()


def test_same_input_same_bytes(tmp_path) -> None:
    for name in ("a", "b"):
        make_shards(tmp_path / name, text_frame(0), picture_frame(1), shard_rows=4)
    a = {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*.*")}
    b = {p.relative_to(tmp_path / "b"): p.read_bytes() for p in (tmp_path / "b").rglob("*.*")}
    assert a == b
    assert ShardSet.open(tmp_path / "a").digest == ShardSet.open(tmp_path / "b").digest


def test_a_mask_of_ones_is_not_written(tmp_path) -> None:
    frame = text_frame(0)
    assert frame.loss_mask is not None
    frame.loss_mask[:] = 1
    make_shards(tmp_path / "s", frame)
    assert ShardSet.open(tmp_path / "s").row(0).loss_mask is None


def test_rows_are_read_by_slices(tmp_path) -> None:
    """Reading a row of a 16 MiB file allocates kilobytes."""
    rng = np.random.default_rng(0)
    frame = text_frame(0, num_documents=3000, mean=700)
    frame.tokens = rng.integers(0, 256, frame.num_tokens).astype(np.uint32)
    make_shards(tmp_path / "s", frame, seq_len=1024)
    assert (tmp_path / "s" / "shard-00000.safetensors").stat().st_size > 16 << 20
    shards = ShardSet.open(tmp_path / "s")
    tracemalloc.start()
    for i in range(0, shards.num_rows, 100):
        shards.row(i)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000


def test_open_shards_are_bounded(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("l4cli.data.shards._OPEN_SHARDS", 2)
    make_shards(tmp_path / "s", text_frame(0), shard_rows=1)
    shards = ShardSet.open(tmp_path / "s")
    rows = [shards.row(i).input_ids for i in range(shards.num_rows)]
    assert len(shards._open) == 2
    for i in reversed(range(shards.num_rows)):
        np.testing.assert_array_equal(shards.row(i).input_ids, rows[i])


# Writing: whole or not at all.


def test_folder_that_holds_something_is_refused(tmp_path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine.txt").write_text("keep")
    with pytest.raises(L4Error, match="not empty"):
        make_shards(tmp_path / "s", text_frame(0))
    assert (tmp_path / "s" / "mine.txt").read_text() == "keep"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]
    with pytest.raises(L4Error, match="a file stands there"):
        make_shards(tmp_path / "s" / "mine.txt", text_frame(0))


def test_empty_folders_and_links_to_them_are_filled(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    make_shards(tmp_path / "empty", text_frame(0))
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    make_shards(tmp_path / "link", text_frame(0))
    make_shards(tmp_path / "new" / "deep" / "s", text_frame(0))
    for name in ("empty", "there", "new/deep/s"):
        ShardSet.open(tmp_path / name)
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "link", "new", "there"]


def test_current_folder_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(L4Error, match="current folder"):
        make_shards(Path("."), text_frame(0))


def _fail(writer: ShardWriter, staged: Path, error: type[BaseException]) -> None:
    writer.add(packed(text_frame(0)))
    assert list(staged.iterdir())
    raise error


def test_failure_leaves_nothing(tmp_path) -> None:
    packing = {"method": "best-fit"}
    for error in (KeyboardInterrupt, ValueError):
        writer = ShardWriter(tmp_path / "s", seq_len=64, packing=packing, shard_rows=1)
        with pytest.raises(error), writer:
            _fail(writer, tmp_path / ".s.partial", error)
        assert list(tmp_path.iterdir()) == []


def test_no_document_is_an_error(tmp_path) -> None:
    with pytest.raises(L4Error, match="no document"):
        make_shards(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_second_writer_is_refused(tmp_path) -> None:
    with ShardWriter(tmp_path / "s", seq_len=64, packing={}) as writer:
        with pytest.raises(L4Error, match="is writing it") as caught:
            make_shards(tmp_path / "s", text_frame(0))
        assert str(os.getpid()) in caught.value.why
        writer.add(packed(text_frame(0)))
        writer.finish(header_of(load_tokenizer("bytes")), {"lang": ["el", "en"]})
    assert ShardSet.open(tmp_path / "s").verify() == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


_WRITER = """
import sys, time
sys.path.insert(0, {here!r})
from test_shards import *
with ShardWriter({folder!r}, seq_len=64, packing={{}}, shard_rows=1) as writer:
    writer.add(packed(text_frame(0)))
    print("ready", flush=True)
    time.sleep(60)
"""


def test_killed_writer_is_cleaned_up_by_the_next(tmp_path) -> None:
    code = _WRITER.format(here=str(Path(__file__).parent), folder=str(tmp_path / "s"))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "s").exists()
    assert (tmp_path / ".s.partial").exists()
    with pytest.raises(L4Error, match="no such folder"):
        ShardSet.open(tmp_path / "s")
    make_shards(tmp_path / "s", text_frame(1))
    assert ShardSet.open(tmp_path / "s").verify() == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


def test_full_disk_is_an_error_that_leaves_nothing(tmp_path) -> None:
    """The system's limit on file sizes stands in for a full disk: the same call fails."""
    code = (
        f"import resource, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_shards import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        f"try: make_shards(Path({str(tmp_path / 's')!r}), text_frame(0, 200))\n"
        "except L4Error as error: print(error.what, '|', error.why)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout
    assert "file too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


# Reading: nothing bad is taken for good.


@pytest.fixture
def folder(tmp_path) -> Path:
    make_shards(tmp_path / "s", text_frame(0), picture_frame(1), shard_rows=8)
    return tmp_path / "s"


def _use(folder: Path, read: bool) -> None:
    shards = ShardSet.open(folder)
    for i in range(shards.num_rows if read else 0):
        shards.row(i)


def error_of(folder: Path, read: bool = False) -> L4Error:
    with pytest.raises(L4Error) as caught:
        _use(folder, read)
    assert caught.value.fix
    return caught.value


def change_index(folder: Path, **fields) -> None:
    index = json.loads((folder / "index.json").read_text())
    index.update(fields)
    (folder / "index.json").write_text(json.dumps(index))


def test_missing_and_foreign_folders(tmp_path, folder) -> None:
    assert "no such folder" in error_of(tmp_path / "none").why
    (tmp_path / "x.tokens").write_bytes(b"x")
    error = error_of(tmp_path / "x.tokens")
    assert "it is a file" in error.why
    assert "l4 pack" in error.fix
    (tmp_path / "empty").mkdir()
    assert "`index.json` is missing" in error_of(tmp_path / "empty").why
    for text in ("", "{", "[]", '"x"', "\xff", '{"format": "other"}', '{"weight_map": {}}'):
        (folder / "index.json").write_text(text)
        assert "index.json" in error_of(folder).why


def test_index_of_another_version(folder) -> None:
    change_index(folder, version=2)
    assert "version 2" in error_of(folder).why


@pytest.mark.parametrize(
    "fields",
    [
        {"seq_len": 0},
        {"seq_len": "64"},
        {"seq_len": True},
        {"num_rows": 5},
        {"num_media": 1},
        {"vocab_size": -3},
        {"fingerprint": None},
        {"geometry": None},
        {"geometry": {"image_size": 16}},
        {"labels": {"lang": [3]}},
        {"shards": []},
        {"shards": [{"file": "../x"}]},
        {"files": {"../../etc/passwd": {"sha256": ""}}},
        {"files": []},
        {"packing": 3},
    ],
)
def test_damaged_index(folder, fields) -> None:
    change_index(folder, **fields)
    error_of(folder)


def test_missing_and_truncated_shards(folder) -> None:
    path = folder / "shard-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    error = error_of(folder)
    assert "shard-00001" in error.why
    assert str(len(data) - 1) in error.why
    path.write_bytes(b"\xff" * len(data))
    assert "not valid safetensors" in error_of(folder).why
    path.unlink()
    assert "missing" in error_of(folder).why


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.update(input_ids=t["input_ids"][:, :-1].copy()), "`input_ids`"),
        (lambda t: t.update(input_ids=t["input_ids"].astype(np.int64)), "`input_ids`"),
        (lambda t: t.update(document_ids=t["document_ids"][:-1].copy()), "`document_ids`"),
        (lambda t: t.update(loss_mask=t["loss_mask"].astype(np.int32)), "`loss_mask`"),
        (lambda t: t.pop("document_ids"), "`document_ids`"),
        (lambda t: t.pop("media"), "`media`"),
        (lambda t: t.pop("document_offsets"), "`document_offsets`"),
        (lambda t: t.update(media_offsets=t["media_offsets"][:-1].copy()), "`media_offsets`"),
        (lambda t: t.update(media_tiles=t["media_tiles"][:, :1].copy()), "`media_tiles`"),
    ],
)
def test_wrong_shapes(folder, change, why) -> None:
    change_tensors(folder, change)
    assert why in error_of(folder).why


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t["input_ids"].__setitem__((1, 5), 277), "token id 277"),
        (lambda t: t["input_ids"].__setitem__((1, 5), 2**32 - 1), "token id 4294967295"),
        (lambda t: t["media_offsets"].__setitem__(0, 1), "`media_offsets`"),
        (lambda t: t["media_offsets"].__setitem__(-1, 10**12), "`media_offsets`"),
        (lambda t: t["media_offsets"].__setitem__(1, 10**12), "`media_offsets`"),
        (lambda t: t["media_positions"].__setitem__(0, -1), "`media_positions`"),
        (lambda t: t["media_positions"].__setitem__(-1, 10**9), "`media_positions`"),
        (lambda t: t["media_tiles"].__setitem__((0, 0), 0), "`media_tiles`"),
        (lambda t: t["document_offsets"].__setitem__(1, 10**9), "label"),
        (lambda t: t["label.lang"].__setitem__(slice(None), 7), "label"),
    ],
)
def test_wrong_values(folder, change, why) -> None:
    """Found when the row is read, and by `verify` even if the hash fits."""
    change_tensors(folder, change)
    error = error_of(folder, read=True)
    assert why in error.why
    assert error.why.count("shard-") == 1
    assert any(why in problem for problem in ShardSet.open(folder).verify())


def test_verify_finds_changed_bytes_and_lost_files(folder) -> None:
    shards = ShardSet.open(folder)
    assert shards.verify() == []
    path = folder / "shard-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    problems = ShardSet.open(folder).verify()
    assert any("shard-00000" in problem and "SHA-256" in problem for problem in problems)
    assert any("tokenizer_config.json" in problem for problem in problems)


def test_verify_sees_documents_out_of_order(folder) -> None:
    change_tensors(folder, lambda t: t["document_ids"].__setitem__((0, 3), 9))
    assert any("documents" in problem for problem in ShardSet.open(folder).verify())


def test_other_tokenizer_is_refused(folder) -> None:
    change_index(folder, fingerprint="0" * 64)
    with pytest.raises(L4Error, match="tokenizer"):
        ShardSet.open(folder).tokenizer()


def test_many_rows_open_fast(tmp_path) -> None:
    """`open` reads headers, so that its time does not grow with the data."""
    make_shards(tmp_path / "s", text_frame(0, num_documents=20000), shard_rows=2000)
    began = time.process_time()
    ShardSet.open(tmp_path / "s")
    assert time.process_time() - began < 0.5
