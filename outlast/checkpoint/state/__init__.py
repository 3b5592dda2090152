"""What is saved: the state as a tree of tensors and values, and which rank holds which part of it."""
