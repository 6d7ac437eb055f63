"""Optimizers that know of experts, and settings of single variables."""
