"""Load a checkpoint that transformers does not read, straight into the model and without a conversion on disk."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig

from hf_llama3.configuration_llama3 import Llama3Config
from hf_llama3.errors import UserError, library_errors
from hf_llama3.files.atomic import write_files
from hf_llama3.files.json import to_json
from hf_llama3.modeling_llama3 import Llama3ForCausalLM

from .checkpoint import Checkpoint
from .config.hf import portable_config
from .opening import open_checkpoint
from .plan import assemble
from .tokenizer.bounds import check_tokenizer
from .tokenizer.files import hf_tokenizer
from .weights import Row


class LazyTensor:
    """A tensor of the state dict that is read when the library indexes it, one tensor after another.

    Where processes divide a tensor, each indexes a slice, and reads no more than that.
    """

    def __init__(self, checkpoint: Checkpoint, row: Row):
        self.checkpoint, self.row = checkpoint, row
        whole = assemble(checkpoint, row, "hf")
        self.dtype = getattr(torch, whole.dtype.name)
        self.shape = torch.Size(whole.shape)

    def get_shape(self):
        return list(self.shape)

    def __getitem__(self, index):
        axis = self.row.split
        if axis is None or not isinstance(index, tuple):
            return self.read(0, None)[index]
        start, stop, _ = index[axis].indices(self.shape[axis])
        unit = self.checkpoint.config["head_dim"] if self.row.rotary else 1  # rows that are reordered together
        first, last = start // unit * unit, max(-(-stop // unit), start // unit + 1) * unit
        within = slice(start - first, stop - first)
        return self.read(first, last)[(*index[:axis], within, *index[axis + 1 :])]

    def read(self, start: int, stop: int | None) -> torch.Tensor:
        array = assemble(self.checkpoint, self.row, "hf", None, start, stop).whole()
        signed = array.view(f"<i{array.itemsize}")  # torch lacks the unsigned types
        return torch.from_numpy(signed).view(self.dtype)

    def is_floating_point(self):
        return True


def load_meta(path, *, rope_factor: float | None = None, **kwargs) -> Llama3ForCausalLM:
    """Load a directory of Meta's, of any number of shards, or a GGUF file, as `Llama3ForCausalLM`.

    Args:
        path: the file, the folder, or a name on the Hub as `owner/name` or `owner/name/original`, with `@revision`
            after either.
        rope_factor: see `convert`.
        kwargs: for `from_pretrained`, including fields of the configuration; `dtype` is that of the files if omitted.

    Raises:
        UserError: it is neither a directory of Meta's nor a GGUF file, is damaged, contradicts itself, or needs
            `rope_factor`.
    """
    if "config" in kwargs or "state_dict" in kwargs:
        raise UserError("load_meta reads configuration and weights from the directory; leave out config and state_dict")
    return load_checkpoint(open_meta_only(path, rope_factor), **kwargs)


def load_checkpoint(checkpoint: Checkpoint, **kwargs) -> Llama3ForCausalLM:
    """Load an opened checkpoint; `kwargs` as for `load_meta`."""
    checkpoint.require_language_model()
    checkpoint.check_copies()
    state_dict = {row.hf: LazyTensor(checkpoint, row) for row in checkpoint.own_rows}
    dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", "auto")
    dtype = getattr(torch, checkpoint.dtype) if dtype == "auto" else dtype
    config, kwargs = Llama3Config.from_dict(checkpoint.config, return_unused_kwargs=True, dtype=dtype, **kwargs)
    kwargs.pop("trust_remote_code", None)  # code from a folder is never run
    model = Llama3ForCausalLM.from_pretrained(
        None, config=config, state_dict=state_dict, trust_remote_code=False, **kwargs
    )
    model.name_or_path = str(checkpoint.path)
    if checkpoint.generation_config is not None:
        model.generation_config = GenerationConfig(**checkpoint.generation_config)
    return model


def load_meta_tokenizer(path, *, rope_factor: float | None = None):
    """Load the tokenizer of a directory of Meta's, or of a GGUF file, as transformers' class.

    Raises:
        UserError: it has none.
    """
    checkpoint = open_meta_only(path, rope_factor)
    if checkpoint.tokenizer is None and checkpoint.format == "gguf":
        raise UserError(f"{path} holds {next(one for one in checkpoint.inferred if one.startswith('no tokenizer'))}")
    if checkpoint.tokenizer is None:
        raise UserError(f"{path} must hold a tokenizer.model to turn text into tokens; put Meta's there")
    check_tokenizer(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        config = portable_config(checkpoint.config, checkpoint.dtype, "llama")  # decides where no class is named
        write_files(Path(folder), hf_tokenizer(checkpoint, notes=[]) | {"config.json": to_json(config)})
        with library_errors(f"the tokenizer of {path} cannot be loaded", "write it again"):
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def open_meta_only(path, rope_factor: float | None):
    checkpoint = open_checkpoint(path, rope_factor)
    if checkpoint.format == "hf":
        raise UserError(f"{path} is a Hugging Face folder; load it with from_pretrained")
    return checkpoint
