"""Corpus work: from dumps and URLs to clean, deduplicated, decontaminated JSON lines. No torch."""
