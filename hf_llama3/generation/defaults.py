"""What the commands that generate take; apart from the code, which imports torch."""

MAX_NEW_TOKENS = 100
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
QUANTIZATIONS = ("int8", "int4")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
PARALLEL = ("data", "tensor", "pipeline")
BATCH_SIZE = 8
