"""Owns the hook by which an application changes the Celery app before it is used; applies nothing itself."""

from abc import ABC, abstractmethod

from celery import Celery

__all__ = ["CeleryCustomizer"]


class CeleryCustomizer(ABC):
    """Pod that receives the plugin's Celery app, configured but not yet finalized.

    Once per process and application. Use it for what ``CeleryConfig`` has no setting for: routes, queues, task
    annotations, a custom task class. All registered customizers are called, in the order of their Pod names. Not
    called for a Celery Pod of your own, which you configure where you make it.
    """

    @abstractmethod
    def customize(self, celery: Celery) -> None:
        """Change the app in place.

        Args:
            celery: The app with every setting of ``CeleryConfig`` applied.
        """
