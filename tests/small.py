"""Small models with weights large enough that texts differ, of our class and of upstream's."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_llama3 import Llama3Config, Llama3ForCausalLM

CLASSES = {"ours": (Llama3ForCausalLM, Llama3Config), "upstream": (LlamaForCausalLM, LlamaConfig)}
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make_model(kind="ours", dtype=torch.float32, **changes):
    """Build a model whose likeliest tokens lie far enough apart that sums in another order do not change them."""
    torch.manual_seed(0)
    model_class, config_class = CLASSES[kind]
    model = model_class(config_class(**SHAPE | {"tie_word_embeddings": True} | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1 if "norm" in name else 0, 0.3 if "norm" in name else 0.1)
    return model.to(dtype).eval()


def prompts(rows=2, length=9):
    """Draw ids without special ones."""
    return torch.randint(3, SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids=None):
    return model(input_ids=prompts(3, 40) if ids is None else ids).logits.float()
