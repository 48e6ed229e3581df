"""`l4 info` on everything it accepts, and on what it does not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from l4cli.checkpoint import RunFolder, save_model, save_training_state
from l4cli.cli import main
from l4cli.data.frame import Frame
from l4cli.model import TextConfig, build_model, load_preset
from l4cli.text import load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from cache_samples import make_cache
from shard_samples import drawn, make_shards, picture_frame, text_frame, write_stream


def facts_of(capsys: pytest.CaptureFixture[str], *args: str | Path) -> dict[str, Any]:
    assert main(["info", "--json", *map(str, args)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    return json.loads(out)


def text_of(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    assert main(["info", *map(str, args)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def error_of(capsys: pytest.CaptureFixture[str], code: int, *args: str | Path) -> str:
    assert main(["info", *map(str, args)]) == code
    err = capsys.readouterr().err
    assert [line.partition(":")[0] for line in err.splitlines()] == ["error", "why", "fix"]
    return err


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny multimodal checkpoint with the bytes tokenizer."""
    config = load_preset("nano")
    config.text = TextConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, intermediate_size_mlp=64,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_local_experts=4, interleave_moe_layer_step=2, attention_chunk_size=16,
    )  # fmt: skip
    model = build_model(config, seed=0)
    folder = tmp_path / "checkpoint"
    save_model(model, folder, load_tokenizer("bytes").files(), max_shard_bytes=400_000)
    return folder


def known_documents() -> Frame:
    """Two documents: plain text, and text round a picture of 2 x 1 tiles."""
    from l4cli.text import image_block

    tokenizer = load_tokenizer("bytes")
    block = image_block(tokenizer, 2, 1, 4)
    bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
    first = [*bos, *tokenizer.encode("one\x1b[31m"), *eos]
    head = [*bos, *tokenizer.encode("look: ")]
    second = [*head, *block, *tokenizer.encode(" nice"), *eos]
    patch = int(np.flatnonzero(block == tokenizer.patch_id)[0])
    return Frame(
        np.array(first + second, np.uint32),
        np.array([0, len(first), len(first) + len(second)], np.int64),
        media=[drawn(16, 32, np.random.default_rng(0))],
        media_positions=np.array([len(first) + len(head) + patch], np.int64),
        media_tiles=np.array([[2, 1]], np.int32),
    )


def test_scout_has_the_published_counts(capsys: pytest.CaptureFixture[str]) -> None:
    facts = facts_of(capsys, "preset:scout")
    assert facts["num_parameters"] == 108_641_793_536
    assert facts["num_active_parameters"] == 17_172_894_720
    assert facts["num_vision_parameters"] == 871_932_416
    assert facts["text"]["num_moe_layers"] == 48
    assert facts["text"]["num_nope_layers"] == 12
    assert facts["vision"]["tokens_per_tile"] == 144
    assert facts["weights_bytes_bf16"] == 217_283_587_072
    assert facts["cache_bytes_bf16"] == 48 * 8192 * 4096
    text = text_of(capsys, "preset:scout")
    assert "num_parameters         108,641,793,536 (108.64B)" in text
    assert "202.4 GiB" in text


def test_behemoth_says_that_it_is_an_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    assert facts_of(capsys, "preset:behemoth")["is_estimate"] is True
    assert "is_estimate" not in facts_of(capsys, "preset:maverick")


def test_our_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = facts_of(capsys, checkpoint)
    assert facts["kind"] == "checkpoint"
    assert facts["num_parameters"] == facts["num_stored_values"]
    assert facts["dtype"] == "F32"
    assert facts["has_manifest"]
    assert not facts["has_training_state"]
    assert facts["tokenizer"]["backend"] == "bytes"
    assert len(facts["files"]) == facts["num_weight_files"] > 1
    assert len(facts["files"][0]["sha256"]) == 64
    assert "model-00001-of-" in text_of(capsys, checkpoint)
    config = facts_of(capsys, checkpoint / "config.json")
    assert config["kind"] == "config"
    assert config["num_parameters"] == facts["num_parameters"]
    shard = facts_of(capsys, checkpoint / facts["files"][0]["file"])
    assert shard["kind"] == "weights file"
    assert shard["metadata"] == {"format": "pt"}


