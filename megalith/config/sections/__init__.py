"""The sections of RunConfig, one frozen dataclass each."""
