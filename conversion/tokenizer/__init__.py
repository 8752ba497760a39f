"""tokenizer.model and tokenizer.json, each made from the other, with the proof that they are equal."""
