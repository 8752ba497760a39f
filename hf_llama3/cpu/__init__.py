"""Fast generation on a processor: `optimize` and what it puts in place."""

QUANTIZATIONS = ("int8", "int4")
