"""A model to continue training from, in either format, and LoRA adapters for it."""

from pathlib import Path

import torch

from hf_llama3.conversion.checkpoint import Checkpoint
from hf_llama3.conversion.load import load_checkpoint
from hf_llama3.conversion.opening import open_checkpoint
from hf_llama3.conversion.tokenizer.bounds import check_tokenizer
from hf_llama3.conversion.tokenizer.files import hf_tokenizer
from hf_llama3.errors import UserError
from hf_llama3.modeling_llama3 import Llama3ForCausalLM

from .tokenizer import TextTokenizer

VOCABULARY = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


def open_source(path: str, context: int) -> tuple[Checkpoint, TextTokenizer]:
    """Open a checkpoint and its tokenizer.

    Raises:
        UserError: it cannot be opened, has no tokenizer, or was made for fewer than `context` tokens.
    """
    checkpoint = open_checkpoint(Path(path))
    checkpoint.require_language_model()
    check_tokenizer(checkpoint)
    files = hf_tokenizer(checkpoint, notes=[])
    if "tokenizer.json" not in files:
        raise UserError(f"{path} must hold a tokenizer to be trained on text; add its files")
    if context > (limit := checkpoint.config["max_position_embeddings"]):
        raise UserError(f"--context must be at most the {limit} tokens that {path} was made for, got {context}")
    return checkpoint, TextTokenizer(files, {key: checkpoint.config[key] for key in VOCABULARY})


def load_source(checkpoint: Checkpoint, attention_dropout: float) -> Llama3ForCausalLM:
    """Load the model in float32, since small updates are lost in narrower types."""
    options = {"dtype": torch.float32, "attention_dropout": attention_dropout}
    if not checkpoint.loads_as_is:
        model = load_checkpoint(checkpoint, **options)
        model.name_or_path = model.config.name_or_path = str(checkpoint.path)  # the base that adapters name
        return model
    return Llama3ForCausalLM.from_pretrained(checkpoint.path, trust_remote_code=False, **options)


def add_adapters(model: Llama3ForCausalLM, rank: int):
    """Return the model with LoRA adapters (Hu et al. 2021, arXiv:2106.09685) that alone are trained.

    Raises:
        UserError: the extra `peft` is missing.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError('--lora needs peft; pip install "hf_llama3[peft]"') from error
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM"))
