"""Checkpoints of Megatron-LM, Megatron core and Megatron-DeepSpeed, in and out, with none of them installed."""
