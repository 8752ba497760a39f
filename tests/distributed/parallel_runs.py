"""Run by torchrun: run `hf-llama3` with each of the arguments in a JSON file, in the same processes, one after another.

`parallel_runs.py RUNS OUTPUT` writes what came of them, a list of [code, out, err], to OUTPUT.RANK.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from command_line import call

came = [call(*arguments) for arguments in json.loads(Path(sys.argv[1]).read_text())]
Path(f"{sys.argv[2]}.{os.environ['RANK']}").write_text(json.dumps(came))
