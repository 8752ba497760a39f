"""Muon for the matrices between the layers, AdamW for everything else, as one optimiser.

Muon learns much more from few steps than AdamW, and is not meant for embeddings, norms and biases.
"""

import torch
from torch.optim import AdamW, Optimizer

from .muon import Muon
from .settings import Settings

EMBEDDINGS = ("embed_tokens", "lm_head")
BETAS = (0.9, 0.99)


def make_optimizer(model, settings: Settings) -> Optimizer:
    """Make the optimiser that the settings describe, for the parameters that are trained."""
    matrices, others = split_parameters(model)
    if settings.matrix_learning_rate and matrices:
        return MuonWithAdamW(matrices, others, settings)
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return AdamW([group for group in groups if group["params"]], lr=settings.learning_rate, betas=BETAS)


class MuonWithAdamW(Optimizer):
    """Step both; schedulers and checkpoints see one list of parameter groups and one state."""

    def __init__(self, matrices: list[torch.nn.Parameter], others: list[torch.nn.Parameter], settings: Settings):
        self.parts = (
            Muon(matrices, lr=settings.matrix_learning_rate, weight_decay=settings.weight_decay),
            AdamW(others, lr=settings.learning_rate, betas=BETAS, weight_decay=0.0),
        )
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self):
        """Make both optimisers work on this one's groups and state."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._share()


def split_parameters(model) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Split the trained parameters into the matrices of the layers, for Muon, and all others, for AdamW."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and not any(part in name for part in EMBEDDINGS)
        if parameter.requires_grad:
            (matrices if is_matrix else others).append(parameter)
    return matrices, others
