"""Celery integration of the Spakky Framework: call a method, and it runs on a worker."""

from spakky.core.application.plugin import Plugin

__all__ = ["PLUGIN_NAME"]

PLUGIN_NAME = Plugin(name="spakky-celery")
"""Identifier of this plugin, for ``SpakkyApplication.load_plugins(include={...})``."""
