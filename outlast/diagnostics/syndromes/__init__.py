"""From what ranks leave behind to what is wrong, and with whom: pure functions, without clocks and without files."""
