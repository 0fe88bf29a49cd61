"""What could be rewritten in a model, what is kept of it, measured how, remembered where."""
