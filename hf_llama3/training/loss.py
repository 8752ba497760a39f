"""The loss of a causal language model without its logits, which for a large vocabulary are most of a step's memory."""

# Shapes: B batch, T tokens, E hidden_size, V vocab_size

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

LOGITS_AT_A_TIME = 2**25  # 128 MiB in float32: fewer cost time, more cost memory


def loss_without_logits(
    hidden_states: torch.Tensor,
    head: nn.Linear,
    labels: torch.Tensor,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    **unused,
) -> torch.Tensor:
    """Compute the library's `ForCausalLMLoss` of `head(hidden_states)` from a few positions (of B * T) at a time.

    torch's own function takes a head's weight in float32; any other head is called, and called again for gradients.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    states = hidden_states.flatten(0, -2)  # (B * T, E)
    targets = shift_labels.flatten()  # (B * T)
    rows, options = max(LOGITS_AT_A_TIME // head.out_features, 1), {"ignore_index": ignore_index, "reduction": "sum"}

    def loss_of(states, targets):
        logits = head(states).float()  # (rows, V)
        return nn.functional.cross_entropy(logits, targets.to(logits.device), **options)

    if len(states) <= rows:
        loss = loss_of(states, targets)
    elif takes_torch_function(head, states):
        chunks = nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        loss = nn.functional.linear_cross_entropy(
            states, head.weight, targets.to(states.device), options=chunks, **options
        )
    else:
        chunks = zip(states.split(rows), targets.split(rows), strict=True)
        loss = sum(checkpoint(loss_of, *chunk, use_reentrant=False) for chunk in chunks)
    count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return loss / (count.to(loss.device) if torch.is_tensor(count) else count)


def takes_torch_function(head: nn.Module, states: torch.Tensor) -> bool:
    """Tell whether torch 2.12 and later compute the same from the head's weight alone, without calling the head.

    They do not where something else happens in the call: hooks fetch the weight (offload, ZeRO-3) or gather the parts
    of the result (tensor parallelism), an adapter or a quantised layer adds to it, autocast rounds it.
    """
    kind = states.device.type
    return (
        hasattr(nn.functional, "linear_cross_entropy")
        and states.dtype is torch.float32
        and not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))
        and type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and head.weight.device == states.device
        and head.bias is None
        and "forward" not in vars(head)  # accelerate's hooks take its place
        and not (head._forward_pre_hooks or head._forward_hooks or head._backward_pre_hooks or head._backward_hooks)
    )
