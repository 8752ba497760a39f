"""Speed on a processor: what it can do, and products that suit it."""
