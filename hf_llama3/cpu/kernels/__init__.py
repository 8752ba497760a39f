"""Machine code that multiplies by a model's weights, and attends to its cache, where they lie in memory."""
