"""Sentence vectors: the mean of the base model's states over a text's own tokens, wherever the padding stands."""

import pytest
import torch
from parity import make_pair, same, tokens

LENGTHS = (30, 17, 4)


def pool(model, side):
    """Pool rows of different lengths in one batch."""
    width = max(LENGTHS)
    ids = torch.zeros(len(LENGTHS), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        place = slice(width - length, None) if side == "left" else slice(length)
        ids[row, place] = tokens(len(LENGTHS), width)[row, :length]
        mask[row, place] = 1
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_mean_pooling(side, attention):
    """Positions may shift with the padding: only their differences count, so that no more than rounding changes."""
    ours, theirs = make_pair(attention=attention)
    vectors = pool(ours.model, side)
    same(vectors, pool(theirs.model, side))
    for row, length in enumerate(LENGTHS):
        alone = ours.model(input_ids=tokens(len(LENGTHS), max(LENGTHS))[row : row + 1, :length]).last_hidden_state
        torch.testing.assert_close(vectors[row], alone.mean(1)[0], rtol=0, atol=1e-5)
