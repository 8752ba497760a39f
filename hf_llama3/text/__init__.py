"""Text from a model: load what lies in a folder, complete prompts, chat."""

MAX_NEW_TOKENS = 100
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
BATCH_SIZE = 8
