"""params.json and config.json, each made from the other, and what only one of them can say."""
