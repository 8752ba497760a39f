"""What commands print: JSON for programs; tables, lists and the next command for people."""

import json
import re
import shlex
import sys

from hf_llama3.errors import MOST_OF_A_SENTENCE, UserError, one_line, shown

UNITS = ("bytes", "kB", "MB", "GB", "TB")


READER_IS_GONE = 141  # as a shell reports a program that SIGPIPE ended


class Output:
    """Standard output that says in a sentence why it cannot be written, and ends quietly where nobody reads on."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        return self._try("write", text)

    def flush(self):
        self._try("flush")

    def _try(self, name, *arguments):
        try:
            return getattr(self.stream, name)(*arguments)
        except BrokenPipeError:
            sys.exit(READER_IS_GONE)
        except OSError as error:
            raise UserError(
                f"standard output could not be written ({error.strerror}); mend that and run the same again"
            ) from error

    def __getattr__(self, name):
        return getattr(self.stream, name)


def print_json(value):
    text = json.dumps(value, indent=2, ensure_ascii=False)
    print(re.sub(r"[^\n -~]", lambda one: one[0] if one[0].isprintable() else json_escape(one[0]), text))


def json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


def print_table(rows: dict):
    """Print names and values in two columns; what is absent or empty has no row."""
    rows = {
        shown(label(name)): shown(present(name, value), MOST_OF_A_SENTENCE)
        for name, value in rows.items()
        if value is not None and value != []
    }
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def print_files(title: str, files: dict[str, int]):
    """Print a title and, below it, files under their own names with their sizes in bytes."""
    names = {shown(name): size(count) for name, count in files.items()}
    width = max(map(len, names), default=0)
    print(f"{title}:" if files else f"{title}: nothing")
    for name, amount in names.items():
        print(f"  {name:<{width}}  {amount}")


def label(name: str) -> str:
    """Return the name of a row: a field's name without what its value says, a unit or that it is a number."""
    name = name.removeprefix("num_")
    for unit in ("_bytes", "_seconds"):
        name = name.removesuffix(unit)
    return {"bytes": "size", "seconds": "time"}.get(name, name).replace("_", " ")


def present(name: str, value) -> str:
    """Return a value as people read it, by its type and the unit at the end of its field's name."""
    match value:
        case bool():
            return "yes" if value else "no"
        case int() | float() if name.endswith("bytes"):
            return size(value)
        case int() | float() if name.endswith("seconds") and "milliseconds" not in name:
            return duration(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        case list() | tuple():
            return ", ".join(present("", item) for item in value)
        case dict():
            return ", ".join(f"{key} {present(str(key), item)}" for key, item in value.items())
    return str(value)


def size(count: float) -> str:
    """Return a number of bytes in the decimal unit in which it has one to three digits before the point."""
    for unit in UNITS:
        if count < 999.5 or unit == UNITS[-1]:
            return f"{count:,.0f} {unit}" if unit in ("bytes", UNITS[-1]) else f"{count:.3g} {unit}"
        count /= 1000


def duration(seconds: float) -> str:
    """Return a time in seconds, or from two minutes on in minutes and hours."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def print_list(title: str, sentences: list[str], at_most: int = 10):
    for sentence in sentences[:at_most]:
        print(f"{title}: {one_line(sentence)}")
    if len(sentences) > at_most:
        print(f"{title}: ... and {len(sentences) - at_most} more")


def print_next(*words):
    """Print the command that a user is likely to type next."""
    command = shlex.join(map(str, words))
    print(f"\nNext: hf-llama3 {shown(command, MOST_OF_A_SENTENCE)}")
