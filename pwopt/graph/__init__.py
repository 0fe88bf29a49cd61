"""A file goes in and comes out with nothing lost; what is asked of its graph is answered in constant time."""
