"""Convert a checkpoint to the other format, say what was inferred, and prove that nothing was lost.

hf-llama3 quickstart
python examples/convert_and_verify.py
python examples/convert_and_verify.py Meta-Llama-3-8B llama-3-8b
"""

import argparse
import sys

from hf_llama3.conversion import convert, inspect, verify


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="quickstart/meta", help="folder of either format")
    parser.add_argument("target", nargs="?", default="converted", help="folder to make")
    options = parser.parse_args()

    source = inspect(options.source)  # reads headers, no weights
    print(f"{options.source}: {source.format}, {source.num_parameters:,} parameters, {source.num_shards} shards")
    for sentence in source.inferred:
        print(f"  inferred: {sentence}")

    convert(options.source, options.target, progress=True)
    proof = verify(options.source, options.target, logits=True)
    print(f"{options.target}: {inspect(options.target).format}, {proof.tensors} tensors compared to the bit")
    print(f"tokenizer {proof.tokenizer}, logits {proof.logits}")
    if not proof.ok:
        sys.exit("\n".join(proof.differences))


if __name__ == "__main__":
    main()
