"""What models take: their inputs, sizes for open axes, and values, found without running anything."""
