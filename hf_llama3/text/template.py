"""A chat template applied within bounds: it is a program from the model's folder, in transformers' sandbox.

The sandbox keeps a template from everything but its own values, and bounds neither its time nor its memory.
"""

import contextlib
import os
import signal
import threading

from hf_llama3.errors import UserError, words_of

try:
    import resource
except ImportError:  # another system
    resource = None

SECONDS = 5  # for all conversations of a call
BYTES = 300 * 10**6  # more than the process had before
MOST_CHARACTERS = 2**20  # of a text; a context of 131,072 tokens holds 0.6 million of a usual one


class TooLong(Exception):
    """End a template that does not end by itself."""


def apply_template(tokenizer, conversations: list[list[dict]]) -> list[str]:
    """Return the text of each conversation, with the beginning of an answer.

    Raises:
        UserError: the template is damaged, asks for what the sandbox refuses, or takes too much time or memory.
    """
    try:
        with limited_time(SECONDS), limited_memory(BYTES):
            texts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    except TooLong:
        reason = f"it takes more than {SECONDS} seconds"
    except MemoryError:
        reason = f"it takes more than {BYTES // 10**6} MB"
    except Exception as error:  # a program from a file raises what it likes
        reason = words_of(error)
    else:
        longest = max(map(len, texts), default=0)
        if longest <= MOST_CHARACTERS:
            return texts
        reason = f"it makes {longest} characters, and may make {MOST_CHARACTERS}"
    name = tokenizer.name_or_path or "the tokenizer"
    raise UserError(f"the chat template of {name} cannot be applied ({reason}); mend it, or remove it")


@contextlib.contextmanager
def limited_time(seconds: float):
    """Raise `TooLong` in a block that takes longer: in the main thread, where the system has alarms."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number, frame):
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def limited_memory(nbytes: int):
    """Let a block allocate no more: in the main thread, where the system can tell and keep a limit."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        used = None
    if used is None or resource is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [used + nbytes, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
