"""Complete prompts in several processes: each its share of them (data), or all together on each (tensor).

    hf-llama3 quickstart
    torchrun --nproc-per-node 2 examples/distribute.py
    torchrun --nproc-per-node 8 examples/distribute.py llama-3-70b --parallel tensor --prompts my-prompts.txt

On GPUs each process takes one, on a CPU they share the cores. Without torchrun there is one, and nothing to divide.
"""

import argparse
import os
from pathlib import Path

from hf_llama3.distributed.parallel import join
from hf_llama3.text.loading import load_model
from hf_llama3.text.prompts import Job, complete

PROMPTS = ["The statement", "A class", "If the", "Names"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="quickstart/hf", help="of either format")
    parser.add_argument("--parallel", choices=("data", "tensor", "pipeline"), default="data")
    parser.add_argument("--prompts", type=Path, help="file with a prompt on each line")
    parser.add_argument("--new-tokens", type=int, default=20)
    options = parser.parse_args()

    mode = options.parallel if "WORLD_SIZE" in os.environ else None
    with join(mode) as group:
        model, tokenizer = load_model(options.folder, group=group)  # reads this process's part only
        if group.is_first:
            print(f"processes: {group.count}, divided by: {mode}", flush=True)
        job = Job(options.new_tokens)
        for found in complete(model, tokenizer, options.prompts or PROMPTS, job, 2, group, progress=False):
            print(repr(found.prompt + found.text), flush=True)  # all of them in the first process, in order


if __name__ == "__main__":
    main()
