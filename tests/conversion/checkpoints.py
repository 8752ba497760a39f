"""Checkpoints made without the package's own table: Meta's by torch.save, Hugging Face's by upstream's classes."""

import base64
import importlib.util
import json
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_llama3.conversion import convert


def real_tokenizer() -> Path:
    """Meta's own tokenizer.model of 128,000 ranks, which the wheel llama-models carries."""
    folder = next(iter(importlib.util.find_spec("llama_models").submodule_search_locations))
    return Path(folder) / "llama3" / "tokenizer.model"


SMALL_VOCAB = 516  # 256 bytes, four tokens made of them, 256 special ones


def small_tokenizer(folder) -> Path:
    """A tokenizer.model in Meta's format that takes no time."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"bc", b"abc", b"abcd"]
    path = Path(folder) / "small-tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


def params(dim=64, layers=2, heads=8, kv_heads=4, vocab=512, **more):
    """A params.json; a feed-forward of 192 for the width of 64."""
    return {
        "dim": dim,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "vocab_size": vocab,
        "multiple_of": 32,
        "ffn_dim_multiplier": 1.1,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
    } | more


FFN = 192  # what `params` means: 32 * ceil(int(1.1 * int(8 * 64 / 3)) / 32)


def meta_tensors(params, ffn=FFN, tied=False, dtype=torch.bfloat16, seed=0):
    """Random weights under Meta's names, whole."""
    generator = torch.Generator().manual_seed(seed)
    dim, head_dim = params["dim"], params["dim"] // params["n_heads"]
    kv_dim = (params.get("n_kv_heads") or params["n_heads"]) * head_dim

    def draw(*shape, mean=0.0):
        return (torch.randn(*shape, generator=generator) * 0.2 + mean).to(dtype)

    tensors = {"tok_embeddings.weight": draw(params["vocab_size"], dim)}
    for layer in range(params["n_layers"]):
        tensors |= {
            f"layers.{layer}.attention.wq.weight": draw(dim, dim),
            f"layers.{layer}.attention.wk.weight": draw(kv_dim, dim),
            f"layers.{layer}.attention.wv.weight": draw(kv_dim, dim),
            f"layers.{layer}.attention.wo.weight": draw(dim, dim),
            f"layers.{layer}.feed_forward.w1.weight": draw(ffn, dim),
            f"layers.{layer}.feed_forward.w2.weight": draw(dim, ffn),
            f"layers.{layer}.feed_forward.w3.weight": draw(ffn, dim),
            f"layers.{layer}.attention_norm.weight": draw(dim, mean=1.0),
            f"layers.{layer}.ffn_norm.weight": draw(dim, mean=1.0),
        }
    tensors |= {"norm.weight": draw(dim, mean=1.0), "output.weight": draw(params["vocab_size"], dim)}
    if tied:
        tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    return tensors


ROW_PARALLEL = ("wo.weight", "w2.weight")


def shard(tensors, mp, embedding_dim=0):
    """Divide Meta's tensors among `mp` ranks as fairscale's parallel layers do."""
    shards = [{} for _ in range(mp)]
    for name, tensor in tensors.items():
        dim = 1 if name.endswith(ROW_PARALLEL) else embedding_dim if name == "tok_embeddings.weight" else 0
        for rank, piece in enumerate([tensor] * mp if tensor.ndim == 1 else tensor.chunk(mp, dim)):
            shards[rank][name] = piece.clone()
    return shards


def write_meta(folder, params, mp=1, tokenizer=None, embedding_dim=0, **options):
    """Write a directory of Meta's with torch.save; returns the whole tensors."""
    tensors = meta_tensors(params, **options)
    folder.mkdir(parents=True)
    for rank, tensor in enumerate(shard(tensors, mp, embedding_dim)):
        torch.save(tensor, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    if tokenizer:
        shutil.copy(tokenizer, folder / "tokenizer.model")
    return tensors


def hf_model(heads=8, kv_heads=4, tied=False, dtype=torch.bfloat16, seed=0, **more):
    """Upstream's model with random weights, of the geometry that `params` describes."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": FFN,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**config | more))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model.to(dtype).eval()


def folder_with_tokenizer(folder):
    """A Hugging Face folder with the small tokenizer, made from Meta's files."""
    write_meta(folder / "meta", params(vocab=SMALL_VOCAB), tokenizer=small_tokenizer(folder))
    convert(folder / "meta", folder / "hf")
    return folder / "hf"


def plain_folder(tmp_path, **options):
    """Such a model, and a Hugging Face folder of it without a tokenizer."""
    model = hf_model(**options)
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain", model
