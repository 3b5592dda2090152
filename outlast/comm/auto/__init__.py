"""``compressor = "auto"``: measures the link and the codec, then chooses."""
