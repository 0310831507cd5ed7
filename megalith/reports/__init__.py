"""Tables and pages of results, for terminals and browsers, from plain Python values. No torch."""
