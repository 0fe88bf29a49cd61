"""One request, the stages it goes through, and the result."""