def test_only_headers_of_weights_are_read(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """NaNs in the data do not matter, as nobody looks at the data; 60 GB would not either."""
    header_only = sorted(checkpoint.glob("model-*.safetensors"))[0]
    size = header_only.stat().st_size
    length = int.from_bytes(header_only.read_bytes()[:8], "little")
    os.truncate(header_only, 8 + length)
    os.truncate(header_only, size)  # the data are a hole now
    assert facts_of(capsys, checkpoint)["num_stored_values"] > 0
    assert "other content" in error_of(capsys, 1, checkpoint, "--verify", "-q")


def test_foreign_folders(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
    import oracle

    oracle.picture_oracle().save_pretrained(tmp_path / "hf", max_shard_size="1MB")
    capsys.readouterr()
    facts = facts_of(capsys, tmp_path / "hf")
    assert facts["num_parameters"] == facts["num_stored_values"]
    assert not facts["has_manifest"]
    assert facts["tokenizer"] is None
    assert "no `l4/manifest.json`" in error_of(capsys, 1, tmp_path / "hf", "--verify", "-q")
    keys = json.loads((tmp_path / "hf/config.json").read_text())
    keys["quantization_config"] = {"quant_method": "compressed-tensors"}
    (tmp_path / "hf/config.json").write_text(json.dumps(keys))
    assert facts_of(capsys, tmp_path / "hf")["quantization"] == "compressed-tensors"


def test_run_folder(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(tmp_path / "run") as run:
        for step in (5, 10):
            with run.writing(step) as folder:
                shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
                save_training_state(folder, {"step": step, "rng": torch.zeros(3)})
        facts = facts_of(capsys, tmp_path / "run")
        assert facts["locked_by"] == os.getpid()
    facts = facts_of(capsys, tmp_path / "run", "--verify")
    assert facts["kind"] == "run folder"
    assert facts["steps"] == [5, 10]
    assert facts["latest"] == "step-000010"
    assert facts["locked_by"] is None
    assert facts["training"] == {"step": 10}
    assert facts["problems"] == []
    assert facts["num_parameters"] > 0
    (tmp_path / "run/step-000005/config.json").write_text("{}")
    error = error_of(capsys, 1, tmp_path / "run", "--verify")
    assert "`step-000005`: `config.json`: has 2 bytes" in error
    (tmp_path / "run/latest").unlink()
    (tmp_path / "run/latest").symlink_to("step-000099")
    assert "`step-000099`, which does not exist" in error_of(capsys, 1, tmp_path / "run/latest")


def test_verify_finds_a_flipped_bit(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert facts_of(capsys, checkpoint, "--verify")["problems"] == []
    shard = sorted(checkpoint.glob("model-*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (checkpoint / "tokenizer.json").unlink()
    assert main(["info", "--json", "--verify", str(checkpoint)]) == 1
    out, err = capsys.readouterr()
    problems = json.loads(out)["problems"]
    assert len(problems) == 2
    assert any(shard.name in problem for problem in problems)
    assert "`tokenizer.json`: is missing" in problems
    assert "2 differences" in err


def test_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_stream(tmp_path / "a.tokens", text_frame(0), picture_frame(1), text_frame(2))
    facts = facts_of(capsys, path, "--verify")
    assert facts["kind"] == "stream"
    assert facts["is_complete"] is True
    assert facts["num_documents"] == 46
    assert facts["num_frames"] == 3
    assert facts["num_media"] >= 6
    assert facts["geometry"]["image_size"] == 16
    renamed = path.rename(tmp_path / "no-suffix")
    assert facts_of(capsys, renamed)["kind"] == "stream"
    assert "is_complete    yes" in text_of(capsys, renamed)


def test_stream_that_was_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_stream(tmp_path / "a.tokens", text_frame(0), text_frame(1))
    os.truncate(path, path.stat().st_size - 10)
    facts = facts_of(capsys, path)
    assert facts["is_complete"] is False
    assert facts["num_documents"] == 40
    assert "cut off" in facts["problem"] or "byte" in facts["problem"]
    error_of(capsys, 1, path, "--verify", "-q")
    path.write_bytes(b"")
    assert "empty" in error_of(capsys, 1, path)


def test_stream_through_a_pipe(tmp_path: Path) -> None:
    path = write_stream(tmp_path / "a.tokens", text_frame(0))
    command = [sys.executable, "-m", "l4cli", "info", "-", "--json"]
    with path.open("rb") as file:
        done = subprocess.run(command, stdin=file, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_documents"] == 20
    assert done.stderr == ""


def test_stream_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_stream(tmp_path / "a.tokens", known_documents())
    samples = facts_of(capsys, path, "--samples", "9")["samples"]
    assert [sample["text"] for sample in samples] == [
        "<|begin_of_text|>one\x1b[31m<|end_of_text|>",
        "<|begin_of_text|>look: [picture 2x1] nice<|end_of_text|>",
    ]
    text = text_of(capsys, path, "--samples", "1")
    assert "one\\x1b[31m" in text  # data must not steer the terminal
    assert "look" not in text


def test_shards_and_their_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shards(tmp_path / "shards", known_documents(), text_frame(3))
    facts = facts_of(capsys, tmp_path / "shards", "--verify", "--samples", "100")
    assert facts["kind"] == "shards"
    assert facts["seq_len"] == 64
    assert facts["num_media"] == 1
    assert facts["packing"]["method"] == "best-fit"
    assert facts["problems"] == []
    assert facts["labels"] == {"lang": 2}
    assert len(facts["shards"][0]["sha256"]) == 64
    texts = [sample["text"] for sample in facts["samples"]]
    assert "<|begin_of_text|>look: [picture 2x1] nice<|end_of_text|>" in texts
    assert sum(sample["num_tokens"] for sample in facts["samples"]) == facts["num_tokens"]
    assert {sample["row"] for sample in facts["samples"]} == set(range(facts["num_rows"]))
    assert {s["labels"].get("lang") for s in facts["samples"]} == {None, "el", "en"}
    text = text_of(capsys, tmp_path / "shards", "--samples", "2")
    assert "--- row 0, document 1, " in text
    assert facts_of(capsys, tmp_path / "shards/index.json")["kind"] == "shards"


def test_a_teachers_cache(tmp_path, capsys) -> None:
    make_shards(tmp_path / "shards", text_frame(0, 60))
    cache = tmp_path / "cache"
    make_cache(cache, tmp_path / "shards", most=25)
    facts = facts_of(capsys, cache)
    assert facts["kind"] == "teacher cache"
    assert facts["is_complete"] is False
    make_cache(cache, tmp_path / "shards")
    facts = facts_of(capsys, cache, "--verify")
    assert facts == {**facts_of(capsys, cache / "index.json"), "target": str(cache), "problems": []}
    assert facts["is_complete"] is True
    assert facts["teacher"] == "teacher"
    assert (facts["num_exact"], facts["num_drawn"], facts["temperature"]) == (3, 4, 1.0)
    parts = list(cache.glob("part-*"))
    assert len(parts) > 1
    assert facts["size_bytes"] == sum(path.stat().st_size for path in parts)
    assert facts["bytes_per_token"] == facts["size_bytes"] / facts["num_tokens"]
    text = text_of(capsys, cache)
    assert "is_complete          yes" in text
    assert f"name {tmp_path / 'shards'}" in text
    data = bytearray(parts[0].read_bytes())
    data[-100] ^= 1
    parts[0].write_bytes(data)
    assert main(["info", "--verify", "--json", str(cache)]) == 1
    out, err = capsys.readouterr()
    assert len(json.loads(out)["problems"]) == 2
    assert "another SHA-256" in err
    parts[0].unlink()
    assert f"`{parts[0].name}` is missing" in error_of(capsys, 1, cache)


def test_damaged_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shards(tmp_path / "shards", text_frame(3))
    shard = next((tmp_path / "shards").glob("shard-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert shard.name in error_of(capsys, 1, tmp_path / "shards", "--verify", "-q")
    shard.unlink()
    assert "is missing" in error_of(capsys, 1, tmp_path / "shards")


def test_tokenizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_tokenizer("bytes").save(tmp_path / "tok")
    folder = facts_of(capsys, tmp_path / "tok")
    assert folder["kind"] == "tokenizer"
    assert folder["vocab_size"] == 277
    file = facts_of(capsys, tmp_path / "tok/tokenizer.json")
    assert file["fingerprint"] == folder["fingerprint"]
    assert facts_of(capsys, "bytes")["fingerprint"] == folder["fingerprint"]
    assert folder["backend_reason"]


def test_real_vocabulary(llama4_vocabulary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = facts_of(capsys, llama4_vocabulary)
    assert facts["kind"] == "tokenizer"
    assert facts["vocab_size"] == 202_048
    assert facts["ids"]["patch"] == 200_092


def test_ops(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--ops", "--json"]) == 0
    ops = json.loads(capsys.readouterr().out)["ops"]
    assert {op["op"] for op in ops} >= {"routed_experts", "linear_cross_entropy", "decoder"}
    assert all(op["version"] and op["reason"] for op in ops)
    assert "routed_experts" in text_of(capsys, "--ops")


@pytest.mark.parametrize(
    ("variables", "version", "said"),
    [
        ({"L4_OPS": "reference"}, "torch", "forced by `L4_OPS=reference`"),
        ({"L4_CPU_ISA": "portable"}, "cpp", "a whole step in C++ (portable; attention: portable)"),
        ({"CXX": "none", "XDG_CACHE_HOME": "/nowhere"}, "torch", "no C++ compiler found"),
    ],
)
def test_which_decoder(variables: dict[str, str], version: str, said: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine's best device is no CPU")
    hide = "import src_kernels.cpu as k, pathlib; k.LIBRARY = pathlib.Path('/nowhere.so'); "
    script = (hide if "CXX" in variables else "") + "import sys; from l4cli.cli import main; "
    script += "sys.exit(main(['info', '--ops', '--json']))"
    call = [sys.executable, "-c", script]
    environment = {**os.environ, **variables}
    done = subprocess.run(call, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    decoder = next(op for op in json.loads(done.stdout)["ops"] if op["op"] == "decoder")
    if version == "cpp" and "no C++ compiler" in decoder["reason"]:
        pytest.skip(decoder["reason"])
    assert decoder["version"] == version
    assert said in f"{decoder['does']} {decoder['reason']}"


def test_several_targets_are_several_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_tokenizer("bytes").save(tmp_path / "tok")
    assert main(["info", "--json", "preset:nano", str(tmp_path / "tok")]) == 0
    kinds = [json.loads(line)["kind"] for line in capsys.readouterr().out.splitlines()]
    assert kinds == ["preset", "tokenizer"]


def test_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "nothing").write_text("")
    (tmp_path / "some").mkdir()
    (tmp_path / "some/notes.md").write_text("x")
    save_file({"a": torch.zeros(3)}, tmp_path / "cut.safetensors")
    os.truncate(tmp_path / "cut.safetensors", 70)
    for name, why in {
        "absent": "no such file",
        "empty": "the folder is empty",
        "text.txt": "nothing the suite writes",
        "empty.json": "not JSON",
        "list.json": "nothing the suite writes",
        "nothing": "the file is empty",
        "some": "it holds `notes.md`",
        "cut.safetensors": "cut off",
    }.items():
        assert why in error_of(capsys, 1, tmp_path / name)
    assert "did you mean `nano`?" in error_of(capsys, 2, "preset:nanno")
    assert "no TARGET" in error_of(capsys, 2)
    assert "only streams and shards" in error_of(capsys, 2, "preset:nano", "--samples", "3")


def test_help_has_examples() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "l4cli", "info", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "l4 info preset:scout" in done.stdout
    assert "torch" not in done.stdout
