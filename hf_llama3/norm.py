"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), in the order of roundings that Meta trained with
(llama-models 0.3.0, models/llama3/model.py, `RMSNorm`)."""

import torch
from torch import nn
from transformers.integrations import use_kernel_forward_from_hub


@use_kernel_forward_from_hub("RMSNorm")
class Llama3RMSNorm(nn.Module):
    """Scale each vector to a root mean square of one, then by a learned weight per channel: x / rms(x) * weight."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps  # the name that a kernel from the Hub reads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Normalise in float32, round to the input's dtype, then scale: another order (`F.rms_norm`) gives other bits.
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(x.dtype)

    def extra_repr(self):
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon}"
