"""Evaluation of embeddings: retrieval, zero-shot classification, linear probe, nearest neighbours."""
