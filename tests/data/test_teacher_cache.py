"""The teacher cache: read back by a plain loop, by any batch layout, after any interruption."""

from __future__ import annotations

import json
import math
import resource
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_samples import OPTIONS, drawn_row, files_of, labels_of, make_cache, num_targets
from cache_samples import write_rows as write_drawn
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from shard_samples import change_tensors, make_shards, picture_frame, text_frame

from l4cli.data.loader import ShardSource, eval_batches
from l4cli.data.shards import ShardSet
from l4cli.data.teacher_cache import TeacherCache
from l4cli.data.teacher_cache_writer import CacheOptions, TeacherCacheWriter
from l4cli.data.teacher_entries import decode_entries, decode_entropy
from l4cli.errors import L4Error, UsageError


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Text with masked targets in several shards, pictures, and the cache of both."""
    folder = tmp_path_factory.mktemp("made")
    make_shards(folder / "text", text_frame(0, 60), text_frame(1, 60), shard_rows=7)
    make_shards(folder / "pictures", picture_frame(2, 60), shard_rows=9)
    make_cache(folder / "cache", folder / "text", folder / "pictures")
    return folder


@pytest.fixture
def folders(made) -> tuple[Path, Path]:
    return made / "text", made / "pictures"


@pytest.fixture
def cache(made, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(made / "cache", tmp_path / "cache")


def test_a_plain_loop_reads_it(cache, folders) -> None:
    """With the safetensors library, the metadata of a part and nothing of ours."""
    index = json.loads((cache / "index.json").read_text())
    assert len(index["datasets"][0]["parts"]) > 2
    for dataset, folder in zip(index["datasets"], folders, strict=True):
        shards = ShardSet.open(folder)
        rows = TeacherCache.open(cache).for_shards([shards])
        assert dataset["complete"] is True
        assert dataset["digest"] == shards.digest
        for part in dataset["parts"]:
            tensors = load_file(cache / part["file"])
            with safe_open(cache / part["file"], "np") as file:
                facts = file.metadata()
            assert {name: tensor.dtype.name for name, tensor in tensors.items()} == {
                "entries": "uint32",
                "entropy": "uint8",
                "row_offsets": "int64",
                "row_crc": "uint32",
            }
            assert facts["dataset"] == shards.digest
            assert int(facts["first_row"]) == part["first_row"]
            num_exact, scale = int(facts["num_exact"]), int(facts["code_scale"])
            for r in range(part["rows"]):
                start, end = tensors["row_offsets"][r : r + 2]
                ids, weights, entropy = rows.row(0, part["first_row"] + r)
                assert ids[:, 0].tolist() == labels_of(shards, part["first_row"] + r).tolist()
                raw = tensors["entries"][start:end].tobytes()
                crc = zlib.crc32(raw + tensors["entropy"][start:end].tobytes())
                assert crc == tensors["row_crc"][r]
                for t in range(start, end):
                    values = [int(entry) & 0x3FFF for entry in tensors["entries"][t]]
                    p = [0 if c == 16383 else math.exp(-c / scale) for c in values[:num_exact]]
                    counts, rest = values[num_exact:], 1 - sum(p)
                    if sum(counts) and rest > 0:
                        want = p + [rest * n / sum(counts) for n in counts]
                    else:
                        want = [x / sum(p) for x in p] + [0.0] * len(counts)
                    np.testing.assert_allclose(weights[t - start], want, rtol=2e-5, atol=1e-7)
                    assert [int(entry) >> 14 for entry in tensors["entries"][t]] == ids[
                        t - start
                    ].tolist()
                    nats = int(tensors["entropy"][t]) ** 2 / int(facts["entropy_scale"])
                    assert entropy[t - start] == pytest.approx(nats, rel=1e-6)


def test_at_most_130_bytes_a_token_at_32_entries(tmp_path) -> None:
    """All files of the cache, index and headers too."""
    make_shards(tmp_path / "text", text_frame(0, 300, 60), seq_len=128)
    options = CacheOptions("t", "t0")
    assert options.num_exact + options.num_drawn == 32
    make_cache(tmp_path / "cache", tmp_path / "text", options=options, part_bytes=1 << 20)
    size = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert size / num_targets(tmp_path / "text") <= 130
    facts = TeacherCache.open(tmp_path / "cache").describe()
    assert facts["num_tokens"] == num_targets(tmp_path / "text")
    assert facts["is_complete"] is True
    assert facts["bytes_per_token"] < 130


def source(*specs, cache: Path, batch_size: int = 4, micro_batch_size: int = 2, **options):
    return ShardSource(
        [str(spec) for spec in specs],
        **{"seed": 0, "attention_chunk_size": 16, **options},
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        teacher_cache=TeacherCache.open(cache),
    )


def flat(batches) -> dict[str, torch.Tensor]:
    """A step's targets and what the teacher says about them, one after the other."""
    assert all(batch.teacher is not None for batch in batches)
    return {
        "labels": torch.cat([b.labels[b.loss_weight != 0] for b in batches]),
        "ids": torch.cat([b.teacher.ids_MK for b in batches]),
        "weights": torch.cat([b.teacher.weights_MK for b in batches]),
        "entropy": torch.cat([b.teacher.entropy_M for b in batches]),
    }


