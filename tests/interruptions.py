"""A conversion in a process of its own that is stopped at a chosen step of its writing."""

import json

from forked import python

# Stop a run before the Nth time that it opens, makes, names or removes something of the target, in its own process.
WRAPPER = """
import errno, json, os, signal, sys
import hf_llama3.conversion
engine = sys.modules["hf_llama3.conversion.convert"]
kind, at, source, target, options = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], json.loads(sys.argv[5])
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "ctypes.dlsym"}
steps, without_exchange = 0, options.pop("without_exchange", False)
def watch(event, arguments):
    global steps
    if event not in EVENTS or not (event == "ctypes.dlsym" or str(arguments[0]).startswith(target)):
        return
    if event == "ctypes.dlsym" and arguments[1] != "renameat2":
        return
    steps += 1
    if steps == at:
        if kind == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if kind == "terminate": os.kill(os.getpid(), signal.SIGTERM)
        if kind == "interrupt": raise KeyboardInterrupt
        raise OSError(int(kind), os.strerror(int(kind)))
    if event == "ctypes.dlsym" and without_exchange:
        raise AttributeError("an old system")
sys.addaudithook(watch)
try:
    engine.convert(source, target, **options)
except engine.UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
print(steps)
"""


def stopped_run(kind, at, source, target, options):
    return python("-c", WRAPPER, kind, at, source, target, json.dumps(options))


def some_of(total, last=8):
    """A few steps of the writing, and each of the last, in which names change."""
    return sorted({*range(1, total - last, max(total // 6, 1)), *range(total - last, total + 1)})


def contents(place):
    """Return the bytes of a file, or of all files in a folder by their paths in it."""
    if place.is_file():
        return place.read_bytes()
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}
