"""The steps at a URL: which there are, which is committed, which is removed, and how one is read."""
