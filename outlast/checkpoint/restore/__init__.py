"""The way back: which step, which copies of it, and how they reach the ranks that need them."""
