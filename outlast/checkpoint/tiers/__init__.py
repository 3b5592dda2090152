"""The copies of a step: this node's memory, a partner's, the local disk."""
