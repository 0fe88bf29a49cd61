"""Reads and writes models without losing anything, and answers questions about their graphs in constant time."""
