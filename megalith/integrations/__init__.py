"""Other people's doors into megalith."""