def test_any_batch_layout_and_rank_reads_the_same(cache, folders) -> None:
    """One step of 12 rows of a mixture, in the other order than written: 1 or 2 ranks, any cut."""
    specs = f"{folders[1]}:0.4", f"{folders[0]}:0.6"
    layouts = [(12, 1, 1), (3, 1, 1), (6, 1, 2), (6, 2, 1), (1, 2, 1)]
    found = []
    for micro_batch_size, world, at_once in layouts:
        batches = []
        for rank in range(world):
            ranked = source(
                *specs, cache=cache, batch_size=12, micro_batch_size=micro_batch_size,
                rank=rank, world=world, passes_at_once=at_once,
            )  # fmt: skip
            batches += ranked.next()
            ranked.close()
        found.append(flat(batches))
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in found[0])
    assert torch.equal(found[0]["ids"][:, 0], found[0]["labels"])
    assert {name: part.dtype for name, part in found[0].items()} == {
        "labels": torch.int64, "ids": torch.int64,
        "weights": torch.float32, "entropy": torch.float32,
    }  # fmt: skip
    torch.testing.assert_close(found[0]["weights"].sum(1), torch.ones(len(found[0]["ids"])))


def test_a_batch_has_its_rows_in_order(cache, folders) -> None:
    """Unshuffled rows, against the writer's own input."""
    shards = ShardSet.open(folders[0])
    loader = source(folders[0], cache=cache, micro_batch_size=4, shuffle=False)
    teacher = loader.next()[0].teacher
    loader.close()
    with TeacherCacheWriter(cache, OPTIONS, [shards]) as writer:
        uniforms = [writer.uniforms(0, row, len(labels_of(shards, row))) for row in range(4)]
    rows = [drawn_row(shards, row, uniforms[row])[0] for row in range(4)]
    ids, weights = decode_entries(np.concatenate(rows), 3)
    assert np.array_equal(teacher.ids_MK.numpy(), ids)
    assert np.array_equal(teacher.weights_MK.numpy(), weights)
    assert (teacher.num_exact, teacher.temperature) == (3, 1.0)


def test_rows_without_targets(tmp_path) -> None:
    frame = replace(text_frame(0, 30), loss_mask=np.zeros(len(text_frame(0, 30).tokens), np.uint8))
    make_shards(tmp_path / "silent", frame)
    make_cache(tmp_path / "cache", tmp_path / "silent")
    loader = source(tmp_path / "silent", cache=tmp_path / "cache")
    assert [tuple(batch.teacher.ids_MK.shape) for batch in loader.next()] == [(0, 7)] * 2
    loader.close()
    assert TeacherCache.open(tmp_path / "cache").verify() == []


