"""Llama 3 from scratch, on a text: settings, data, tokenizer, optimiser, loss, recipe, report."""
