"""Muon: update a matrix by its orthogonalised momentum, so that every direction in it counts alike.

After Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. Formulas and numbers are those of
`torch.optim.Muon` (torch 2.13.0, torch/optim/_muon.py), which computes one matrix after another, always in bfloat16.
"""

import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from hf_llama3.cpu import processor

# Shapes: N matrices of one shape, R rows, C columns, S the smaller of R and C, L the larger

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7
BATCH = 2**20  # elements that are orthogonalised together; more would take memory and save no time


class Muon(Optimizer):
    """Update matrices by their orthogonalised Nesterov momentum, with decoupled weight decay."""

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, weight_decay: float):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, kept = group["lr"], 1 - group["lr"] * group["weight_decay"]
            for batch in batches([matrix for matrix in group["params"] if matrix.grad is not None]):
                updates = orthogonalize(torch.stack([self._advance(matrix) for matrix in batch]))
                for matrix, update in zip(batch, updates, strict=True):
                    rows, columns = matrix.shape
                    matrix.mul_(kept).add_(shard_like(matrix, update), alpha=-lr * math.sqrt(max(1, rows / columns)))

    def _advance(self, matrix: torch.nn.Parameter) -> torch.Tensor:
        """Update the momentum of a matrix and return Nesterov's look-ahead, gathered from all processes."""
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - MOMENTUM)
        ahead = matrix.grad.lerp(momentum, MOMENTUM)
        return ahead.full_tensor() if isinstance(ahead, DTensor) else ahead


def batches(matrices: list[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Group matrices by shape; one that is sharded among processes stays alone, because it is gathered whole."""
    by_shape = defaultdict(list)
    for matrix in matrices:
        by_shape[matrix.shape].append(matrix)
    for alike in by_shape.values():
        count = 1 if isinstance(alike[0], DTensor) else max(BATCH // alike[0].numel(), 1)
        for start in range(0, len(alike), count):
            yield alike[start : start + count]


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Bring all singular values close to 1 by the Newton-Schulz iteration X <- a X + (b G + c G G) X, G = X X^T."""
    a, b, c = COEFFICIENTS
    x = matrices.to(product_dtype(matrices.device))  # (N, R, C)
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT  # (N, S, L): of the two products with itself, the smaller
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)  # (N, S, S)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def product_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16, or float32 where the processor emulates bfloat16 products."""
    is_emulated = device.type == "cpu" and not processor.here().multiplies_bfloat16
    return torch.float32 if is_emulated else torch.bfloat16


def shard_like(matrix: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of an update that every process has computed whole."""
    if not isinstance(matrix, DTensor):
        return whole
    return distribute_tensor(whole, matrix.device_mesh, matrix.placements, src_data_rank=None)
