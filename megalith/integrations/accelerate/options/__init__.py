"""What the options of a MegatronLMPlugin may be: their checks, and arguments under Megatron's names."""
