"""`l4 bench` through the front door: what it measures, what it refuses, ceilings by arithmetic."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from gguf_models import fitting_checkpoint

from l4cli.cli import main
from l4cli.commands.bench_cases import DECODE, PREFILL, READ, Case, Figures, events, measure

FEW = ["--repeats", "2", "--new-tokens", "4", "--prompt", "16", "--seq-len", "32", "--threads", "1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitting_checkpoint(tmp_path_factory.mktemp("bench") / "model")


def error_of(capsys: pytest.CaptureFixture[str], code: int, *args: str | Path) -> str:
    assert main(["bench", *map(str, args)]) == code
    err = capsys.readouterr().err
    assert [line.partition(":")[0] for line in err.splitlines()[-3:]] == ["error", "why", "fix"]
    return err


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def llama_bench_of_ours(folder: Path) -> Path:
    """A program that answers as llama-bench does, with a rate that its arguments say."""
    program = folder / "llama-bench"
    program.write_text(
        "#!/usr/bin/env python3\n"
        "import json, sys\n"
        "args = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "assert open(args['-m'], 'rb').read(4) == b'GGUF' and args['-o'] == 'json'\n"
        "rate = 1000 * int(args['-p']) + 10 * int(args['-n']) + int(args['-d'])\n"
        "print(json.dumps([{'avg_ts': rate, 'n_threads': args['-t']}]))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def test_it_measures_answering_and_training_beside_peers(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    program = llama_bench_of_ours(tmp_path)
    options = ["--depth", "0,8", "--batch", "1,3", "--llama-bench", str(tmp_path), "--json"]
    assert main(["bench", str(checkpoint), *FEW, *options]) == 0
    *found, done = lines_of(capsys)
    cases = {
        (e["what"], e["num_tokens"], e["depth"], e["batch"], e["side"]): e
        for e in found
        if e["event"] == "case"
    }
    answering = [(DECODE, 4, d, b) for d in (0, 8) for b in (1, 3)]
    answering += [(PREFILL, 16, d, 1) for d in (0, 8)]
    expected = {(*case, side) for case in answering for side in ("l4", "transformers")}
    expected |= {(*case, "llama.cpp") for case in answering if case[3] == 1}
    expected |= {("train", 32, 0, 4, side) for side in ("l4", "transformers")}
    assert set(cases) == expected
    for event in cases.values():
        assert len(event["rounds"]) == 2
        assert min(event["rounds"]) <= event["tok_per_sec"] <= max(event["rounds"])
        assert event["ceiling"] == (READ if event["what"] == DECODE else "fp32 products")
        assert event["share"] > 0
    assert cases[PREFILL, 16, 8, 1, "llama.cpp"]["tok_per_sec"] == 16008
    assert cases[DECODE, 4, 8, 1, "llama.cpp"]["tok_per_sec"] == 48
    assert done["threads"] == 1
    assert done["read_bytes_per_sec"] > 0
    assert done["products_per_sec"]["fp32"] > 0
    assert done["weights"].split(", in C++")[0] == "fp32"
    assert len(done["load_average"]) == 2
    assert [e["why"] for e in found if e["event"] == "left_out"] == [
        "llama-bench has no batches"
    ] * 2
    program.write_text("#!/bin/sh\necho 'no such model' >&2\nexit 3\n")
    err = error_of(capsys, 1, checkpoint, *FEW, "--llama-bench", program, "--peers", "llama.cpp")
    assert "no such model" in err


def test_the_table_has_ratios_and_shares(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*FEW, "--peers", "none", "--what", "prefill"]
    assert main(["bench", str(checkpoint), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "medians of 2 rounds, load" in lines[0]
    assert "GB/s" in lines[1]
    assert lines[2].split()[:2] == ["tokens/s", "l4"]
    assert lines[3].startswith("prefill 16")
    assert lines[3].endswith("% of fp32 products")
    assert len(lines) == 4


def test_a_preset_has_random_weights(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*FEW, "--peers", "none", "--what", "decode", "--json"]
    assert main(["bench", "preset:nano", *flags]) == 0
    event, done = lines_of(capsys)
    assert (event["what"], done["model"], done["dtype"]) == ("decode", "preset:nano", "bf16")


@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
def test_codes_are_measured_as_they_are_asked(
    format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*FEW, "--peers", "none", "--what", "decode,prefill,train", "--format", format]
    assert main(["bench", "preset:nano", *flags, "--json"]) == 0
    *found, done = lines_of(capsys)
    assert [event["what"] for event in found] == ["decode", "prefill", "train"]
    assert done["weights"].startswith(format)
    multiplied = "int8" if "C++" in done["weights"] and format != "fp8" else "bf16"
    ceilings = [READ, f"{multiplied} products", "bf16 products"]
    assert [event["ceiling"] for event in found] == ceilings
    assert set(done["products_per_sec"]) == {multiplied, "bf16"}


def test_bytes_of_a_step_in_cpp(tmp_path: Path) -> None:
    """All of what is laid out but the idle experts, counted blob by blob."""
    from l4cli.commands.bench_ours import OurEngine, native_weight_bytes
    from l4cli.commands.bench_preset import write_preset

    folder = write_preset("nano", tmp_path / "model", "bf16", "int4")
    engine = OurEngine(folder, "cpu", "auto", 256)
    if engine.native is None:
        pytest.skip("there are no compiled kernels here")
    text = engine.native.config.text
    linear = 4 * (2 * 128 * 128 + 2 * 128 * 64) + 2 * 3 * 128 * 512 + 2 * 2 * 3 * 128 * 256
    head, routers = text.vocab_size * 128, 2 * 4 * 128 * 4
    found = native_weight_bytes(engine.native, 1)
    # Codes and fp16 scales in 32s; the head int8 with a scale a row; what fills up cache lines.
    assert found == pytest.approx(linear * 4.5 / 8 + head + 4 * text.vocab_size + routers, rel=0.02)
    many = native_weight_bytes(engine.native, 1000)
    assert many - found == pytest.approx(2 * 3 * 3 * 128 * 256 * 4.5 / 8, rel=0.02)


def test_rounds_take_turns_and_the_first_warms_up() -> None:
    calls: list[str] = []

    class Counting:
        def __init__(self, name: str) -> None:
            self.name = name

        def why_not(self, case: Case) -> str | None:
            return "no" if case.batch > 1 and self.name == "b" else None

        def run(self, case: Case) -> float:
            calls.append(f"{self.name} {case.name}")
            return float(len(calls))

    cases = [Case(DECODE, 4), Case(DECODE, 4, batch=2)]
    figures = Figures()
    measure(cases, [Counting("a"), Counting("b")], {"read": lambda: float(len(calls))}, 2, figures)
    assert calls == ["a decode 4", "b decode 4", "a decode 4 x 2"] * 3
    assert figures.rates[cases[0]] == {"a": [4.0, 7.0], "b": [5.0, 8.0]}
    assert figures.ceilings == {"read": [3.0, 6.0]}
    assert figures.left_out == {"b, decode 4 x 2": "no"}
    # One token takes 0.5 of what is read in a second at 4.5 a second, the median of the rounds.
    (first, *_) = events(figures, {cases[0]: ("read", 0.5)})
    assert first["tok_per_sec"] == 5.5
    assert first["share"] == 5.5 * 0.5 / 4.5


def test_rooflines_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--roofline", "--gpus", "h200", "--json"]) == 0
    rows = lines_of(capsys)
    (scout,) = [r for r in rows if r.get("model") == "scout" and r.get("weights") == "bf16"]
    active = 17_172_894_720 - 202048 * 5120 - 97 * 5120  # no looked-up embedding, no norms
    assert scout["read_bytes"] == 2 * active
    assert scout["num_gpus"] == 2
    assert scout["tok_per_sec"] == pytest.approx(2 * 4.8e12 / (2 * active))
    quoted = [row for row in rows if row["event"] == "quoted"]
    assert {row["tok_per_sec"] for row in quoted} >= {None, 460}
    assert main(["bench", "preset:maverick", "--roofline", "--depth", "0,8k"]) == 0
    out = capsys.readouterr().out
    assert "8 x h100" in out
    assert "scout" not in out
    assert "DGX B200" in out


def test_mistakes_are_told(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "did you mean `h100`" in error_of(capsys, 2, "--roofline", "--gpus", "h10")
    assert "`--depth" in error_of(capsys, 2, checkpoint, "--depth", "few")
    assert "known are `decode`" in error_of(capsys, 2, checkpoint, "--what", "dekode")
    assert "known are `auto`" in error_of(capsys, 2, checkpoint, "--peers", "vllm")
    assert "room for 16384" in error_of(capsys, 2, checkpoint, "--prompt", "16k")
    assert "no such file" in error_of(capsys, 2, checkpoint, "--gguf", tmp_path / "no.gguf")
    assert "no such program" in error_of(capsys, 2, checkpoint, "--llama-bench", tmp_path)
    assert "unknown preset" in error_of(capsys, 2, "preset:nanno")
    assert "no such folder" in error_of(capsys, 1, tmp_path / "none")
    assert "`l4 quantize`" in error_of(capsys, 2, checkpoint, "--format", "int4")
    assert "roofline" in error_of(capsys, 1, "preset:behemoth", "--what", "decode")


def test_options_without_effect_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    err = error_of(capsys, 2, "--roofline", "--threads", "2")
    assert "cannot use `--threads`" in err
    assert "measures nothing" in err
    assert "`--what`" in error_of(capsys, 2, "--roofline", "--depth", "8k", "--what", "decode")
    assert "GPUs of `--roofline`" in error_of(capsys, 2, checkpoint, "--gpus", "h100")
    alone = ["--peers", "none", "--llama-bench", tmp_path]
    assert "leaves llama.cpp out" in error_of(capsys, 2, checkpoint, *alone)


def test_ceilings_that_do_not_exist_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "preset:maverick", "--roofline", "--gpus", "a100,l40s"]) == 0
    err = capsys.readouterr().err
    assert "maverick in fp8 on a100 is left out: it has no fp8 products" in err
    assert "maverick in bf16 on l40s is left out: 16 of them do not hold it" in err
    assert "int4" not in err


def test_a_peer_that_does_other_work_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    llama_bench_of_ours(tmp_path)
    folder = fitting_checkpoint(tmp_path / "model", attention_chunk_size=64)
    flags = [*FEW, "--what", "prefill", "--llama-bench", str(tmp_path), "--peers"]
    assert main(["bench", str(folder), *flags, "auto"]) == 0
    assert "llama.cpp is left out: `attention_chunk_size` 64" in capsys.readouterr().err
    assert "cannot measure llama.cpp" in error_of(capsys, 1, folder, *flags, "llama.cpp")
