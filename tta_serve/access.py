"""Who may do what: from the token that came with a request to the streams that it reaches.

A tenant's streams are those whose names begin with `<tenant>:`. Its token reaches these alone and says their names
without the prefix, so that no name that a tenant can say is one of another's streams.
"""

import hmac
from typing import NamedTuple

from tta_serve import errors
from tta_serve.config import Tokens
from tta_serve.views import STREAM_LENGTH_MAX, check_stream


class Reach(NamedTuple):
    """The streams that a caller may name, and how.

    >>> acme = Reach(prefix="acme:")
    >>> acme.full("cam-1"), acme.shown("acme:cam-1")
    ('acme:cam-1', 'cam-1')
    """

    prefix: str = ""  # put before each name that the caller says
    without: tuple[str, ...] = ()  # prefixes of streams that are others'

    def full(self, said: str) -> str:
        """The stream that the caller means.

        Raises:
            InvalidInput: `said` cannot name a stream, or is too long behind the prefix.
            Unauthorized: the stream is a tenant's, and the caller is not.
        """
        check_stream(said)
        if len(self.prefix) + len(said) > STREAM_LENGTH_MAX:
            raise errors.InvalidInput(
                f"{said!r} is too long: with the tenant's prefix {self.prefix!r} the name of a stream has at most "
                f"{STREAM_LENGTH_MAX} characters, which leaves {STREAM_LENGTH_MAX - len(self.prefix)}"
            )
        if said.startswith(self.without):
            owner = said.partition(":")[0]
            raise errors.Unauthorized(
                f"streams named {owner + ':…'!r} are the tenant's; this needs its token or the admin token"
            )
        return self.prefix + said

    def shown(self, full: str) -> str:
        """How the caller would say this stream."""
        return full.removeprefix(self.prefix)


def may_predict(tokens: Tokens, authorization: str) -> Reach:
    """What this caller reaches with predictions, and of streams by looking.

    Args:
        tokens: that the server was started with.
        authorization: the header of that name; empty where there is none.

    Raises:
        Unauthorized: a token is needed, and there is none or a wrong one.
    """
    if tokens.infer is None and not tokens.tenants:
        return Reach()
    given = _bearer(authorization)
    if _same(given, tokens.admin):
        return Reach()
    for tenant, token in tokens.tenants.items():
        if _same(given, token):
            return Reach(prefix=f"{tenant}:")
    if _same(given, tokens.infer):
        return Reach(without=tuple(f"{tenant}:" for tenant in tokens.tenants))
    raise errors.Unauthorized("the token is not valid here")


def may_administer(tokens: Tokens, authorization: str) -> None:
    """Raise unless this caller may command streams.

    Raises:
        Forbidden: nobody may.
        Unauthorized: not with this token, or without one.
    """
    if tokens.admin is None:
        raise errors.Forbidden(
            "admin routes are closed: the server was started without an admin token; set the environment variable "
            "that auth.admin_token_env names (TTA_ADMIN_TOKEN unless configured) and start it again"
        )
    if not _same(_bearer(authorization), tokens.admin):
        raise errors.Unauthorized("the token is not valid here")


def _bearer(authorization: str) -> str:
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() != "bearer" or not given:
        raise errors.Unauthorized("this needs a token: Authorization: Bearer TOKEN")
    return given


def _same(given: str, token: str | None) -> bool:
    """In a time that says nothing of where they differ."""
    return token is not None and hmac.compare_digest(given.encode(), token.encode())
