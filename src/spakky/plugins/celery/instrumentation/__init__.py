"""Owns what applications may observe of the plugin: frozen records, and one small port for each kind of them."""

from spakky.plugins.celery.instrumentation.auth_decisions import AuthDecisionRecord, IAuthDecisionObserver

__all__ = ["AuthDecisionRecord", "IAuthDecisionObserver"]
