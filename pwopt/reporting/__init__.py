"""One report, and several ways to read it."""
