"""One small instruct model, converted as a user does, as each of the two types: what every tool is given."""

import pytest
import torch
from checkpoints import params, small_tokenizer, write_meta
from transformers import AutoTokenizer

from hf_llama3 import Llama3ForCausalLM
from hf_llama3.conversion import convert


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The folder that `hf-llama3 convert --instruct` writes, of upstream's type, and the same saved by our class."""
    work = tmp_path_factory.mktemp("folders")
    layout = params(vocab=516, use_scaled_rope=True)
    write_meta(work / "meta", layout, tokenizer=small_tokenizer(work), dtype=torch.float32)
    convert(work / "meta", work / "upstream", rope_factor=8.0, instruct=True)
    Llama3ForCausalLM.from_pretrained(work / "upstream").save_pretrained(work / "ours")
    AutoTokenizer.from_pretrained(work / "upstream").save_pretrained(work / "ours")
    return {"ours": work / "ours", "upstream": work / "upstream"}


@pytest.fixture(scope="session")
def tokenizer(folders):
    return AutoTokenizer.from_pretrained(folders["upstream"])
