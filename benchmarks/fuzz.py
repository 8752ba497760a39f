"""Changed files given to every reader, a million in all: `python benchmarks/fuzz.py [--examples N] [--first NUMBER]`.

What is changed and what is asked stands in tests/conversion/fuzz_files.py and fuzz_json.py. Each process takes a few
thousand examples, within 5 seconds and 300 MB for each. Stops at the first finding, which it prints with its number.
"""

import argparse
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from machine import describe_machine

FILES = Path(__file__).parent.parent / "tests" / "conversion" / "fuzz_files.py"
READERS = ("pickle", "unzipped", "zip", "safetensors", "tokenizer.json", "tokenizer.model", "dcp", "gguf")
BATCH = 5000  # examples of a reader in one process


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=10**6, help="in all, divided among the readers")
    parser.add_argument("--first", type=int, default=0, help="number of the first example of each reader")
    options = parser.parse_args()
    print(describe_machine(), flush=True)
    started, given, accepted = time.perf_counter(), Counter(), Counter()
    number, last = options.first, options.first + -(-options.examples // len(READERS))
    while number < last:
        count = min(BATCH, last - number)
        for reader in READERS:
            command = [sys.executable, "-W", "ignore", FILES, str(count), str(number), reader]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                sys.exit(f"{reader}: a finding after {given.total()} examples\n{result.stderr[-3000:]}")
            given[reader] += count
            accepted[reader] += int(result.stdout.split()[-1])
        number += count
    for reader in READERS:
        print(f"{reader:<16} {given[reader]:>9,} files, {accepted[reader]:>9,} accepted")
    print(f"{given.total():,} files in {(time.perf_counter() - started) / 60:.0f} min, no finding")


if __name__ == "__main__":
    main()
