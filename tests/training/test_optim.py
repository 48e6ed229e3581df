"""Muon equals torch's on every matrix, AdamW is torch's, and state survives a round trip."""

from __future__ import annotations

import torch
from torch import nn

from l4cli.training.optim import Optimizer, OptimizerOptions, parameter_group

EXPERTS = "model.layers.0.feed_forward.experts"


def _parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (50, 16),
        "model.layers.0.self_attn.q_proj.weight": (16, 16),
        "model.layers.0.self_attn.k_proj.weight": (8, 16),
        "model.layers.0.self_attn.o_proj.weight": (16, 16),
        "model.layers.0.feed_forward.down_proj.weight": (16, 40),
        "model.layers.0.feed_forward.router.weight": (4, 16),
        f"{EXPERTS}.gate_up_proj": (4, 16, 48),
        f"{EXPERTS}.down_proj": (4, 24, 16),
        "model.norm.weight": (16,),
        "lm_head.weight": (50, 16),
    }
    return {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}


def _set_gradients(parameters: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def _split_experts(name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Each matrix torch's Muon would be given, experts in the layout of nn.Linear."""
    if name.endswith("gate_up_proj"):
        half = tensor.shape[-1] // 2
        return [part.T for e in tensor for part in (e[:, :half], e[:, half:])]
    return [e.T for e in tensor] if tensor.ndim == 3 else [tensor]


def test_muon_equals_torch_on_every_matrix() -> None:
    parameters = _parameters()
    hidden = {n: p for n, p in parameters.items() if parameter_group(n, p) == "hidden"}
    theirs = {
        name: [nn.Parameter(m.detach().clone()) for m in _split_experts(name, parameter)]
        for name, parameter in hidden.items()
    }
    torch_muon = torch.optim.Muon(
        [p for parts in theirs.values() for p in parts],
        lr=0.02,
        weight_decay=0.1,
        adjust_lr_fn="match_rms_adamw",
    )
    ours = Optimizer(parameters.items(), OptimizerOptions("muon", weight_decay=0.1))
    assert ours.muon is not None
    ours.muon.dtype = torch.bfloat16  # torch's, on machines without fast bf16 products too
    for step in range(4):
        _set_gradients(parameters, step)
        for name, parts in theirs.items():
            assert parameters[name].grad is not None
            for part, grad in zip(parts, _split_experts(name, parameters[name].grad), strict=True):
                part.grad = grad.clone()
        ours.step(lr=0.02)
        torch_muon.step()
        for name, parts in theirs.items():
            for part, own in zip(parts, _split_experts(name, parameters[name]), strict=True):
                assert torch.equal(own, part)


def test_adamw_is_torch_adamw_without_decay_on_vectors() -> None:
    parameters, theirs = _parameters(), _parameters()
    no_decay = [p for n, p in theirs.items() if parameter_group(n, p) == "vector"]
    decay = [p for n, p in theirs.items() if parameter_group(n, p) != "vector"]
    torch_adamw = torch.optim.AdamW(
        [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": 0.1}],
        lr=0.01,
        betas=(0.9, 0.95),
    )
    ours = Optimizer(parameters.items(), OptimizerOptions("adamw", weight_decay=0.1))
    for step in range(3):
        _set_gradients(parameters, step)
        _set_gradients(theirs, step)
        ours.step(lr=0.01)
        torch_adamw.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-6)


def test_groups_follow_the_role_of_a_parameter() -> None:
    groups = {name: parameter_group(name, p) for name, p in _parameters().items()}
    assert groups["model.embed_tokens.weight"] == "vector"
    assert groups["model.layers.0.feed_forward.router.weight"] == "vector"
    assert groups["model.norm.weight"] == "vector"
    assert groups["lm_head.weight"] == "head"
    assert groups[f"{EXPERTS}.gate_up_proj"] == "hidden"
    matrix = torch.zeros(2, 2)
    prefix = "vision_model."
    assert parameter_group(prefix + "patch_embedding.linear.weight", matrix) == "hidden"
    assert parameter_group(prefix + "positional_embedding_vlm", matrix) == "vector"
    assert parameter_group(prefix + "vision_adapter.mlp.fc1.weight", matrix) == "hidden"
    assert parameter_group("multi_modal_projector.linear_1.weight", matrix) == "hidden"


def test_state_round_trip_continues_bit_for_bit() -> None:
    for kind in ("adamw", "muon"):
        straight, resumed = _parameters(), _parameters()
        one = Optimizer(straight.items(), OptimizerOptions(kind))
        two = Optimizer(resumed.items(), OptimizerOptions(kind))
        for step in range(4):
            _set_gradients(straight, step)
            _set_gradients(resumed, step)
            one.step(lr=0.01)
            if step == 2:
                state = {k: v.clone() for k, v in two.state_dict().items()}
                assert all(isinstance(v, torch.Tensor) and v.ndim > 0 for v in state.values())
                two = Optimizer(resumed.items(), OptimizerOptions(kind))
                two.load_state_dict(state)
            two.step(lr=0.01)
        for name, parameter in straight.items():
            assert torch.equal(parameter, resumed[name]), name


def test_parameters_without_gradient_are_left_alone() -> None:
    parameters = _parameters()
    name = "model.layers.0.self_attn.q_proj.weight"
    _set_gradients(parameters, 0)
    parameters[name].grad = None
    before = parameters[name].detach().clone()
    optimizer = Optimizer(parameters.items(), OptimizerOptions("muon"))
    optimizer.step(lr=0.1)
    assert torch.equal(parameters[name], before)
    assert f"{name}.momentum_buffer" not in optimizer.state_dict()


def test_fp32_iteration_agrees_with_bf16() -> None:
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        parameters = _parameters()
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        optimizer = Optimizer(parameters.items(), OptimizerOptions("muon", weight_decay=0.0))
        assert optimizer.muon is not None
        optimizer.muon.dtype = dtype
        _set_gradients(parameters, 0)
        optimizer.step(lr=1.0)
        results.append({name: p.detach() - before[name] for name, p in parameters.items()})
    for name, update in results[0].items():
        assert (update - results[1][name]).norm() < 0.03 * update.norm(), name