@pytest.mark.parametrize("most", [1, 30, 75])
def test_continued_it_is_the_same_byte_for_byte(tmp_path, folders, cache, most) -> None:
    again = tmp_path / "again"
    make_cache(again, *folders, most=most)
    assert len(files_of(again)) < len(files_of(cache))
    make_cache(again, *folders)
    assert files_of(again) == files_of(cache)
    make_cache(again, *folders)  # nothing is left to do
    assert files_of(again) == files_of(cache)


def test_a_lost_or_torn_part_is_written_again(tmp_path, folders, cache, capsys) -> None:
    whole = files_of(cache)
    (cache / "part-00001.safetensors").unlink()
    (cache / "part-00003.safetensors").write_bytes(b"torn")
    make_cache(cache, *folders)
    assert files_of(cache) == whole
    err = capsys.readouterr().err
    assert "`part-00001.safetensors` is missing; its rows are written again" in err
    assert "`part-00003.safetensors` has 4 bytes" in err


def test_more_shards_join_a_cache(tmp_path, folders, cache) -> None:
    grown = tmp_path / "grown"
    make_cache(grown, folders[0])
    make_cache(grown, folders[1])
    assert files_of(grown) == files_of(cache)


def refused(error: type[L4Error], *words: str):
    return _Refused(error, words)


class _Refused:
    """`pytest.raises` for an error whose three lines hold all words."""

    def __init__(self, error: type[L4Error], words: tuple[str, ...]) -> None:
        self.raises, self.words = pytest.raises(error), words

    def __enter__(self) -> None:
        self.info = self.raises.__enter__()

    def __exit__(self, *trace) -> bool:
        is_raised = self.raises.__exit__(*trace)
        error = self.info.value
        for word in self.words:
            assert word in f"{error.what}\n{error.why}\n{error.fix}"
        return is_raised


def test_errors_of_opening(tmp_path, folders, cache) -> None:
    with refused(L4Error, "no such folder"):
        TeacherCache.open(tmp_path / "nothing")
    with refused(L4Error, "not that of a teacher cache"):
        TeacherCache.open(folders[0])
    path = cache / "part-00001.safetensors"
    data = path.read_bytes()
    path.unlink()
    with refused(L4Error, "`part-00001.safetensors` is missing", "--write-cache"):
        TeacherCache.open(cache)
    path.write_bytes(data[:-1])
    with refused(L4Error, f"has {len(data) - 1} bytes, the index says", "--write-cache"):
        TeacherCache.open(cache)
    path.write_bytes(data)
    index = json.loads((cache / "index.json").read_text())
    for change in (
        {"version": 2}, {"num_exact": 0}, {"temperature": None}, {"datasets": [{}]},
        {"datasets": [{**index["datasets"][0], "complete": False}]},
        {"datasets": [{**index["datasets"][0], "parts": index["datasets"][0]["parts"][1:]}]},
    ):  # fmt: skip
        (cache / "index.json").write_text(json.dumps({**index, **change}))
        with refused(L4Error, "cannot use the teacher cache"):
            TeacherCache.open(cache)
    (cache / "index.json").write_text("{")
    with refused(L4Error, "is not JSON"):
        TeacherCache.open(cache)


def test_unfinished_is_refused_where_it_is_needed(tmp_path, folders) -> None:
    with TeacherCacheWriter(
        tmp_path / "cache", OPTIONS, [ShardSet.open(f) for f in folders], 8000
    ) as writer:
        write_drawn(writer, 0)
        write_drawn(writer, 1, most=10)
    cache = TeacherCache.open(tmp_path / "cache")
    cache.for_shards([ShardSet.open(folders[0])])
    shards = ShardSet.open(folders[1])
    with refused(L4Error, "not finished: ", f"of {shards.num_rows} rows", "--write-cache"):
        cache.for_shards([shards])
    assert cache.describe()["is_complete"] is False


