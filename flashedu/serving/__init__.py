"""Serving a model: what it needs of a card. This module imports nothing."""
