"""What a JSON file may hold: a rule for each key, all of them checked when the file is read.

Keys that no rule names are left alone: every tool adds some of its own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hf_llama3.errors import UserError, quoted

LARGEST = 2**40  # beyond any number of a model


class Rule(NamedTuple):
    words: str  # what a value must be, for a sentence
    takes: Callable[..., bool]


def whole(least: int = 1, most: int = LARGEST) -> Rule:
    words = "a positive int" if (least, most) == (1, LARGEST) else f"a whole number from {least} to {most}"
    return Rule(words, lambda value: type(value) is int and least <= value <= most)


def number(least: float = 0.0, most: float = LARGEST) -> Rule:
    """Take a number from `least` to `most`."""
    return Rule(
        f"a number from {least:g} to {most:g}", lambda value: type(value) in (int, float) and least <= value <= most
    )


POSITIVE = Rule("a positive float", lambda value: type(value) in (int, float) and 0 < value < LARGEST)
FLAG = Rule("true or false", lambda value: type(value) is bool)


def text(most: int = 4096) -> Rule:
    """Take a text of at most so many characters."""
    return Rule(f"a text of at most {most} characters", lambda value: isinstance(value, str) and len(value) <= most)


def either(*rules: Rule) -> Rule:
    return Rule(" or ".join(rule.words for rule in rules), lambda value: any(rule.takes(value) for rule in rules))


def optional(rule: Rule) -> Rule:
    """Take null as well."""
    return Rule(rule.words, lambda value: value is None or rule.takes(value))


def listed(rule: Rule, most: int = 2**20) -> Rule:
    return Rule(
        f"a list of at most {most} entries, each {rule.words}",
        lambda value: isinstance(value, list) and len(value) <= most and all(map(rule.takes, value)),
    )


def mapped(rule: Rule, keys: Rule | None = None) -> Rule:
    """Take an object of which every value is as `rule` says, and every key as `keys` does."""
    each = f"{rule.words}" + (f" under a key that is {keys.words}" if keys else "")
    return Rule(
        f"an object, each value {each}",
        lambda value: (
            isinstance(value, dict)
            and all(map(rule.takes, value.values()))
            and (not keys or all(map(keys.takes, value)))
        ),
    )


def fields(table: dict[str, Rule], required=()) -> Rule:
    """Take an object whose keys are as a table says."""
    words = "an object" + (f" with {', '.join(f'`{key}`' for key in required)}" if required else "")

    def takes(value):
        if not isinstance(value, dict) or any(key not in value for key in required):
            return False
        return all(rule.takes(value[key]) for key, rule in table.items() if key in value)

    return Rule(words, takes)


OBJECT = fields({})


def check(value: dict, table: dict[str, Rule], path: Path, required=(), remedy: str = "") -> dict:
    """Return an object that is as a table says.

    Raises:
        UserError: naming the key, what it must be and what it is.
    """
    for key, rule in table.items():
        if key in value and not rule.takes(value[key]):
            raise UserError(f"`{key}` in {path} must be {rule.words}, got {quoted(value[key])}{remedy}")
        if key in required and key not in value:
            raise UserError(f"{path} lacks `{key}`{remedy}")
    return value
