"""Datasets: one module for each modality, imported as `mmpt.datasets.<modality>`."""
