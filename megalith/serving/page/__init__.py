"""The page at `/`, on which people try the model; static/ has its files."""
