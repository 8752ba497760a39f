"""What `hf-llama3 generate` takes where nothing is said; apart from the code, which imports torch."""

MAX_NEW_TOKENS = 100
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
