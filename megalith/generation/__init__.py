"""Text out of a trained model: loading it, sampling, streaming, beam search, scores."""
