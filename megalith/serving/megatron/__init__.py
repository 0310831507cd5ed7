"""Routes of Megatron-LM's text generation server."""
