"""Jobs made of several others: the demo, the parity check, run reports."""
