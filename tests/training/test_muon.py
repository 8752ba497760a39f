"""Muon against torch's: the same steps, in the type that the processor multiplies fast, many matrices at a time."""

import copy

import pytest
import torch

from hf_llama3.cpu import processor
from hf_llama3.training import muon
from hf_llama3.training.muon import Muon, orthogonalize

SHAPES = [(64, 192), (192, 192), (256, 96), (96, 256), (64, 192), (192, 192), (64, 192)]
WITH, WITHOUT = ("avx2", "avx512_f", "avx512_bf16"), ("avx2", "fma3")  # bfloat16 products


@pytest.fixture(params=[WITH, WITHOUT], ids=["bfloat16", "float32"])
def dtype(request, monkeypatch):
    """Be on a processor of each kind; returns the type that it multiplies fast."""
    monkeypatch.setattr(processor, "here", lambda: processor.Processor("a processor", request.param))
    return torch.bfloat16 if request.param is WITH else torch.float32


def make_matrices():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.05) for shape in SHAPES]


def steps_of(optimizer, matrices, count=3):
    """Return by how much each step moves each matrix; gradients have large and small columns."""
    generator, moves = torch.Generator().manual_seed(1), []
    for _ in range(count):
        before = [matrix.detach().clone() for matrix in matrices]
        for matrix in matrices:
            sizes = torch.logspace(0, -2, matrix.shape[1])
            matrix.grad = torch.randn(matrix.shape, generator=generator) * sizes
        optimizer.step()
        moves.append([matrix.detach() - old for matrix, old in zip(matrices, before, strict=True)])
    return moves


@pytest.mark.parametrize("shape", [(3, 64, 192), (3, 192, 64)], ids=["wide", "tall"])
def test_singular_values_are_drawn_near_one(shape, dtype):
    """Of a product whose own go from 1 to 100, and along the same directions: what is left is close to U V^T."""
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    ours = orthogonalize((u * torch.logspace(0, 2, 64)) @ vh)
    assert ours.dtype == dtype
    values = torch.linalg.svdvals(ours.float())
    assert values.min() > 0.6 and values.max() < 1.3
    theirs = u @ vh
    assert (ours.float() * theirs).sum() / (ours.float().norm() * theirs.norm()) > 0.98


def test_steps_are_those_of_torch(dtype):
    """Theirs are in bfloat16: 8 bits, of which five iterations lose some; in the same type the sums differ alone."""
    matrices, same = make_matrices(), make_matrices()
    ours = steps_of(Muon(matrices, lr=0.02, weight_decay=0.1), matrices)
    theirs = steps_of(torch.optim.Muon(same, lr=0.02, weight_decay=0.1), same)
    at_most = 0.04 if dtype == torch.float32 else 0.01
    for our_moves, their_moves in zip(ours, theirs, strict=True):
        for our, their in zip(our_moves, their_moves, strict=True):
            assert (our - their).norm() < at_most * their.norm()


def test_many_at_a_time_are_as_one(dtype, monkeypatch):
    """Up to the order of the sums; what is left over from a full batch counts as well."""
    moves = []
    for numbers in (1, 2 * 64 * 192, 2**20):
        monkeypatch.setattr(muon, "BATCH", numbers)
        matrices = make_matrices()
        moves.append(steps_of(Muon(matrices, lr=0.02, weight_decay=0.1), matrices, count=1)[0])
    for others in moves[1:]:
        for ours, theirs in zip(others, moves[0], strict=True):
            assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_few_products_of_small_matrices(dtype, monkeypatch):
    """One for all of a shape at each iteration, of the smaller of a matrix's two products with itself."""
    shapes, original = [], torch.bmm

    def count(*matrices):
        result = original(*matrices)
        assert result.dtype == dtype
        shapes.append(tuple(result.shape))
        return result

    monkeypatch.setattr(torch, "bmm", count)
    matrices = make_matrices()
    steps_of(Muon(matrices, lr=0.02, weight_decay=0.1), matrices, count=1)
    assert shapes == [(n, s, s) for n, s in ((3, 64), (2, 192), (1, 96), (1, 96)) for _ in range(muon.ITERATIONS)]


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [(WITHOUT, torch.float32), (WITH, torch.bfloat16), ((*WITHOUT, "avx512_f"), torch.float32), ((), torch.float32)],
)
def test_the_type_follows_the_processor(instructions, expected, monkeypatch):
    """A GPU's does not."""
    monkeypatch.setattr(processor, "here", lambda: processor.Processor("a processor", instructions))
    assert muon.product_dtype(torch.device("cpu")) == expected
    assert muon.product_dtype(torch.device("cuda")) == muon.product_dtype(torch.device("mps")) == torch.bfloat16


def test_its_state_goes_on():
    """A momentum for each matrix, by which another optimiser takes the same next step; one without a gradient stays."""
    matrices, same = make_matrices(), make_matrices()
    optimizer = Muon(matrices, lr=0.02, weight_decay=0.1)
    steps_of(optimizer, matrices, count=1)
    other = Muon(same, lr=0.02, weight_decay=0.1)
    with torch.no_grad():
        for ours, theirs in zip(same, matrices, strict=True):
            ours.copy_(theirs)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [list(state) for state in other.state.values()] == [["momentum_buffer"]] * len(SHAPES)
    ours, theirs = steps_of(other, same, count=1)[0], steps_of(optimizer, matrices, count=1)[0]
    assert all(map(torch.equal, ours, theirs))
    same[0].grad, before = None, same[0].detach().clone()
    other.step()
    assert torch.equal(same[0], before)
