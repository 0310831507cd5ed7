"""Decontamination: the texts of evaluation tasks taken out of a corpus."""
