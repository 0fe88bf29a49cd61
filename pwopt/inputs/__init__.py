"""Inputs of models: specifications, sizes for open axes, and values. Nothing here runs a model."""
