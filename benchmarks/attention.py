"""Attention of one token against the library's, milliseconds a layer, keys and values of as many layers in turn.

    OMP_NUM_THREADS=1 python benchmarks/attention.py
    OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/attention.py
    OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
        python benchmarks/attention.py    # and Intel's library, which torch calls, without products of bfloat16

"Grouped" is torch's own with the queries that share a key/value head as so many tokens of one head; "read" is the time
in which the memory brings keys and values.
"""

# Shapes: H query heads, K key/value heads, S keys, D channels of a head

import argparse
import statistics
import time
from types import SimpleNamespace

import torch
from machine import describe_machine
from transformers.integrations.sdpa_attention import sdpa_attention_forward

HEADS, CHANNELS, LAYERS = 32, 64, 16


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 512, 2048], help="keys")
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[8, 32], help=f"for {HEADS} query heads")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(describe_machine(), "\n")
    print("| key/value heads | keys | library | grouped | ours | read |\n|---:|---:|---:|---:|---:|---:|")
    for kv_heads in args.kv_heads:
        for tokens in args.contexts:
            times = time_attention(kv_heads, tokens, getattr(torch, args.dtype), args.rounds)
            print(f"| {kv_heads} | {tokens} | {' | '.join(f'{one * 1e3:.3f}' for one in times)} |", flush=True)


def time_attention(kv_heads: int, tokens: int, dtype: torch.dtype, rounds: int) -> list[float]:
    """Return the medians of the three, in seconds, and what reading takes."""
    from hf_llama3.cpu.kernels.attention import decode_attention
    from hf_llama3.measure.bench import measure_read_speed

    group = HEADS // kv_heads
    module = SimpleNamespace(num_key_value_groups=group, is_causal=True)
    memory = torch.randn(2, 1, kv_heads, tokens + 256, CHANNELS).to(dtype)
    layers = [memory.clone()[:, :, :, :tokens].unbind(0) for _ in range(LAYERS)]  # (1, K, S, D)
    queries = torch.randn(1, HEADS, 1, CHANNELS).to(dtype)  # (1, H, 1, D)
    grouped = queries.view(1, kv_heads, group, CHANNELS)
    contenders = (
        lambda *cached: sdpa_attention_forward(module, queries, *cached, None),
        lambda *cached: torch.nn.functional.scaled_dot_product_attention(grouped, *cached),
        lambda *cached: decode_attention(queries, *cached),
    )
    times = [[] for _ in contenders]
    for _ in range(rounds):
        for attend, own in zip(contenders, times, strict=True):
            for cached in layers:
                started = time.perf_counter()
                attend(*cached)
                own.append(time.perf_counter() - started)
    size = 2 * kv_heads * tokens * CHANNELS * dtype.itemsize
    return [*(statistics.median(own[LAYERS:]) for own in times), size / measure_read_speed("cpu")]


if __name__ == "__main__":
    main()
