"""A checkpoint on the Hub: by its name, fetched whole, or described by the parts that list its tensors."""
