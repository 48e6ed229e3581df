"""Every way a checkpoint can be wrong, and the error that says so."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from l4cli.checkpoint import load_config, load_model, read_header, resolve_checkpoint, save_model
from l4cli.errors import L4Error

pytest.importorskip("transformers")

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def text(hf_text: Path, tmp_path: Path) -> Path:
    shutil.copytree(hf_text, tmp_path / "text")
    return tmp_path / "text"


@pytest.fixture
def pictures(hf_pictures: Path, tmp_path: Path) -> Path:
    shutil.copytree(hf_pictures, tmp_path / "pictures")
    return tmp_path / "pictures"


def refused(path: Path) -> L4Error:
    with pytest.raises(L4Error) as caught:
        load_model(path)
    error = caught.value
    assert error.exit_code == 1
    assert str(path) in error.what or path.name in error.what + error.why
    assert error.fix
    return error


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def test_missing_folder_empty_folder_and_a_file(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "absent").why
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(tmp_path / "empty").why
    (tmp_path / "file").write_text("x")
    assert "it is a file" in refused(tmp_path / "file").why


def test_missing_config(text: Path) -> None:
    (text / "config.json").unlink()
    assert "`config.json` is missing" in refused(text).why
    (text / "l4").mkdir()
    assert "training state only" in refused(text).why
    (text / "params.json").write_text("{}")
    assert "Meta's own format" in refused(text).why


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff"])
def test_damaged_config(text: Path, content: str) -> None:
    (text / "config.json").write_bytes(content.encode("latin-1"))
    assert "JSON" in refused(text).why


def test_config_with_an_impossible_size(text: Path) -> None:
    (text / "config.json").write_text('{"model_type": "llama4_text", "vocab_size": "x"}')
    with pytest.raises(L4Error, match="`vocab_size` is 'x'"):
        load_model(text)


def test_config_of_another_architecture(text: Path) -> None:
    (text / "config.json").write_text('{"model_type": "llama"}')
    error = refused(text)
    assert "`model_type` is `llama`" in error.why


def test_unreadable_config_is_not_a_bug(text: Path) -> None:
    (text / "config.json").unlink()
    (text / "config.json").mkdir()
    assert "directory" in refused(text).why


def test_pickled_weights_are_refused_with_a_way_out(text: Path) -> None:
    (text / SINGLE).rename(text / "pytorch_model.bin")
    error = refused(text)
    assert "`pytorch_model.bin` is pickled" in error.why
    assert "safetensors" in error.fix


def test_no_weights_at_all(text: Path) -> None:
    (text / SINGLE).unlink()
    assert "no weights" in refused(text).why


def test_quantized_by_config_and_by_tensors(text: Path) -> None:
    edit(text, lambda t: t.update({Q_PROJ + "_packed": torch.zeros(4, 4, dtype=torch.int32)}))
    assert "I32" in refused(text).why
    keys = json.loads((text / "config.json").read_text())
    keys["quantization_config"] = {"quant_method": "compressed-tensors"}
    (text / "config.json").write_text(json.dumps(keys))
    error = refused(text)
    assert "quantized" in error.what
    assert "compressed-tensors" in error.why


def test_missing_shard(pictures: Path) -> None:
    (pictures / "model-00002-of-00003.safetensors").unlink()
    assert "`model-00002-of-00003.safetensors` is missing" in refused(pictures).why


def test_shards_without_their_index(pictures: Path) -> None:
    (pictures / INDEX).unlink()
    assert INDEX in refused(pictures).why


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}'])
def test_damaged_index(pictures: Path, content: str) -> None:
    (pictures / INDEX).write_text(content)
    refused(pictures)


def test_index_must_not_name_files_elsewhere(pictures: Path, text: Path) -> None:
    index = {"weight_map": {"a": "../text/model.safetensors"}}
    (pictures / INDEX).write_text(json.dumps(index))
    assert "not a file in the folder" in refused(pictures).why


def test_index_that_names_a_tensor_its_file_lacks(pictures: Path) -> None:
    index = json.loads((pictures / INDEX).read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    (pictures / INDEX).write_text(json.dumps(index))
    assert "`ghost`" in refused(pictures).why


def test_missing_and_unexpected_tensors(text: Path) -> None:
    edit(text, lambda t: t.update({"model.ghost.weight": torch.zeros(2)}))
    assert "`model.ghost.weight`" in refused(text).why
    edit(text, lambda t: [t.pop(Q_PROJ), t.pop("model.ghost.weight")])
    error = refused(text)
    assert Q_PROJ in error.why
    assert "needs" in error.why


def test_one_expert_of_many_missing(text: Path) -> None:
    fused = "model.layers.1.feed_forward.experts.down_proj"

    def unfuse_all_but_one(tensors: dict[str, torch.Tensor]) -> None:
        for e, expert in enumerate(tensors.pop(fused)):
            if e != 2:
                name = fused.replace("down_proj", f"{e}.down_proj.weight")
                tensors[name] = expert.T.contiguous()

    edit(text, unfuse_all_but_one)
    assert "experts.2.down_proj.weight`" in refused(text).why


def test_wrong_shape_names_the_tensor_and_both_shapes(text: Path) -> None:
    edit(text, lambda t: t.update({Q_PROJ: torch.zeros(32, 64)}))
    why = refused(text).why
    assert Q_PROJ in why
    assert "[32, 64]" in why
    assert "[64, 64]" in why


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(text: Path, value: float) -> None:
    edit(text, lambda t: t[Q_PROJ].view(-1)[7:9].fill_(value))
    why = refused(text).why
    assert Q_PROJ in why
    assert "2 of 4096" in why
    assert load_model(text, check_finite=False) is not None


@pytest.mark.parametrize("keep", [0, 5, 1000, 0.5, -1])
def test_truncated_weights(text: Path, keep: float) -> None:
    path = text / SINGLE
    size = path.stat().st_size
    if keep < 0:
        size -= 1
    else:
        size = int(size * keep if keep < 1 else keep)
    os.truncate(path, size)
    why = refused(text).why
    assert "cut off" in why or "empty" in why or "ends within" in why


def test_weights_that_are_no_safetensors(text: Path, tmp_path: Path) -> None:
    for content in (b"PK\x03\x04" * 100, struct.pack("<Q", 40) + b"{" * 40, b"\0" * 64):
        (text / SINGLE).write_bytes(content)
        refused(text)
    shutil.rmtree(text / SINGLE, ignore_errors=True)
    good = tmp_path / "good.safetensors"
    save_file({"a": torch.zeros(4)}, good)
    good.write_bytes(good.read_bytes() + b"more")
    with pytest.raises(L4Error, match="4 bytes follow"):
        read_header(good)


def test_header_with_impossible_places(tmp_path: Path) -> None:
    for fields in (
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 15]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}},
        {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4]}},
        {
            "a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
            "b": {"dtype": "U8", "shape": [12], "data_offsets": [4, 16]},
        },
    ):
        header = json.dumps(fields).encode()
        path = tmp_path / "bad.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
        with pytest.raises(L4Error):
            read_header(path)


def test_headers_alone_tell_before_anything_is_read(text: Path) -> None:
    """A wrong shape in the last tensor stops before the model has a single weight."""
    edit(text, lambda t: t.update({"model.norm.weight": torch.full((3,), float("nan"))}))
    assert "[3]" in refused(text).why


def test_resolving_a_run_folder(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "step-000010").mkdir(parents=True)
    shutil.copytree(text, run / "step-000020")
    (run / "latest").symlink_to("step-000020")
    assert resolve_checkpoint(run).name == "step-000020"
    assert resolve_checkpoint(run / "latest") == run / "latest"
    assert load_config(run).text.vocab_size == 512
    (run / "latest").unlink()
    (run / "latest").symlink_to("step-000099")
    with pytest.raises(L4Error) as caught:
        resolve_checkpoint(run / "latest")
    assert "`step-000099`, which does not exist" in caught.value.why
    assert "step-000020" in caught.value.fix
    with pytest.raises(L4Error, match="no such folder"):
        resolve_checkpoint(run / "step-000030")


def test_saving_over_something_is_refused(text: Path, tmp_path: Path) -> None:
    model = load_model(text)
    with pytest.raises(L4Error, match="holds a model already"):
        save_model(model, text, {})
    (tmp_path / "file").write_text("x")
    with pytest.raises(L4Error, match="it is a file"):
        save_model(model, tmp_path / "file", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "text"]


def test_leftovers_of_a_killed_save_are_removed(text: Path, tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)  # its id belongs to nobody now
    for pid in (child, os.getppid()):
        (tmp_path / f".out.tmp-{pid}").mkdir()
    save_model(load_model(text), tmp_path / "out", {})
    assert not (tmp_path / f".out.tmp-{child}").exists()
    assert (tmp_path / f".out.tmp-{os.getppid()}").exists()  # someone living may be writing it
