"""The run told from its events: terminal, HTML, JSON."""
