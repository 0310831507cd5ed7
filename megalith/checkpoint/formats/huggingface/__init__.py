"""Hugging Face folders, and a table for each family of models."""
