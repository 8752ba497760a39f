"""Attention of one token by machine code, on every path of this processor and of narrower ones, against float64."""

import pytest
import torch
from torch import nn

from hf_llama3.cpu import decode_attention as hook
from hf_llama3.cpu import processor
from hf_llama3.cpu.kernels import attention, kernel, machine_code
from hf_llama3.cpu.kernels.attention import decode_attention, is_served

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# float32: rounding of sums; others: of the result, whose size is that of the values
BOUNDS = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
LENGTHS = (1, 2, 7, 17, 130, 1025, 4097)


def cached(rows, heads, tokens, channels, dtype=torch.float32):
    """Draw keys and values as they lie in a cache that has room for more."""
    return torch.randn(2, rows, heads, tokens + 9, channels).to(dtype)[:, :, :, :tokens].unbind(0)


def draw(rows, heads, channels, dtype=torch.float32):
    """Draw queries (B, H, 1, D), transposed as a model's are."""
    return torch.randn(rows, 1, heads, channels).to(dtype).transpose(1, 2)


def expected(queries, keys, values, mask=None, scaling=None):
    """Return the same by torch in float64, (B, 1, H, D)."""
    inputs = (one.double() for one in (queries, keys, values))
    return nn.functional.scaled_dot_product_attention(
        *inputs, attn_mask=mask, scale=scaling, enable_gqa=True
    ).transpose(1, 2)


def check(queries, keys, values, mask=None, scaling=None):
    assert is_served(queries, keys, values, mask)
    made, exact = (one(queries, keys, values, mask, scaling) for one in (decode_attention, expected))
    assert made.dtype is queries.dtype and made.shape == exact.shape
    size = values.abs().max()
    torch.testing.assert_close(made.double() / size, exact / size, rtol=0, atol=BOUNDS[queries.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "channels"), [(1, 80), (3, 64), (4, 64), (4, 128), (8, 80), (8, 128)])
def test_shapes(group, channels, dtype, on):
    torch.manual_seed(0)
    for rows in (1, 4):
        for tokens in LENGTHS:
            keys, values = cached(rows, 2, tokens, channels, dtype)
            check(draw(rows, 2 * group, channels, dtype), keys, values)


