"""What commands print: JSON, tables and lists."""

import json


def print_json(value):
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(rows: dict):
    """Print names and values in two columns."""
    width = max(map(len, rows))
    for name, value in rows.items():
        print(
            f"{name.replace('_', ' '):<{width}}  {value:,}"
            if type(value) is int
            else f"{name.replace('_', ' '):<{width}}  {value}"
        )


def print_list(title: str, sentences: list[str], at_most: int = 10):
    for sentence in sentences[:at_most]:
        print(f"{title}: {sentence}")
    if len(sentences) > at_most:
        print(f"{title}: ... and {len(sentences) - at_most} more")
