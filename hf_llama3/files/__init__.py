"""What everybody stands on: folders that are whole or absent, JSON, hashes, progress, pictures."""
