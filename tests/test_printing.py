"""What commands print for people."""

import pytest

from hf_llama3.cli.printing import duration, print_files, print_list, print_next, print_table, size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (123_456, "123 kB"),
        (2_471_645_608, "2.47 GB"),
        (999_900, "1 MB"),
        (5e15, "5,000 TB"),
    ],
)
def test_size(count, text):
    assert size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.1234, "0.123 s"), (61, "61 s"), (180, "3 min"), (9000, "2 h 30 min")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_table_shows_values_with_units_and_leaves_out_what_is_empty(capsys):
    rows = {"bytes": 1_500_000, "free_bytes": 10, "seconds": 2.0, "num_tensors": 12345, "resumed": [], "error": None}
    rows |= {"ok": True, "names": ["a", "b"], "rope": {"factor": 8.0}, "loss": 1.23456789, "tokens_per_second": 7032.4}
    print_table(rows)
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert {line[0].strip(): line[-1].strip() for line in lines} == {
        "size": "1.5 MB",
        "free": "10 bytes",
        "time": "2 s",
        "tensors": "12,345",
        "ok": "yes",
        "names": "a, b",
        "rope": "factor 8",
        "loss": "1.235",
        "tokens per second": "7,032",
    }


def test_files_keep_their_names(capsys):
    print_files("Wrote", {"tokenizer_config.json": 1234, "num_bytes": 5, "a\x1b[2J": 1})
    print_files("Reads", {})
    wrote, reads = "  tokenizer_config.json  1.23 kB\n  num_bytes              5 bytes\n", "Reads: nothing\n"
    assert capsys.readouterr().out == f"Wrote:\n{wrote}  a\\x1b[2J               1 bytes\n{reads}"


def test_a_long_list_is_cut_and_says_so(capsys):
    print_list("Note", [f"sentence {number}" for number in range(13)])
    assert capsys.readouterr().out.splitlines()[-2:] == ["Note: sentence 9", "Note: ... and 3 more"]


def test_the_next_command_can_be_pasted(capsys):
    print_next("generate", "my model", "It's")
    assert capsys.readouterr().out == "\nNext: hf-llama3 generate 'my model' 'It'\"'\"'s'\n"
