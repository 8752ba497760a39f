"""The feed-forward block: a gated linear unit with SiLU ("SwiGLU", Shazeer 2020, arXiv:2002.05202)."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_llama3 import Llama3Config


class Llama3MLP(nn.Module):
    """Compute down(act(gate(x)) * up(x)); Meta calls the three projections w2, w1 and w3."""

    def __init__(self, config: Llama3Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
