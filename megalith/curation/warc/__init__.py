"""Web archives (WARC) to JSON lines."""
