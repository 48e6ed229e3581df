"""Bytes: exact where they can be, close where they are estimates, refusals before allocation."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from l4cli.errors import L4Error
from l4cli.model import build_model, load_preset, preset_names
from l4cli.ops.batch import Batch
from l4cli.planning import (
    available_memory,
    gemm_rate,
    inference_bytes,
    largest_fitting_preset,
    plan_training,
    require_training_fits,
    training_bytes,
)
from l4cli.planning.machine import cpu_memory

GIB = 1 << 30


def test_masters_gradients_and_moments_are_exact() -> None:
    total = 108_641_793_536
    scout = training_bytes(load_preset("scout"), "adamw", "bf16", 1, 8192)
    assert scout["weights"] == scout["gradients"] == 4 * total
    assert scout["optimizer"] == 8 * total


def test_fp8_is_bf16_and_codes_of_the_experts() -> None:
    nano = load_preset("nano")
    bf16, fp8 = (training_bytes(nano, "adamw", dtype, 1, 512) for dtype in ("bf16", "fp8"))
    num_sparse = sum(nano.text.is_moe(i) for i in range(nano.text.num_hidden_layers))
    codes = num_sparse * 4 * 3 * 128 * 256
    assert fp8 == {**bf16, "activations": bf16["activations"] + codes}


def test_muon_keeps_one_moment_of_hidden_matrices() -> None:
    from l4cli.training.optim import Optimizer, OptimizerOptions

    config = load_preset("nano")
    config.vision = None
    for kind in ("adamw", "muon"):
        model = build_model(config, seed=0)
        optimizer = Optimizer(model.named_parameters(), OptimizerOptions(kind=kind))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(1e-3)
        state = optimizer.state_dict()
        held = sum(t.numel() * t.element_size() for t in state.values() if t.numel() > 1)
        assert training_bytes(config, kind, "fp32", 1, 8)["optimizer"] == held


def kept_by_autograd(model: torch.nn.Module, batch: Batch) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.hidden(batch)  # type: ignore[operator]
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("length", [64, 512])
def test_activations_are_what_autograd_keeps(dtype: str, length: int) -> None:
    config = load_preset("nano")
    model = build_model(config, seed=0)
    model.compute_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    ids = torch.randint(0, config.text.vocab_size, (2, length))
    kept = kept_by_autograd(model, Batch.from_tokens(ids, None, config.text.attention_chunk_size))
    estimate = training_bytes(config, "adamw", dtype, 2, length)["activations"]
    assert 0.8 < estimate / kept < 1.35, (estimate, kept)


def test_checkpointed_layers_keep_less() -> None:
    config = load_preset("small")
    shape = (config, "adamw", "bf16", 4, 4096)
    plain = training_bytes(*shape)["activations"]
    assert training_bytes(*shape, checkpoint_layers=True)["activations"] < plain / 4


def test_cache_is_bounded_in_chunked_layers() -> None:
    scout = load_preset("scout")
    million = inference_bytes(scout, "bf16", 1 << 20)
    assert million["weights"] == 2 * 108_641_793_536
    assert million["cache"] == 4096 * (12 * (1 << 20) + 36 * 8192)


def test_available_memory_is_positive_and_below_the_machine() -> None:
    total = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal")
    )
    assert 0 < available_memory() <= total


def machine(root: Path, meminfo_kib: int, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": f"MemAvailable: {meminfo_kib} kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_control_groups_limit_memory(tmp_path: Path) -> None:
    free = machine(tmp_path / "free", 8 << 20, {})
    assert cpu_memory(free) == 8 * GIB
    v2 = machine(
        tmp_path / "v2",
        8 << 20,
        {
            "proc/self/cgroup": "0::/box/job\n",
            "sys/fs/cgroup/box/job/memory.max": "max\n",
            "sys/fs/cgroup/box/job/memory.current": "100\n",
            "sys/fs/cgroup/box/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/box/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/box/memory.stat": f"anon 5\ninactive_file {GIB}\n",
        },
    )
    assert cpu_memory(v2) == 2 * GIB  # the outer group counts; cached file pages can go
    v1 = machine(
        tmp_path / "v1",
        8 << 20,
        {
            "proc/self/cgroup": "12:cpu:/x\n4:memory:/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
        },
    )
    assert cpu_memory(v1) == GIB
    none = machine(
        tmp_path / "none",
        8 << 20,
        {
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n",
        },
    )
    assert cpu_memory(none) == 8 * GIB
    full = machine(
        tmp_path / "full",
        8 << 20,
        {
            "proc/self/cgroup": "0::/../../elsewhere\n",
            "sys/fs/cgroup/memory.max": "1000\n",
            "sys/fs/cgroup/memory.current": "2000\n",
        },
    )
    assert cpu_memory(full) == 0


def test_largest_fitting_preset_grows_with_memory() -> None:
    shape = ("adamw", "bf16", 1, 2048)
    found = [largest_fitting_preset(*shape, available_bytes=n * GIB) for n in (0, 1, 4, 64, 4096)]
    assert found[0] is None
    assert found[1:] == ["nano", "mini", "small", "scout"]
    assert largest_fitting_preset(*shape, available_bytes=1 << 60) == preset_names()[-1]


def test_scout_is_refused_in_no_time_with_what_fits() -> None:
    start = time.perf_counter()
    run = {"optim": "adamw", "dtype": "bf16", "micro_batch_size": 1, "seq_len": 2048}
    plan = plan_training(load_preset("scout"), **run)
    if plan.fits:
        pytest.skip("this machine holds scout")
    with pytest.raises(L4Error) as caught:
        require_training_fits(plan, "scout", **run)
    assert time.perf_counter() - start < 0.5
    error = caught.value
    assert error.exit_code == 1
    assert "`scout` does not fit" in error.what
    assert "optimizer 809.4 GiB" in error.why
    assert "--preset " in error.fix


def test_a_batch_too_large_is_told_apart_from_a_model_too_large() -> None:
    run = {"optim": "adamw", "dtype": "fp32", "micro_batch_size": 4096, "seq_len": 16384}
    plan = plan_training(load_preset("nano"), **run)
    with pytest.raises(L4Error) as caught:
        require_training_fits(plan, "nano", **run)
    assert caught.value.fix == "lower `--micro-batch-size` (now 4096)"


def test_a_plan_has_the_figures_of_a_dry_run() -> None:
    plan = plan_training(
        load_preset("nano"),
        optim="muon",
        dtype="fp32",
        micro_batch_size=2,
        seq_len=256,
        batch_size=8,
    )
    assert plan.fits
    require_training_fits(plan, "nano", optim="muon", dtype="fp32", micro_batch_size=2, seq_len=256)
    assert plan.tokens_per_step == 2048
    hour = plan.time_s(3600 * 1e9 / plan.flops_per_token, 0, 1e9)
    assert hour == pytest.approx(3600 / 0.4)


def test_product_rate_is_measured_once_and_quickly() -> None:
    start = time.perf_counter()
    rate = gemm_rate("fp32")
    assert time.perf_counter() - start < 5
    assert 1e9 < rate < 1e15
    again = time.perf_counter()
    assert gemm_rate("fp32") == rate
    assert time.perf_counter() - again < 0.01
