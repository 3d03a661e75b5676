"""Evaluation: retrieval, zero-shot classification, linear probe, nearest neighbours; answers and tables."""
