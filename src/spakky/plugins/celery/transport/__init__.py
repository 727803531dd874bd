"""Transports for kombu, usable without the rest of this package."""
