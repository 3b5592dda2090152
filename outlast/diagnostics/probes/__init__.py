"""What is tried out before anybody is accused: the nodes themselves, and the links between them."""
