"""A directory of Meta's straight into the model, without a conversion on disk."""

import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from hf_llama3.configuration_llama3 import Llama3Config
from hf_llama3.errors import UserError
from hf_llama3.modeling_llama3 import Llama3ForCausalLM

from .checkpoint import open_checkpoint
from .plan import assemble, hf_tokenizer
from .storage import Assembly
from .weights import sizes


class LazyTensor:
    """Stand for a tensor in the state dict; the library indexes it when it is this tensor's turn to be loaded."""

    def __init__(self, assembly: Assembly):
        self.assembly = assembly
        self.dtype = getattr(torch, assembly.dtype.name)
        self.shape = torch.Size(assembly.shape)

    def __getitem__(self, index):
        array = self.assembly.whole().view(f"<i{self.assembly.dtype.itemsize}")  # torch lacks the unsigned types
        return torch.from_numpy(array).view(self.dtype)[index]

    def is_floating_point(self):
        return True


def load_meta(path, *, rope_factor: float | None = None, **kwargs) -> Llama3ForCausalLM:
    """Load a directory of Meta's, of any number of shards, as `Llama3ForCausalLM`.

    Args:
        rope_factor: see `convert`.
        kwargs: for `from_pretrained`; `dtype` is the files' own if omitted.

    Raises:
        UserError: the directory is not one of Meta's, damaged, contradicts itself, or needs `rope_factor`.
    """
    checkpoint = open_checkpoint(path, rope_factor)
    if checkpoint.format != "meta":
        raise UserError(f"{path} is a Hugging Face folder; load it with AutoModelForCausalLM.from_pretrained")
    size = sizes(checkpoint.config)
    state_dict = {
        row.hf: LazyTensor(assemble(checkpoint, row, "hf", 0, row.full_shape(size)[row.split or 0]))
        for row in checkpoint.own_rows
    }
    if kwargs.get("dtype", "auto") == "auto":
        kwargs["dtype"] = getattr(torch, checkpoint.dtype)
    config = Llama3Config(**checkpoint.config)
    return Llama3ForCausalLM.from_pretrained(None, config=config, state_dict=state_dict, **kwargs)


def load_meta_tokenizer(path):
    """Load the tokenizer of a directory of Meta's as transformers knows it.

    Raises:
        UserError: there is none, or it is not Llama 3's.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.tokenizer_kind != "tiktoken":
        raise UserError(f"{path} must hold a tokenizer.model of Llama 3, got {checkpoint.tokenizer_kind}")
    with tempfile.TemporaryDirectory() as folder:
        for name, content in hf_tokenizer(checkpoint).items():
            (Path(folder) / name).write_bytes(content)
        return PreTrainedTokenizerFast.from_pretrained(folder)
