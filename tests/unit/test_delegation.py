"""Who handed an identity on is one claim: it grows by a hop where it is signed, and is checked where it is verified."""

from collections.abc import Iterator
from contextvars import copy_context
from dataclasses import replace
from typing import Any, override

import pytest
from celery import Celery
from spakky.auth import AuthContext, AuthSubject, IAuthContextSnapshotVerifier
from spakky.auth.context import AuthClaim
from spakky.auth.invocation import AuthInvocation
from spakky.auth.ports import SnapshotSignRequest
from spakky.plugins.cryptography import CryptographyAuthProvider, CryptographyAuthProviderConfig

from spakky.plugins.celery.delegation import (
    DELEGATION_CLAIM,
    MAX_DELEGATION_DEPTH_SETTING,
    DelegatingSigner,
    DelegationCheck,
    delegation_chain_of,
    find_hop,
    find_max_depth,
)
from spakky.plugins.celery.error import TaskAuthorizationDeniedError, TaskDelegationTooDeepError
from spakky.plugins.celery.run import CURRENT_RUN, Run

TASK = "shop.Mailer.send"
ROLE = AuthClaim(name="role", value="clerk")
ADA = AuthContext(subject=AuthSubject(id="ada"), issuer="issuer:tests", claims=(ROLE,))
INVOCATION = AuthInvocation(boundary="task", operation=TASK, attributes=())


@pytest.fixture
def celery() -> Iterator[Celery]:
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf[MAX_DELEGATION_DEPTH_SETTING] = 3
    yield app
    app.close()


def handed_on(value: Any) -> AuthContext:
    return replace(ADA, claims=(AuthClaim(name=DELEGATION_CLAIM, value=value), ROLE))


def sign(celery: Celery, identity: AuthContext) -> AuthContext:
    """Sign an identity as for a dispatch, and verify it with the application's own provider."""
    provider = CryptographyAuthProvider(CryptographyAuthProviderConfig())
    snapshot = DelegatingSigner(provider, TASK, celery).sign_snapshot(SnapshotSignRequest(auth_context=identity))
    return provider.verify_snapshot(snapshot.base64url_canonical_json(), INVOCATION)


class Verifier(IAuthContextSnapshotVerifier):
    """Verifies one identity, and keeps what it was asked."""

    def __init__(self, identity: AuthContext) -> None:
        self.identity = identity
        self.asked: list[tuple[str, AuthInvocation]] = []

    @override
    def verify_snapshot(self, snapshot_envelope: str, invocation: AuthInvocation) -> AuthContext:
        self.asked.append((snapshot_envelope, invocation))
        return self.identity


def test_an_identity_that_nobody_handed_on_has_no_chain() -> None:
    """That is not the same as a chain which cannot be read."""
    assert delegation_chain_of(ADA) == ()


def test_each_signature_adds_a_hop_and_changes_nothing_else(celery: Celery) -> None:
    """Outside of a run the hop is the application, and the caller's own identity stays what it was."""
    first = sign(celery, ADA)
    assert delegation_chain_of(first) == ("shop",)
    assert {claim for claim in first.claims if claim.name != DELEGATION_CLAIM} == {ROLE}
    assert replace(first, claims=()) == replace(ADA, claims=())
    second = sign(celery, first)
    assert delegation_chain_of(second) == ("shop", "shop")
    assert len(second.claims) == 2
    assert ADA.claims == (ROLE,)


def test_in_a_run_the_hop_is_its_task(celery: Celery) -> None:
    """What is left of a run that has ended dispatches as the application again."""

    def go() -> None:
        """Nothing: the run is what matters."""

    def begin() -> None:
        task = celery.task(go, name="shop.Outer.go", shared=False)
        run = Run(task, task.request, "shop.Outer.go")
        CURRENT_RUN.set(run)
        assert delegation_chain_of(sign(celery, handed_on('["web"]'))) == ("web", "shop.Outer.go")
        run.end()
        assert find_hop(celery) == "shop"

    copy_context().run(begin)


def test_an_app_without_a_name_is_a_hop_too() -> None:
    """Celery apps of one's own need no name."""
    assert find_hop(Celery(set_as_current=False)) == "unnamed"
    assert find_max_depth(Celery(set_as_current=False)) == 16


@pytest.mark.parametrize(
    "value",
    [
        None,
        5,
        True,
        1.5,
        "",
        "web",
        "{}",
        '{"a": 1}',
        "null",
        "[1]",
        '["web", null]',
        '["web", ""]',
        '[["web"]]',
        "[" * 9**5,
    ],
)
def test_what_is_no_array_of_names_is_refused_at_both_ends(celery: Celery, value: Any) -> None:
    """The error has the value, cut where it is long."""
    identity = handed_on(value)
    assert delegation_chain_of(identity) is None
    for refused in (lambda: sign(celery, identity), lambda: check(celery, identity)):
        with pytest.raises(TaskAuthorizationDeniedError) as caught:
            refused()
        assert (caught.value.task, caught.value.state) == (TASK, "DENY")
        assert repr(value)[:90] in caught.value.reason
        assert len(caught.value.reason) < 250


def test_two_claims_of_that_name_are_refused() -> None:
    """Which of them would be signed is the signer's whim."""
    claim = AuthClaim(name=DELEGATION_CLAIM, value='["web"]')
    assert delegation_chain_of(replace(ADA, claims=(claim,))) == ("web",)
    assert delegation_chain_of(replace(ADA, claims=(claim, claim))) is None


def check(celery: Celery, identity: AuthContext) -> DelegationCheck:
    made = DelegationCheck(Verifier(identity), TASK, celery)
    assert made.verify_snapshot("envelope", INVOCATION) is identity
    return made


def test_a_signature_over_the_limit_is_refused(celery: Celery) -> None:
    """The limit itself is allowed; the error names task, depth, limit and the chain with the caller in it."""
    assert len(delegation_chain_of(sign(celery, handed_on('["a","b"]'))) or ()) == 3
    with pytest.raises(TaskDelegationTooDeepError) as caught:
        sign(celery, handed_on('["a","b","c"]'))
    assert caught.value.args == (TASK, 4, 3, ("a", "b", "c", "shop"))


def test_a_verified_chain_over_the_limit_is_refused(celery: Celery) -> None:
    """What was verified is kept for the record, and nothing but that is."""
    assert check(celery, handed_on('["a","b","c"]')).is_too_deep is False
    identity = handed_on('["a","b","c","d"]')
    verifier = Verifier(identity)
    made = DelegationCheck(verifier, TASK, celery)
    with pytest.raises(TaskAuthorizationDeniedError, match="4 hops, and SPAKKY_CELERY__MAX_DELEGATION_DEPTH is 3"):
        made.verify_snapshot("envelope", INVOCATION)
    assert (made.is_too_deep, made.identity) == (True, identity)
    assert verifier.asked == [("envelope", INVOCATION)]
