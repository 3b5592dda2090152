"""The packages joined for anybody's loop."""
