"""Record the quickstart as a terminal shows it, as SVG.

python docs/pictures/terminal.py
python docs/pictures/terminal.py output.txt  # of `hf-llama3 quickstart > output.txt 2>&1`

Left out are the bars that move, the samples of text while it trains, and the time that it took: the README says that,
and on which processor.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

IMAGE = Path(__file__).parent.parent / "images" / "quickstart.svg"
COMMAND = "hf-llama3 quickstart"
COLUMNS = 112
STEP = re.compile(r"\d\. ")
TRAINED = re.compile(r" +[\d,]+ parameters")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", help="what the command printed; it is run if omitted")
    saved = parser.parse_args().output
    recorder = Console(record=True, width=COLUMNS, force_terminal=True)
    recorder.print(Text(f"$ {COMMAND}", style="bold green"))
    for line in told(saved.read_text("utf-8") if saved else run()):
        recorder.print(Text(line, style="bold" if STEP.match(line) else ""))
    picture = recorder.export_svg(title="hf_llama3", unique_id="quickstart")
    IMAGE.write_text(re.sub(r"\s*@font-face \{.*?\n    \}", "", picture, flags=re.DOTALL), "utf-8")  # from elsewhere


def run() -> str:
    command = [str(Path(sys.executable).parent / "hf-llama3"), *COMMAND.split()[1:]]
    with tempfile.TemporaryDirectory() as folder:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.run(command, cwd=folder, text=True, check=True, **streams).stdout


def told(output: str):
    """Yield the lines that stay on the screen."""
    training = False
    for line in output.splitlines():
        shown = line.rsplit("\r", 1)[-1].rstrip()
        training = (training or shown.startswith("1. ")) and not TRAINED.match(shown)
        bar = any(unit in line for unit in ("it/s", "B/s", "step/s", "s/step"))
        if (training and not shown.startswith("1. ")) or bar or not shown:
            continue
        if shown.startswith("quickstart/hf "):
            yield ""
        if shown.startswith("Done in "):
            yield ""
            shown = "Next:"
        yield shown


if __name__ == "__main__":
    main()
