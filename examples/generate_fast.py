"""Generate with a plain model and with the same one optimised, and compare tokens and speed.

hf-llama3 quickstart
python examples/generate_fast.py
python examples/generate_fast.py llama-3-8b --quantize int8 --new-tokens 100
"""

import argparse
import time

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_llama3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="quickstart/hf", help="Hugging Face folder")
    parser.add_argument("--prompt", default="The statement")
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--quantize", choices=("int8", "int4"))
    parser.add_argument("--compile", action="store_true", help="takes a minute, once")
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    inputs = tokenizer(options.prompt, return_tensors="pt").to(model.device)

    def timed(name):
        lengths = {"min_new_tokens": options.new_tokens, "max_new_tokens": options.new_tokens}
        model.generate(**inputs, max_new_tokens=2, do_sample=False)  # the first call prepares what later ones reuse
        started = time.perf_counter()
        tokens = model.generate(**inputs, **lengths, do_sample=False)[0]
        print(f"{name}: {options.new_tokens / (time.perf_counter() - started):.1f} tokens/s")
        return tokens.tolist()

    plain = timed("plain")
    model = hf_llama3.optimize(model, quantize=options.quantize, compile=options.compile)
    fast = timed("optimised")
    print("the same tokens" if fast == plain else "other tokens: its weights have fewer bits, or two were as likely")
    print(tokenizer.decode(fast, skip_special_tokens=True))


if __name__ == "__main__":
    main()
