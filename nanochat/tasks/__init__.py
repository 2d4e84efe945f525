"""Datasets that can be trained on and scored."""
