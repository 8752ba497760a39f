"""Run transformers' own common model tests on this package's classes, with upstream's Llama beside them.

    python tests/upstream/run.py

Fetches the source distribution of the installed transformers from the package registry into a temporary folder (nothing
of it is kept), puts `common.py` among its tests and runs them. Fails unless our classes pass everything that upstream's
pass. Needs the extra `test` and the package `parameterized`.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import transformers

# What the tests import and the source distribution does not carry.
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def main():
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        tests = fetch(scratch) / "tests"
        for name, content in STUBS.items():
            (tests / name).parent.mkdir(parents=True, exist_ok=True)
            (tests / name).write_text(content)
        ours = tests / "models" / "llama3"
        ours.mkdir(parents=True)
        shutil.copy(Path(__file__).parent / "common.py", ours / "test_common_llama3.py")
        for folder in (tests, *{path.parent for path in tests.rglob("*.py")}, tests / "models"):
            (folder / "__init__.py").touch()
        report = scratch / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--no-header",
            "-W",
            "ignore",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
        ]
        environment = os.environ | {"RUN_SLOW": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run([*command, "tests/models/llama3"], cwd=tests.parent, env=environment, check=False)
        return judge(outcomes(report))


def fetch(scratch: Path) -> Path:
    """Download and unpack the source distribution of the transformers that is installed here."""
    name = f"transformers=={transformers.__version__}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", scratch]
    subprocess.run([*pip, name], check=True)
    with tarfile.open(next(scratch.glob("transformers-*.tar.gz"))) as archive:
        archive.extractall(scratch, filter="data")
    return next(path for path in scratch.glob("transformers-*") if path.is_dir())


def outcomes(report: Path) -> dict[str, dict[str, str]]:
    """Return {class: {test: "passed", "skipped" or "failed"}}."""
    results = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        results.setdefault(case.get("classname").rsplit(".", 1)[-1], {})[case.get("name")] = outcome
    return results


def judge(results: dict[str, dict[str, str]]) -> int:
    theirs, ours = results["LlamaCommonTest"], results["Llama3CommonTest"]
    passed = sorted(name for name, outcome in theirs.items() if outcome == "passed")
    behind = [f"{name}: {ours.get(name, 'missing')}" for name in passed if ours.get(name) != "passed"]
    count = sum(outcome == "passed" for outcome in ours.values())
    print(f"transformers {transformers.__version__}: upstream's Llama passes {len(passed)}, this package {count}")
    for line in behind:
        print(f"passed by upstream only: {line}")
    return 1 if behind or len(passed) < 60 else 0


if __name__ == "__main__":
    sys.exit(main())
