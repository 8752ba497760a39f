"""Files of torch.save that are planned from parts of them, whatever these parts hold."""

import random

import pytest
import torch

from hf_llama3.conversion.formats.pth import read_pth
from hf_llama3.conversion.hub.parts import TAIL, NotInParts, add_hollow_pth
from hf_llama3.errors import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file whose directory begins before its last 64 KiB."""
    path = tmp_path_factory.mktemp("parts") / "model.pth"
    torch.save({f"layers.{number}.attention.wq.weight": torch.randn(16, 8) for number in range(1500)}, path)
    return path


def fetcher(content, asked):
    def fetch(start, stop):
        assert 0 <= start < stop <= len(content)
        asked.append(stop - start)
        return content[start:stop]

    return fetch


def test_names_types_and_shapes_of_the_whole_file(whole, tmp_path):
    asked, content = [], whole.read_bytes()
    hollow = add_hollow_pth(tmp_path / "model.pth", len(content), fetcher(content, asked))
    ours, theirs = read_pth(hollow.path), read_pth(whole)
    assert [(name, tensor.dtype, tensor.shape) for name, tensor in ours.items()] == [
        (name, tensor.dtype, tensor.shape) for name, tensor in theirs.items()
    ]
    assert hollow.path.stat().st_size == len(content) and len(asked) == 4 and sum(asked) < len(content) / 2
    assert not any(bytes(tensor.read()).strip(b"\0") for tensor in ours.values())  # what came by chance is no element


def test_elements_in_the_last_bytes_are_holes(tmp_path):
    torch.save({"weight": torch.ones(100_000)}, tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    hollow = add_hollow_pth(tmp_path / "model.pth", len(content), fetcher(content, []))
    assert len(content) > 5 * TAIL and not any(read_pth(hollow.path)["weight"].read())


@pytest.mark.parametrize("seed", range(300))
def test_damaged_lists(seed, whole, tmp_path):
    """They are refused, or read as the whole file would be: no other error, and no other size."""
    drawn, content = random.Random(seed), bytearray(whole.read_bytes())
    for _ in range(drawn.choice([1, 1, 4])):
        near_end = drawn.random() < 0.4
        at = (
            len(content) - drawn.randrange(1, 100) if near_end else drawn.randrange(len(content) * 3 // 4, len(content))
        )
        content[at] = drawn.choice([0, 1, 255, drawn.randrange(256)])
    path = tmp_path / "model.pth"
    try:
        add_hollow_pth(path, len(content), fetcher(bytes(content), []))
        read_pth(path)
    except (NotInParts, UserError):
        pass
    assert path.stat().st_size == len(content)
