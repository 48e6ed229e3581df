"""`l4 chat` with videos: what the model reads, in which order, decoded while it is read."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from film_samples import grey, save_film
from tiny_chat import GEOMETRY, save_checkpoint, save_picture

from l4cli.cli import main
from l4cli.commands import chat_model
from l4cli.commands.conversation import Answer, Conversation
from l4cli.commands.shown import named_in_order
from l4cli.data import tiles as tiles_module
from l4cli.data.media import open_picture, tiles_of
from l4cli.data.video import Sampling, frame_tile, open_film, sample_frames
from l4cli.errors import L4Error
from l4cli.inference import SamplingOptions
from l4cli.text import render_chat

FRAME = 4 + 3  # tokens of one


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    save_film(folder / "a.mp4", (grey(5 * i) for i in range(50)))
    save_film(folder / "b.mkv", (grey(250 - 5 * i) for i in range(30)))
    save_picture(folder / "p.png")
    save_checkpoint(folder / "says", "Red.")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    loaded = chat_model.load(save_checkpoint(folder / "random"), "cpu", "auto", is_raw=False)
    with chat_model.fitting_threads(loaded):
        yield loaded


@pytest.fixture
def ask(monkeypatch, capsys, folder):
    """Run one command line in this process, in the films' folder."""
    monkeypatch.chdir(folder)

    def run(*words: object, piped: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped)))
        code = main(["chat", "says", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def frames_of(path: Path, **options) -> torch.Tensor:
    tiles = [frame_tile(image, GEOMETRY) for _, image in sample_frames(path, **options)]
    return torch.from_numpy(np.concatenate(tiles))


def test_a_video_is_described(ask):
    code, out, err = ask("--video", "a.mp4")
    assert (code, out) == (0, "Red.\n")
    assert f"video `a.mp4`: 64 x 48, 5.0 s: 5 frames, 1 a second, {5 * FRAME} tokens" in err
    _, out, _ = ask("--video", "a.mp4", "--json", "-q")
    default = json.loads(out)
    _, out, _ = ask("--video", "a.mp4", "--json", "-q", "-p", "Describe the video.")
    assert json.loads(out)["num_prompt_tokens"] == default["num_prompt_tokens"]
    _, out, _ = ask("--video", "a.mp4", "--fps", "4", "--max-frames", "8", "--json", "-q")
    assert json.loads(out)["num_prompt_tokens"] == default["num_prompt_tokens"] + 3 * FRAME
    _, _, err = ask("--video", "a.mp4", "--fps", "4", "--max-frames", "8")
    assert "8 frames, 1.6 a second, spread evenly over the film" in err


def test_pictures_and_videos_keep_their_order(ask):
    words = ["--video", "b.mkv", "--image", "p.png", "--video=a.mp4", "--image=p.png"]
    _, _, err = ask(*words, "-p", "hi")
    named = [line.split("`")[1] for line in err.splitlines() if line.startswith(("pict", "vid"))]
    assert named == ["b.mkv", "p.png", "a.mp4", "p.png"]


def test_order_of_the_words():
    image, video = [Path("1.png"), Path("2.png")], [Path("a.mp4")]
    words = ["x", "--image", "1.png", "--video=a.mp4", "--image", "2.png"]
    want = [("image", image[0]), ("video", video[0]), ("image", image[1])]
    assert named_in_order(words, image, video) == want
    # Words that name something else: pictures first.
    want = [("image", image[0]), ("image", image[1]), ("video", video[0])]
    assert named_in_order([*words, "-p", "--video"], image, video) == want
    assert named_in_order(["--", *words], image, video) == want


def test_the_model_sees_the_frames(model, folder):
    """Over two turns, mixed with a picture, read as prefilling all tiles at once reads them."""
    talk = Conversation(model, SamplingOptions(), max_new_tokens=3)
    picture = open_picture((folder / "p.png").read_bytes())
    talk.add_video("a", open_film(folder / "a.mp4", Sampling()))
    talk.add_picture("p", picture)
    list(talk.ask("and?", Answer()))
    talk.add_video("b", open_film(folder / "b.mkv", Sampling()))
    list(talk.ask("now?", Answer()))
    grids = [(1, 1)] * 5 + [(2, 2)]
    content = [{"type": "image"}] * 6 + [{"type": "text", "text": "and?"}]
    first = render_chat(
        model.tokenizer,
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        image_grids=grids,
        tokens_per_tile=4,
    ).ids.tolist()
    assert talk.cache.tokens[: len(first)] == first
    tiles = torch.cat(
        [
            frames_of(folder / "a.mp4"),
            torch.from_numpy(tiles_of(picture, GEOMETRY)),
            frames_of(folder / "b.mkv"),
        ]
    )
    again = model.engine.prefill(talk.cache.tokens, tiles)
    torch.testing.assert_close(again.logits_V, talk.cache.logits_V, atol=1e-4, rtol=1e-4)


def test_frames_are_decoded_while_they_are_read(model, folder, monkeypatch):
    """Stopped half way, the film is read on from there, and never as a whole."""
    monkeypatch.setattr("l4cli.commands.conversation.PREFILL_CHUNK", 2 * FRAME)
    held: list[int] = []
    tiles = tiles_module.FilmTiles.tiles

    def noted(self, start, stop):
        held.append(stop - start)
        return tiles(self, start, stop)

    monkeypatch.setattr(tiles_module.FilmTiles, "tiles", noted)
    talk = Conversation(model, SamplingOptions(), max_new_tokens=3)
    talk.add_video("a", open_film(folder / "a.mp4", Sampling(fps=4)))
    num_asked = iter(range(99))
    assert list(talk.ask("x", Answer(), should_stop=lambda: next(num_asked) >= 3)) == []
    num_read = sum(held)
    assert 0 < num_read < 20
    list(talk.ask("again", Answer()))
    assert sum(held) == 20
    assert max(held) <= 3
    again = model.engine.prefill(talk.cache.tokens, frames_of(folder / "a.mp4", fps=4))
    torch.testing.assert_close(again.logits_V, talk.cache.logits_V, atol=1e-4, rtol=1e-4)


def test_too_long_for_the_context(ask, model, folder):
    code, out, err = ask("--video", "a.mp4", "--fps", "20", "--max-frames", "100", "-p", "hi")
    assert (code, out) == (1, "")
    assert f"{100 * FRAME + 1 + (2 + 4 + 2 + 2 + 1) + (2 + 9 + 2) + 1} tokens are needed" in err
    assert "fix: take fewer frames with `--max-frames` or `--fps`" in err
    talk = Conversation(model, SamplingOptions())
    film = open_film(folder / "a.mp4", Sampling(fps=20, max_frames=100))
    with pytest.raises(L4Error, match="700 tokens are needed"):
        talk.add_video("a", film, must_fit=True)
    assert talk.waiting == []


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--video", "nowhere.mp4"], 1, "error: cannot use video `nowhere.mp4`"),
        (["--video", "p.png"], 1, "it is a picture"),
        (["--video", "says"], 1, "is a directory"),
        (["--video", "says/config.json"], 1, "damaged or cut off"),
        (["--video", "cut.mkv"], 1, "cut off"),
        (["--image", "a.mp4"], 1, "neither a PNG nor a JPEG"),
        (["--video", "a.mp4", "--fps", "0"], 2, "--fps"),
        (["--video", "a.mp4", "--fps", "nan"], 2, "--fps"),
        (["--video", "a.mp4", "--max-frames", "0"], 2, "--max-frames"),
    ],
)
def test_bad_videos_are_refused(ask, folder, words, code, message):
    data = (folder / "b.mkv").read_bytes()
    (folder / "cut.mkv").write_bytes(data[: len(data) // 2])
    got, out, err = ask(*words, "-p", "hi")
    assert (got, out) == (code, "")
    assert message in err
    assert [line.split(":")[0] for line in err.splitlines()[-3:]] == ["error", "why", "fix"]


def test_a_model_without_vision(monkeypatch, folder, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    save_checkpoint(folder / "blind", sees=False)
    code = main(["chat", str(folder / "blind"), "-p", "hi", "--video", str(folder / "a.mp4")])
    assert code == 1
    assert f"error: cannot show video `{folder}/a.mp4`" in capsys.readouterr().err


def test_conversation_takes_videos(monkeypatch, folder, model, capsys):
    """`/video PATH` at the prompt, through the same door as `/image`."""
    from l4cli.commands import repl

    lines = iter([f"/video {folder}/a.mp4", "/video", f"/video {folder}/p.png", "/exit"])
    monkeypatch.setattr("builtins.input", lambda *prompt: next(lines))
    talk = Conversation(model, SamplingOptions(), max_new_tokens=3)
    repl.talk(talk, Sampling(max_frames=2))
    err = capsys.readouterr().err
    assert f"2 frames, 0.4 a second, spread evenly over the film, {2 * FRAME} tokens" in err
    assert "error: no video named" in err
    assert "error: cannot use video" in err
    assert [shown.name for shown in talk.waiting] == [f"{folder}/a.mp4"]


def test_a_film_that_breaks_off_does_not_stand_in_the_way(model, folder, tmp_path, monkeypatch):
    """Cut off after it was opened: the error names it, and the next question is answered."""
    monkeypatch.setattr("l4cli.commands.conversation.PREFILL_CHUNK", 2 * FRAME)
    broken = tmp_path / "broken.mkv"
    shutil.copy(folder / "b.mkv", broken)
    talk = Conversation(model, SamplingOptions(), max_new_tokens=3)
    list(talk.ask("hello", Answer()))
    before = list(talk.cache.tokens) + list(talk.unread)
    talk.add_video(str(broken), open_film(broken, Sampling(fps=4)))
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(L4Error) as failed:
        list(talk.ask("what?", Answer()))
    assert f"`{broken}`" in failed.value.what
    assert talk.unread[-1] == model.tokenizer.eot_id
    list(talk.ask("and now?", Answer()))
    assert talk.cache.tokens[: len(before)] == before
    assert len(talk.unseen) == 0