def test_other_shards_and_other_tokenizers(tmp_path, folders, cache) -> None:
    make_shards(tmp_path / "other", text_frame(5, 30))
    other = ShardSet.open(tmp_path / "other")
    digest = ShardSet.open(folders[0]).digest
    with refused(UsageError, "written for other shards", digest[:12], other.digest[:12]):
        source(tmp_path / "other", cache=cache)
    index = json.loads((cache / "index.json").read_text())
    index["tokenizer_fingerprint"] = "f" * 64
    (cache / "index.json").write_text(json.dumps(index))
    with refused(UsageError, "`ffffffffffff`", other.fingerprint[:12]):
        source(folders[0], cache=cache)
    with refused(UsageError, "the tokenizer was ffffffffffff", other.fingerprint[:12]):
        make_cache(cache, *folders)


def test_a_flipped_bit_is_found(folders, cache) -> None:
    """In what a student reads, and by `verify` without reading a batch."""
    assert TeacherCache.open(cache).verify() == []
    path = cache / "part-00001.safetensors"
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little") + 8
    fields = json.loads(data[8:header])
    data[header + fields["entries"]["data_offsets"][0] + 5] ^= 4
    path.write_bytes(data)
    first_row = json.loads((cache / "index.json").read_text())["datasets"][0]["parts"][1]
    opened = TeacherCache.open(cache)
    rows = opened.for_shards([ShardSet.open(folders[0])])
    rows.row(0, first_row["first_row"] - 1)
    with refused(L4Error, "`part-00001.safetensors`", "checksum", "remove `"):
        rows.row(0, first_row["first_row"])
    assert opened.verify() == [
        "`part-00001.safetensors` has another SHA-256 than the index says",
        f"`part-00001.safetensors` has another checksum in row {first_row['first_row']}",
    ]
    loader = source(folders[0], cache=cache, batch_size=100, micro_batch_size=10)
    with pytest.raises(L4Error, match="checksum"):
        loader.next()
    loader.close()


def test_another_layout_in_a_part_is_an_error(folders, cache) -> None:
    path = cache / "part-00000.safetensors"
    tensors, size = load_file(path), path.stat().st_size
    tensors["entries"] = tensors["entries"].astype(np.int32)
    save_file(tensors, path)
    index = json.loads((cache / "index.json").read_text())
    index["datasets"][0]["parts"][0]["bytes"] = path.stat().st_size
    assert path.stat().st_size != size
    (cache / "index.json").write_text(json.dumps(index))
    rows = TeacherCache.open(cache).for_shards([ShardSet.open(folders[0])])
    with refused(L4Error, "`part-00000.safetensors` cannot be read", "`entries` is"):
        rows.row(0, 0)


