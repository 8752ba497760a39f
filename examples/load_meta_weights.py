"""Load a directory of Meta's straight into the model, with nothing converted on disk, and complete a prompt.

hf-llama3 quickstart
python examples/load_meta_weights.py
python examples/load_meta_weights.py Meta-Llama-3-8B --prompt "The capital of France is"
"""

import argparse

import hf_llama3
from hf_llama3.conversion.load import load_meta_tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="quickstart/meta", help="one of Meta's, of any number of shards")
    parser.add_argument("--prompt", default="The statement")
    parser.add_argument("--new-tokens", type=int, default=20)
    options = parser.parse_args()

    model = hf_llama3.load_meta(options.folder)  # takes what from_pretrained takes: dtype, device_map, ...
    tokenizer = load_meta_tokenizer(options.folder)
    print(f"{type(model).__name__}, {model.num_parameters():,} parameters, {model.dtype}")

    inputs = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=options.new_tokens, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
