"""How ranks find, hear and agree with one another about saves and restores."""
