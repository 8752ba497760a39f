"""The error that a user can cause, and mend; and how what stands in a file, or was typed, may be shown."""

import contextlib
import re
import reprlib
from pathlib import PurePath
from urllib.parse import urlsplit

MOST_OF_A_NAME = 200  # characters
MOST_OF_A_SENTENCE = 1000
# What acts on a terminal, or turns the direction of what follows (UAX #9): everything else of a text may be printed.
ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """Say in one sentence what is wrong, with both values, and what to do; the command line prints it and exits 2.

    Whatever names the sentence holds, it is one line of a bounded length that no terminal acts on.
    """

    def __init__(self, sentence: str):
        super().__init__(one_line(sentence))


def shown(name, at_most: int = MOST_OF_A_NAME) -> str:
    """Return a name or another text that a file holds as a line may show it: escaped, its middle left out if long."""
    text = str(name)
    if len(text) > 2 * at_most:  # so that no time is spent on what is left out
        text = text[:at_most] + text[-at_most:]
    text = "".join(one if one.isprintable() else escape(one) for one in text)
    if len(text) <= at_most:
        return text
    end = at_most // 4
    return f"{text[: at_most - end - 5]} ... {text[-end:]}"


def quoted(value) -> str:
    """Return a value that a file holds as a line may show it: as Python writes it, in quotes if it is a text."""
    return shown(str(value) if isinstance(value, PurePath) else BRIEF.repr(value))


def one_line(sentence: str) -> str:
    """Return a sentence as one line: what has no space in it is shown as a name is, and the whole is bounded."""
    sentence = shown(sentence, 4 * MOST_OF_A_SENTENCE)
    return shown(re.sub(r"\S{201,}", lambda word: shown(word[0]), sentence), MOST_OF_A_SENTENCE)


def words_of(error: BaseException) -> str:
    """Return what a library's error says, all its lines as one, since the first often says that and the second why.

    What PyTorch's C++ adds of itself, a list of addresses, is left out; of an error that says nothing the kind is said.
    """
    return " ".join(str(error).split("Exception raised from")[0].split()) or type(error).__name__


@contextlib.contextmanager
def library_errors(what: str, remedy: str):
    """Turn whatever a library raises into a sentence: "WHAT (its words); REMEDY".

    A panic of one that is written in Rust is no `Exception`, so that it passes what catches those.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise UserError(f"{what} ({words_of(error)}); {remedy}") from error


def is_panic(error: BaseException) -> bool:
    """Tell a panic of a library that is written in Rust, whose class no module names."""
    return type(error).__name__ == "PanicException"


def for_terminal(text: str) -> str:
    """Return a text of any number of lines with nothing in it that a terminal would act on."""
    return ACTING.sub(lambda found: escape(found[0]), text)


def escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


class Brief(reprlib.Repr):
    """Write any value in bounded time and length."""

    def __init__(self):
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = self.maxlong = MOST_OF_A_NAME

    def repr_int(self, value, level):
        # Python refuses to write more than 4300 digits, and takes time that grows with their square before
        return repr(value) if value.bit_length() < 4 * MOST_OF_A_NAME else f"a number of {value.bit_length()} bits"


BRIEF = Brief()


def without_password(address: str) -> str:
    """Return an address as it may be shown: a name and a password can stand before its host."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
