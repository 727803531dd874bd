"""Owns the watch over who is authenticated: an identity is the own one of the context it was authenticated in.

spakky-auth's integrations ask the ``IAuthenticationProvider`` in the request's own asyncio task, and then store what it
answers. An aspect around that call says whose identity it is, so that they need not call ``act_as``.
"""

from typing import Any, override

from spakky.auth.context import AuthContext
from spakky.auth.ports import IAuthenticationProvider
from spakky.core.aop.interfaces.aspect import IAspect
from spakky.core.aop.pointcut import AfterReturning

from spakky.plugins.celery.caller_identity import note_own_identity
from spakky.plugins.celery.common.late_binding import LateBoundAspect

__all__ = ["AuthenticationWatchAspect"]


def _is_authentication(method: object) -> bool:
    instance = getattr(method, "__self__", None)
    return isinstance(instance, IAuthenticationProvider) and getattr(method, "__name__", None) == "authenticate"


@LateBoundAspect(covers=lambda pod: isinstance(pod, IAuthenticationProvider))
class AuthenticationWatchAspect(IAspect):
    """Notes each identity that a provider of the application authenticates: one per application context."""

    @AfterReturning(_is_authentication)
    @override
    def after_returning(self, result: Any) -> None:
        """Note whose context this is from now on."""
        if isinstance(result, AuthContext):
            note_own_identity(result)
