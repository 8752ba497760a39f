"""The ground floor: folders that are whole or absent, JSON, hashes, progress, pictures."""
