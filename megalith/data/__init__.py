"""From raw text to batches: tokenizers, preprocessing, indexed datasets, sample order, loading."""
