"""In which order gradients travel, and by which route."""