def test_targets_that_differ_from_the_shards(tmp_path, folders, cache) -> None:
    """A mask changed behind the back of the shards' index, and a label."""

    def add_targets(tensors) -> None:
        tensors["loss_mask"][:] = 1

    changed = shutil.copytree(folders[0], tmp_path / "changed")
    change_tensors(changed, add_targets, 0)
    index = json.loads((cache / "index.json").read_text())
    index["datasets"][0]["digest"] = ShardSet.open(changed).digest
    (cache / "index.json").write_text(json.dumps(index))
    loader = source(changed, cache=cache, batch_size=8, shuffle=False)
    with pytest.raises(L4Error, match=r"row 1 of data set 0 has .* targets there and "):
        loader.next()
    loader.close()

    rows = TeacherCache.open(cache).for_shards([ShardSet.open(folders[1])])
    batches = list(eval_batches(folders[1], 1, None, max_rows=2))
    assert len(rows.targets([(0, 1)], batches[1]).ids_MK) > 0
    wrong = replace(batches[1], labels=batches[1].labels ^ 1)
    with pytest.raises(L4Error, match="labels are not those of the shards"):
        rows.targets([(0, 1)], wrong)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"teacher_fingerprint": "t1"}, "`--teacher` was t0, now it is t1"),
        ({"num_exact": 4}, "`--top-k` was 2, now it is 3"),
        ({"num_drawn": 5}, "`--tail-samples` was 4, now it is 5"),
        ({"temperature": 2}, "`--temperature` was 1, now it is 2"),
        ({"seed": 8}, "`--seed` was 7, now it is 8"),
    ],
)
def test_a_cache_is_continued_in_the_same_way_only(folders, cache, change, named) -> None:
    whole = files_of(cache)
    with refused(UsageError, "cannot continue", named):
        make_cache(cache, *folders, options=replace(OPTIONS, **change))
    assert files_of(cache) == whole
    make_cache(cache, *folders, options=replace(OPTIONS, teacher="moved"))
    assert files_of(cache) == whole


def test_places_that_are_refused(tmp_path, folders, cache) -> None:
    shards = ShardSet.open(folders[0])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with refused(L4Error, "something else, such as `notes.txt`"):
        make_cache(tmp_path / "full", folders[0])
    with refused(L4Error, "not that of a teacher cache", "another folder"):
        make_cache(folders[0], folders[0])
    with refused(L4Error, "cannot write", "it is a file", "another folder"):
        make_cache(tmp_path / "full" / "notes.txt", folders[0])
    with (
        TeacherCacheWriter(cache, OPTIONS, [shards]),
        refused(L4Error, "another process is writing"),
        TeacherCacheWriter(cache, OPTIONS, [shards]),
    ):
        pass
    with refused(UsageError, "at least 1 exact"):
        TeacherCacheWriter(tmp_path / "c", replace(OPTIONS, num_exact=0), [shards])
    shards.vocab_size = 262_145
    with refused(L4Error, "262,145 tokens", "262,144"):
        TeacherCacheWriter(tmp_path / "c", OPTIONS, [shards])


def test_a_full_disk_keeps_what_is_written(tmp_path, folders, cache) -> None:
    """A limit on file sizes stops the write of the first part that is too large."""
    whole, target = files_of(cache), tmp_path / "small"
    make_cache(target, *folders, most=40)
    kept = {name for name in files_of(target) if name.startswith("part")}
    num_rows = TeacherCache.open(target).describe()["num_rows"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (14_000, limits[1]))
    try:
        with refused(L4Error, f"{num_rows} rows in {len(kept)} parts are kept", "continues"):
            make_cache(target, *folders)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {name for name in files_of(target) if name.startswith("part")} == kept
    make_cache(target, *folders)
    assert files_of(target) == whole


def test_a_cache_without_draws(tmp_path, folders) -> None:
    """What an endpoint's top log-probabilities give: the label, a few others, nothing else."""
    options = replace(OPTIONS, num_exact=5, num_drawn=0)
    make_cache(tmp_path / "cache", folders[0], options=options)
    rows = TeacherCache.open(tmp_path / "cache").for_shards([ShardSet.open(folders[0])])
    ids, weights, entropy = rows.row(0, 0)
    assert ids.shape == weights.shape == (len(entropy), 5)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    assert (weights[:, :-1] >= weights[:, 1:]).all()


def test_entropy_is_what_was_given(folders, cache) -> None:
    shards = ShardSet.open(folders[0])
    rows = TeacherCache.open(cache).for_shards([shards])
    for row in range(5):
        _, entropy = drawn_row(shards, row, np.zeros((len(labels_of(shards, row)), 2)))
        np.testing.assert_allclose(rows.row(0, row)[2], entropy, atol=0.06)
    assert decode_entropy(np.array([0, 255], np.uint8)).tolist() == pytest.approx([0, 12.50481])
