"""Deduplication: what repeats, exactly or nearly; which copy stays; the evidence of every removal."""