@pytest.mark.parametrize("group", [2, 5, 16])
def test_queries_of_one_head(group, on):
    torch.manual_seed(0)
    check(draw(2, group, 64), *cached(2, 1, 37, 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks(dtype, on):
    """Left padding, holes, one mask for all rows, and a row that sees nothing."""
    torch.manual_seed(0)
    for tokens in LENGTHS:
        queries, (keys, values) = draw(4, 8, 64, dtype), cached(4, 2, tokens, 64, dtype)
        padded = torch.arange(tokens) >= torch.tensor([0, tokens // 3, tokens - 1, tokens])[:, None]
        holes = torch.rand(4, tokens) < 0.5
        for mask in (padded, holes, holes[:1], torch.ones(1, tokens, dtype=torch.bool)):
            check(queries, keys, values, mask[:, None, None])
    assert not decode_attention(queries, keys, values, padded[:, None, None])[3].any()


@pytest.mark.parametrize("size", [0.0, 1e-20, 1.0, 30.0, 1e4])
def test_scores_of_any_size(size, on):
    """From equal weights to all on one key, whose score is far from 0."""
    torch.manual_seed(0)
    keys, values = cached(1, 2, 257, 64)
    check(draw(1, 8, 64) * size, keys, values, scaling=0.3)
    check(draw(1, 8, 64).abs() * size, -keys.abs(), values)
    hidden = torch.ones(1, 1, 1, 257, dtype=torch.bool)
    hidden[..., 100] = False
    keys[:, :, 100] *= 1e3  # outweighs all others, and is not seen
    check(draw(1, 8, 64) * size, keys, values, hidden)


def test_what_is_not_a_number_comes_out(on):
    keys, values = cached(1, 2, 33, 64)
    keys[0, 1, 5, 3] = torch.nan
    made = decode_attention(draw(1, 4, 64), keys, values)
    assert made[:, :, 2:].isnan().all() and made[:, :, :2].isfinite().all()


def test_steps_of_memory():
    """Rows, heads and tokens may lie anywhere, as long as channels are neighbours."""
    torch.manual_seed(0)
    keys = torch.randn(3, 20, 2, 64).transpose(1, 2)
    values = torch.randn(2, 20, 3, 80).permute(2, 0, 1, 3)[:, :, ::2, 7:71]
    check(torch.randn(3, 4, 2, 64)[:, :, 1:], keys[:, :, ::2], values)
    check(draw(3, 4, 64), keys[:1].expand(3, 2, 20, 64), keys)


def test_threads_share_the_work(monkeypatch):
    """Whoever attends to how many heads, the sums are the same to the bit."""
    monkeypatch.setattr(kernel, "SMALL", 0)
    torch.manual_seed(0)
    queries, (keys, values), results = draw(2, 12, 64), cached(2, 3, 4097, 64), []
    for threads in (1, 2, 5, 9):
        monkeypatch.setattr(processor, "threads", lambda threads=threads: threads)
        results.append(decode_attention(queries, keys, values))
    assert all(torch.equal(result, results[0]) for result in results)
    monkeypatch.setattr(attention, "compiled", attention.compiled.__wrapped__)
    monkeypatch.setattr(machine_code, "openmp", lambda: None)  # a pool of Python's threads
    assert torch.equal(decode_attention(queries, keys, values), results[0])


class Layer(nn.Module):
    num_key_value_groups, is_causal = 4, True


NOT_SERVED = {
    "prompt": lambda q, k, v: {"queries": torch.cat([q, q], 2)},
    "other types": lambda q, k, v: {"keys": k.bfloat16(), "values": v.bfloat16(), "queries": q.bfloat16().double()},
    "float64": lambda q, k, v: {"queries": q.double(), "keys": k.double(), "values": v.double()},
    "channels": lambda q, k, v: {"queries": q[..., :60], "keys": k[..., :60], "values": v[..., :60]},
    "channels apart": lambda q, k, v: {"keys": k.mT.contiguous().mT},
    "many queries of a head": lambda q, k, v: {"queries": q.repeat(1, 5, 1, 1)},
    "other values": lambda q, k, v: {"values": v[..., :32]},
    "added mask": lambda q, k, v: {"attention_mask": torch.randn(1, 1, 1, 33)},
    "mask by heads": lambda q, k, v: {"attention_mask": torch.rand(2, 8, 1, 33) < 0.5},
    "gradients": lambda q, k, v: {"queries": q.clone().requires_grad_(True)},
    "dropout": lambda q, k, v: {"dropout": 0.5},
    "bias": lambda q, k, v: {"position_bias": torch.randn(1, 8, 1, 33)},
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_SERVED)
def test_the_rest_goes_to_the_library(case, monkeypatch):
    monkeypatch.setattr(hook, "decode_attention", None)
    given = []
    monkeypatch.setitem(
        hook.ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", lambda *args, **kwargs: given.append((args, kwargs))
    )
    keys, values = cached(2, 2, 33, 64)
    how = {"queries": draw(2, 8, 64), "keys": keys, "values": values, "attention_mask": None, "scaling": 0.1}
    how |= NOT_SERVED[case](how["queries"], keys, values)
    hook.attend(Layer(), **how)
    [(args, kwargs)] = given
    assert args[1:] == tuple(how.pop(name) for name in ("queries", "keys", "values", "attention_mask"))
    assert kwargs == {"dropout": 0.0} | how


def test_a_processor_without_kernels(monkeypatch):
    monkeypatch.setattr(processor, "here", lambda: processor.Processor("old", ()))
    assert not is_served(draw(1, 8, 64), *cached(1, 2, 33, 64), None)
