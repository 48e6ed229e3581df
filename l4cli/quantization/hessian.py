"""How much a calibration's inputs make each error of a linear map count.

in: the inputs x a linear map was given; out: H = sum of x x^T, and H's factor for GPTQ
source: Hassibi and Stork 1993; Frantar et al. 2023 (arXiv 2210.17323), equations 2 and 3
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 4096  # inputs multiplied at once
MAX_DAMPING = 1.0  # of the mean diagonal: beyond it H says nothing that rounding does not know


class Hessian:
    """The sum of x x^T over tokens: what a map's squared output error is made of."""

    def __init__(self, num_inputs: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(num_inputs, num_inputs, device=device)  # fp32 [I, I]
        self.num_tokens = 0

    @torch.no_grad()
    def add(self, x_MI: Tensor) -> None:
        """Count the inputs of some tokens; their zeros and repeats too. shapes: x [..., I]"""
        x_MI = x_MI.reshape(-1, x_MI.shape[-1])
        for part_MI in x_MI.split(_ROWS):
            part_MI = part_MI.to(self.matrix.device, torch.float32)
            self.matrix.addmm_(part_MI.T, part_MI)
        self.num_tokens += len(x_MI)

    @property
    def importance(self) -> Tensor:
        """Of each input the mean square; inputs that never spoke count a little. shapes: -> [I]"""
        diagonal = self.matrix.diagonal() / max(1, self.num_tokens)
        mean = diagonal.mean()
        return torch.ones_like(diagonal) if mean == 0 else diagonal.clamp(min=1e-3 * mean)

    def error(self, difference_OI: Tensor) -> float:
        """The summed squared error of the outputs that a difference of weights makes."""
        difference_OI = difference_OI.float()
        return float(((difference_OI @ self.matrix) * difference_OI).sum(dtype=torch.float64))


class Factor:
    """U, upper, with U^T U = (H + damping)^-1 in an order of inputs; made once for maps alike.

    `note`: what was unusual, in words; `upper` None: no damping made H invertible.
    """

    def __init__(self, hessian: Hessian, damping: float) -> None:
        matrix = hessian.matrix.double()
        diagonal = matrix.diagonal().clone()
        self.note = ""
        self.damping = damping  # that made it invertible, of the mean diagonal
        self.upper: Tensor | None = None
        # The loudest first: their errors can still be made good by all the others.
        self.order = diagonal.argsort(descending=True, stable=True)
        if not bool(torch.isfinite(diagonal).all()) or float(diagonal.max()) <= 0:
            self.note = "no usable inputs: rounded"
            return
        is_dead = diagonal == 0
        if num_dead := int(is_dead.sum()):
            self.note = f"{num_dead} inputs never used"
        mean = float(diagonal.mean())
        # A dead input is rounded by itself: nothing is known of it, and nothing moves onto it.
        matrix.diagonal()[is_dead] = mean
        matrix = matrix[self.order][:, self.order]
        while self.upper is None and damping <= MAX_DAMPING:
            self.upper = _inverse_factor(matrix, damping * mean)
            self.damping = damping
            if self.upper is None:
                damping *= 10
                self.note = f"singular, damped by {damping:g}"
        if self.upper is None:
            self.note = "singular: rounded"


def _inverse_factor(matrix: Tensor, added: float) -> Tensor | None:
    """The upper U of U^T U = (matrix + added * 1)^-1, or None if that is not positive."""
    # Reversed, a lower factor is an upper one of the other kind, H = R R^T; then U = R^-1, and the
    # inverse itself, which loses digits, is never formed.
    reversed_matrix = matrix.flip(0, 1)
    reversed_matrix.diagonal().add_(added)
    lower, info = torch.linalg.cholesky_ex(reversed_matrix)
    if int(info) != 0:
        return None
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return upper.float() if bool(torch.isfinite(upper).all()) else None
