"""Modality encoders: one module each, imported as `mmpt.encoders.<modality>`."""
