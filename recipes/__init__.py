"""Recipes: one folder for each domain with its configurations and `run.py`."""
