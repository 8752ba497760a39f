"""params.json, config.json and GGUF's metadata: each made from the others, and what only one of them can say."""
