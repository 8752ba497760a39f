"""The table against both formats' own classes, and its two reorderings."""

import numpy as np
import pytest
import torch
from checkpoints import hf_model, meta_tensors, params

from hf_llama3.conversion.checkpoint import check_names
from hf_llama3.conversion.weights import half_to_interleaved, interleaved_to_half, rows, sizes
from hf_llama3.errors import UserError


def test_names_and_shapes_are_both_formats():
    theirs = {name: tuple(tensor.shape) for name, tensor in hf_model().state_dict().items()}
    meta = {name: tuple(tensor.shape) for name, tensor in meta_tensors(params()).items()}
    size = sizes(hf_model().config.to_dict())
    assert {row.hf: row.full_shape(size) for row in rows(2)} == theirs
    assert {row.meta: row.full_shape(size) for row in rows(2)} == meta


def test_only_the_embedding_is_divided_differently_in_llama_2():
    changed = [new for old, new in zip(rows(2), rows(2, embedding_split=1), strict=True) if old != new]
    assert [(row.meta, row.split) for row in changed] == [("tok_embeddings.weight", 1)]


@pytest.mark.parametrize("make", [np.arange, torch.arange])
def test_reordering_is_metas_pairs_to_halves(make):
    """Head by head, row 2i goes to i and row 2i + 1 to i + D/2, in numpy and in torch."""
    head_dim, heads = 6, 3
    weight = make(head_dim * heads * 4).reshape(head_dim * heads, 4)
    reordered = interleaved_to_half(weight, head_dim).reshape(-1, 4)
    for head in range(heads):
        for pair in range(head_dim // 2):
            start = head * head_dim
            assert (reordered[start + pair] == weight[start + 2 * pair]).all()
            assert (reordered[start + pair + head_dim // 2] == weight[start + 2 * pair + 1]).all()
    assert (half_to_interleaved(reordered, head_dim).reshape(-1, 4) == weight).all()


def test_reordering_a_shard_is_a_shard_of_the_reordered():
    weight = np.arange(8 * 16 * 5).reshape(8 * 16, 5)
    whole = interleaved_to_half(weight, 16).reshape(-1, 5)
    shards = [interleaved_to_half(part, 16).reshape(-1, 5) for part in np.split(weight, 4)]
    assert (np.concatenate(shards) == whole).all()


def test_reordering_copies_nothing():
    weight = np.zeros((32, 4))
    assert np.shares_memory(weight, interleaved_to_half(weight, 8))


def test_missing_and_unknown_names():
    names = {row.hf for row in rows(2)}
    with pytest.raises(UserError, match=r"here lacks 1 tensor: 'model.norm.weight'"):
        check_names(names - {"model.norm.weight"}, names, "here")
    with pytest.raises(UserError, match=r"here lacks 21 tensors: 'lm_head.weight', .*, \.\.\."):
        check_names(set(), names, "here")
    with pytest.raises(UserError, match=r"here lacks 1 tensor: 'lm_head.weight' and holds 1 unknown tensor: 'extra'"):
        check_names(names - {"lm_head.weight"} | {"extra"}, names, "here")
