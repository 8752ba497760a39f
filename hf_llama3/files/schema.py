"""What a JSON file may hold: a rule for each key, checked as soon as the file is read.

Keys that no rule names are left alone: every tool adds some of its own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hf_llama3.errors import UserError, quoted

LARGEST = 2**40  # larger than any number of a model


class Rule(NamedTuple):
    words: str  # what a value must be, in the words of an error
    takes: Callable[..., bool]


def whole(least: int = 1, most: int = LARGEST) -> Rule:
    words = "a positive int" if (least, most) == (1, LARGEST) else f"a whole number from {least} to {most}"
    return Rule(words, lambda value: type(value) is int and least <= value <= most)


def number(least: float = 0.0, most: float = LARGEST) -> Rule:
    """Accept a number from `least` to `most`."""
    return Rule(
        f"a number from {least:g} to {most:g}", lambda value: type(value) in (int, float) and least <= value <= most
    )


POSITIVE = Rule("a positive float", lambda value: type(value) in (int, float) and 0 < value < LARGEST)
FLAG = Rule("true or false", lambda value: type(value) is bool)


def text(most: int = 4096) -> Rule:
    """Accept a text of at most so many characters."""
    return Rule(f"a text of at most {most} characters", lambda value: isinstance(value, str) and len(value) <= most)


def either(*rules: Rule) -> Rule:
    return Rule(" or ".join(rule.words for rule in rules), lambda value: any(rule.takes(value) for rule in rules))


def optional(rule: Rule) -> Rule:
    """Accept null as well."""
    return Rule(rule.words, lambda value: value is None or rule.takes(value))


def listed(rule: Rule, most: int = 2**20) -> Rule:
    return Rule(
        f"a list of at most {most} entries, each {rule.words}",
        lambda value: isinstance(value, list) and len(value) <= most and all(map(rule.takes, value)),
    )


def mapped(rule: Rule, keys: Rule | None = None) -> Rule:
    """Accept an object whose values fit `rule` and whose keys fit `keys`."""
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
    """Accept an object that fits a table of rules."""
    words = "an object" + (f" with {', '.join(f'`{key}`' for key in required)}" if required else "")

    def takes(value):
        if not isinstance(value, dict) or any(key not in value for key in required):
            return False
        return all(rule.takes(value[key]) for key, rule in table.items() if key in value)

    return Rule(words, takes)


OBJECT = fields({})


def check(value: dict, table: dict[str, Rule], path: Path, required=(), remedy: str = "") -> dict:
    """Return an object that fits a table of rules.

    Raises:
        UserError: a key does not; the sentence names it, what it must be and what it is.
    """
    for key, rule in table.items():
        if key in value and not rule.takes(value[key]):
            raise UserError(f"`{key}` in {path} must be {rule.words}, got {quoted(value[key])}{remedy}")
        if key in required and key not in value:
            raise UserError(f"{path} lacks `{key}`{remedy}")
    return value
