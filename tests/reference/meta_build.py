"""Run by torchrun, one process a shard: Meta's own `Llama3.build` and `generate` (wheel llama-models) on the CPU.

    torchrun --nproc-per-node SHARDS meta_build.py FOLDER PROMPTS.json NEW_TOKENS

Prints the greedy continuations of prompts, given as lists of token ids, as JSON on the last line.
"""

import json
import sys
from types import ModuleType

for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
    sys.modules[name] = ModuleType(name)  # of the vision models, which are not built here
sys.modules["torchvision.transforms"].functional = sys.modules["torchvision.transforms.functional"]

import torch.distributed  # noqa: E402
from models.llama3.chat_format import LLMInput  # noqa: E402
from models.llama3.generation import Llama3  # noqa: E402

folder, prompts_path, new_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
with open(prompts_path) as file:
    prompts = json.load(file)
llama = Llama3.build(folder, max_seq_len=128, max_batch_size=1, device="cpu")
llama.model.float()  # it is built in bfloat16, where which of two tokens is likelier depends on the order of a sum
continuations = []
for prompt in prompts:
    steps = llama.generate([LLMInput(tokens=prompt)], temperature=0, max_gen_len=new_tokens)
    continuations.append([results[0].token for results in steps])
print(json.dumps(continuations))
torch.distributed.barrier()
torch.distributed.destroy_process_group()  # its threads, else, may still run when the process ends
