"""Commands that write, stopped at a few points: `benchmarks/interrupt.py` goes through many."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "interrupt.py"
COMMANDS = ["convert to hf", "convert to meta", "convert to dcp", "convert to gguf", "convert an adapter"]
COMMANDS += ["convert --overwrite", "pack", "card"]


def test_old_or_new_and_the_same_again():
    """The target is the old one or the new one; the same command again leaves what an undisturbed run does."""
    command = [sys.executable, SCRIPT, *COMMANDS, "--points", "2", "--ways", "killed"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()[-len(COMMANDS) :]
    assert [" ".join(line.split()) for line in lines] == [f"{name} 2 times killed, 0 problems" for name in COMMANDS]
