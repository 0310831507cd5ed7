"""DeepSpeed's trees of files, with ZeRO's parts, and those of GPT-NeoX."""
