"""The image recipe: emoji pictures and names, held-out art style."""
