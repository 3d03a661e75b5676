"""Loss functions: pure, each with a typed result."""
