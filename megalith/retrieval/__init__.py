"""Stores of embedded text and their nearest neighbours: an index of block embeddings, questions and their answers."""
