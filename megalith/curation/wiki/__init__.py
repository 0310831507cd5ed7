"""MediaWiki dumps to JSON lines."""
