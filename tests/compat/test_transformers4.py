"""transformers 4 reads the portable folder: right theta, right scaling, right tokenizer, same logits.

It cannot live in the same environment as transformers 5: set TRANSFORMERS4_PYTHON to the interpreter of one that holds
transformers 4.57, and run `pytest -m compat`.
"""

import json
import os
import subprocess

import pytest
import torch
from checkpoints import params, real_tokenizer, write_meta
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_llama3.conversion import convert

pytestmark = pytest.mark.compat

READER = """
import json, sys, torch, transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
assert transformers.__version__.startswith("4.57"), transformers.__version__
config = AutoConfig.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").eval()
save_file({"logits": model(torch.arange(64)[None] * 1000).logits.float().contiguous()}, folder + "-logits.safetensors")
print(json.dumps({
    "class": type(model).__name__, "theta": config.rope_theta, "scaling": config.rope_scaling,
    "dtype": str(model.dtype), "ids": [tokenizer(text)["input_ids"] for text in texts],
    "chat": tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False),
    "decoded": [tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) for text in texts],
    "pad": tokenizer.pad_token, "eos": model.generation_config.eos_token_id,
}))
"""
TEXTS = ["Hello , world !", "  two  spaces\n\nand lines", "你好 \U0001f999", "1234567 I'll <|eot_id|>"]


@pytest.mark.parametrize("factor", [None, 8.0, 32.0])
def test_reads_the_portable_folder(factor, tmp_path):
    python = os.environ["TRANSFORMERS4_PYTHON"]
    layout = params(vocab=128256, **({"use_scaled_rope": True} if factor else {}))
    write_meta(tmp_path / "meta", layout, tokenizer=real_tokenizer())
    convert(tmp_path / "meta", tmp_path / "hf", rope_factor=factor, instruct=True)
    result = subprocess.run(
        [python, "-c", READER, tmp_path / "hf", json.dumps(TEXTS)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    theirs = json.loads(result.stdout)

    assert theirs["class"] == "LlamaForCausalLM" and theirs["dtype"] == "torch.bfloat16"
    assert theirs["theta"] == 500000.0
    assert (theirs["scaling"] or {}).get("factor") == factor
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert theirs["decoded"][:3] == TEXTS[:3]  # the fourth holds a special token, which is skipped
    assert theirs["chat"] == tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ours = model(torch.arange(64)[None] * 1000).logits.float()
    assert torch.equal(load_file(tmp_path / "hf-logits.safetensors")["logits"], ours)
    assert theirs["eos"] == model.generation_config.eos_token_id
