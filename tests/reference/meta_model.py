"""Run by torchrun, one process a shard: Meta's own model (wheel llama-models, imported as `models`) on the CPU.

    torchrun --nproc-per-node SHARDS meta_model.py FOLDER TOKENS.safetensors OUTPUT.safetensors NEW_TOKENS

Writes the logits of `tokens` and the greedy continuation of its first row.
"""

import json
import os
import sys
from pathlib import Path

import fairscale.nn.model_parallel.initialize as model_parallel
import torch
from models.llama3.args import ModelArgs
from models.llama3.model import Transformer
from safetensors.torch import load_file, save_file

folder, tokens_path, output_path, new_tokens = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
torch.distributed.init_process_group("gloo")
model_parallel.initialize_model_parallel(int(os.environ["WORLD_SIZE"]))
rank = int(os.environ["RANK"])
torch.manual_seed(0)

params = json.loads((folder / "params.json").read_text())
model = Transformer(ModelArgs(max_seq_len=256, max_batch_size=4, **params))
shard = sorted(folder.glob("*.pth"))[rank]
model.load_state_dict(torch.load(shard, mmap=True, weights_only=True, map_location="cpu"), strict=True)

tokens = load_file(tokens_path)["tokens"]
logits = model(tokens, 0)
row = tokens[:1]
step = model(row, 0)
for _ in range(new_tokens):
    row = torch.cat([row, step[:, -1:].argmax(-1)], dim=1)
    step = model(row[:, -1:], row.shape[1] - 1)
if rank == 0:
    save_file({"logits": logits.contiguous(), "greedy": row.contiguous()}, output_path)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
