"""Heads: losses and the parameters that they need, over a lazy view of one batch."""
