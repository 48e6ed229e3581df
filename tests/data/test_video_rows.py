"""Videos in rows: markers, messages, packing; what the loader gives is what was decoded."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from film_samples import grey, save_film, save_sound
from PIL import Image

from l4cli.cli import main
from l4cli.data.documents import BadInput, RawRow
from l4cli.data.geometry import PictureGeometry
from l4cli.data.loader import eval_batches
from l4cli.data.media import open_picture, tiles_of
from l4cli.data.rows import Row, parse_row
from l4cli.data.shards import ShardSet
from l4cli.data.stream import read_stream
from l4cli.data.video import Sampling, encode_film, frame_tile, sample_frames
from l4cli.text import load_tokenizer

SMALL = PictureGeometry(image_size=32, patch_size=4, max_patches=4)
NANO = PictureGeometry(image_size=64, patch_size=8)


@pytest.fixture
def folder(tmp_path) -> Path:
    save_film(tmp_path / "three.mp4", (grey(7 * i) for i in range(30)))
    save_film(tmp_path / "two.mkv", (grey(200 - 9 * i) for i in range(20)))
    Image.new("RGB", (40, 20), (9, 8, 7)).save(tmp_path / "p.png")
    return tmp_path


def frames_of(source: Path | bytes) -> list[bytes]:
    return encode_film(source, Sampling(), SMALL)[1]


def row_of(fields: object, folder: Path) -> Row:
    data = json.dumps(fields).encode()
    return parse_row(RawRow(data, "`x.jsonl` line 7", folder, is_json=True), None, frames_of)


def test_markers_take_media_of_their_kind(folder) -> None:
    three, two = frames_of(folder / "three.mp4"), frames_of(folder / "two.mkv")
    png = (folder / "p.png").read_bytes()
    assert (len(three), len(two)) == (3, 2)
    row = row_of(
        {
            "text": "a<|video|>b<|image|><|video|>c",
            "images": ["p.png"],
            "videos": ["two.mkv", "three.mp4"],
        },
        folder,
    )
    assert row.pictures == [*two, png, *three]
    assert row.texts == ["a", "", "b", "", "", "", "c"]
    row = row_of({"text": "after", "images": ["p.png"], "videos": ["two.mkv"]}, folder)
    assert (row.texts, row.pictures) == (["", "", "", "after"], [png, *two])


def test_markers_are_text_where_nothing_of_their_kind_is_named(folder) -> None:
    assert row_of({"text": "<|video|>", "videos": []}, folder).texts == ["<|video|>"]
    row = row_of({"text": "<|video|><|image|>", "images": ["p.png"]}, folder)
    assert row.texts == ["<|video|>", ""]
    row = row_of({"text": "<|image|><|video|>", "videos": ["two.mkv"]}, folder)
    assert row.texts == ["<|image|>", "", ""]


def test_videos_of_chats(folder) -> None:
    data = (folder / "two.mkv").read_bytes()
    url = "data:video/x-matroska;base64," + base64.b64encode(data).decode()
    three, two = frames_of(folder / "three.mp4"), frames_of(data)
    row = row_of(
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "video_url", "video_url": {"url": url}},
                        {"type": "text", "text": "then <|video|>?"},
                        {"type": "video", "path": "two.mkv"},
                        {"type": "image", "path": "p.png"},
                    ],
                },
                {"role": "assistant", "content": "yes"},
            ],
            "videos": ["three.mp4"],
        },
        folder,
    )
    png = (folder / "p.png").read_bytes()
    assert row.pictures == [*two, *three, *two, png]
    picture = {"type": "image"}
    assert row.messages is not None
    assert row.messages[0]["content"] == [
        *[picture] * 2,
        {"type": "text", "text": "then "},
        *[picture] * 3,
        {"type": "text", "text": "?"},
        *[picture] * 3,
    ]


@pytest.mark.parametrize(
    ("fields", "reason", "why"),
    [
        ({"text": "<|video|>" * 2, "videos": ["two.mkv"]}, "marker count", "2 `<|video|>`"),
        ({"text": "a<|image|>", "images": ["p.png"], "videos": ["two.mkv"]}, "marker count", "0 `"),
        ({"text": "a", "videos": "two.mkv"}, "wrong type", "`videos` is not a list"),
        ({"text": "a", "videos": ["no.mp4"]}, "unreadable video", "no such file"),
        ({"text": "a", "videos": ["p.png"]}, "unreadable video", "it is a picture"),
        ({"text": "a", "videos": ["sound.m4a"]}, "unreadable video", "only audio"),
        ({"text": "a", "videos": ["cut.mkv"]}, "unreadable video", "cut off"),
        ({"text": "a", "videos": ["http://x/y.mp4"]}, "unreadable video", "network"),
        ({"text": "a", "videos": ["data:video/mp4;base64,a=b"]}, "unreadable video", "base64"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "marker count",
            "names 0 videos",
        ),
    ],
)
def test_bad_videos_in_rows(folder, fields, reason, why) -> None:
    save_sound(folder / "sound.m4a")
    data = (folder / "two.mkv").read_bytes()
    (folder / "cut.mkv").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput) as caught:
        row_of(fields, folder)
    assert caught.value.reason == reason
    assert why in caught.value.why
    assert "`x.jsonl` line 7" in caught.value.what


def test_from_film_to_tiles(folder, capsys) -> None:
    """Tokenized, packed and loaded, a film gives the tiles that decoding it gives, in order."""
    rows = [
        {"text": "see <|video|> and <|image|>", "videos": ["three.mp4"], "images": ["p.png"]},
        {"text": "only text"},
        {
            "messages": [
                {"role": "user", "content": "<|video|>What?"},
                {"role": "assistant", "content": "Red."},
            ],
            "videos": ["two.mkv"],
        },
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream, shards = folder / "s.tokens", folder / "shards"
    words = [str(path), str(folder / "two.mkv"), "--preset", "nano", "--fps", "2"]
    assert main(["tokenize", *words, "--max-frames", "5", "-o", str(stream)]) == 0
    said = capsys.readouterr().err
    # At 2 a second the first film has 6 frames, and 5 are taken.
    assert "longer than `--max-frames 5` at `--fps 2`: 1 videos" in said
    assert "pictures 1  videos 3 of 13 frames" in said
    assert main(["pack", str(stream), "--seq-len", "96", "-o", str(shards), "-q"]) == 0

    three = sample_frames(folder / "three.mp4", fps=2, max_frames=5)
    two = [frame_tile(image, NANO) for _, image in sample_frames(folder / "two.mkv", fps=2)]
    png = tiles_of(open_picture((folder / "p.png").read_bytes()), NANO)
    want = [*(frame_tile(image, NANO) for _, image in three), png, *two, *two]
    with open(stream, "rb") as file:
        frames = list(read_stream(file, "s.tokens"))
    media = [item for frame in frames for item in frame.media]
    decoded = [tiles_of(open_picture(item), NANO) for item in media]
    assert np.array_equal(np.concatenate(decoded), np.concatenate(want))
    ids = np.concatenate([frame.tokens for frame in frames]).tolist()
    patch = load_tokenizer("bytes").patch_id
    assert ids.count(patch) == 16 * len(np.concatenate(want))

    # Packing may cut documents between frames and order rows anew; every tile is there once.
    loaded = [batch.pixel_values for batch in eval_batches(shards, 1, None)]
    tiles = np.concatenate([tiles.numpy() for tiles in loaded if tiles is not None])
    rest = list(np.concatenate(want))
    for tile in tiles:
        found = next(i for i, other in enumerate(rest) if np.array_equal(tile, other))
        rest.pop(found)
    assert rest == []
    assert ShardSet.open(shards).num_media == 14


def test_skip_bad_leaves_films_out(folder, capsys) -> None:
    (folder / "cut.mkv").write_bytes((folder / "two.mkv").read_bytes()[:900])
    names = [str(folder / name) for name in ("cut.mkv", "two.mkv")]
    out = ["--preset", "nano", "-o", str(folder / "s.tokens")]
    assert main(["tokenize", *names, *out]) == 1
    assert f"cannot tokenize `{names[0]}`" in capsys.readouterr().err
    assert main(["tokenize", *names, *out, "--skip-bad", "--json"]) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert done["bad"] == {"unreadable video": 1}
    assert (done["num_documents"], done["num_videos"], done["num_media"]) == (1, 1, 2)


def test_films_in_folders_wait_to_be_named(folder, capsys) -> None:
    (folder / "a.txt").write_text("text")
    assert main(["tokenize", str(folder), "-o", str(folder / "s.tokens")]) == 0
    assert "left out videos (name them, or a pattern of them, to take them): 2" in (
        capsys.readouterr().err
    )
