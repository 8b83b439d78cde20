"""Who may ask: the names that the server answers to, and the keys that it accepts."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Collection, MutableMapping
from typing import Any

from lusifer.serving.limits import ApiError

_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:@/\s]+)(:\d{0,5})?")
_BY_HAND = ("GET", "HEAD")  # A browser sends a password by itself, for any page's forms too; these change nothing.


class Access:
    """Checks the ``Host`` and the key of requests.

    A page of another site may make its own name point here, and then reads what it gets as its own (DNS rebinding). It
    has that name in ``Host``, so only known names are answered. An address there is no name: it cannot be pointed.

    Args:
        keys: Accepted API keys; none means no authentication.
        hosts: Names answered to, besides ``localhost`` and addresses; ``*`` for any.
        public: Paths that need no key.
    """

    def __init__(
        self, *, keys: Collection[str] = (), hosts: Collection[str] = (), public: Collection[str] = ()
    ) -> None:
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._hosts = {"localhost", *(host.lower().removesuffix(".") for host in hosts)}
        self._public = frozenset(public)

    def check(self, scope: MutableMapping[str, Any]) -> None:
        """Whether a request may be answered.

        Raises:
            ApiError: 421 for a name that is not known, 401 for a key.
        """
        for name, value in scope["headers"]:
            if name == b"host":
                self._check_host(value.decode("latin-1"))
        if self._keys and scope["path"] not in self._public:
            self._authenticate(scope)

    def _check_host(self, given: str) -> None:
        if "*" in self._hosts:
            return
        parts = _HOST.fullmatch(given.strip())
        name = parts[1].strip("[]").lower().removesuffix(".") if parts else ""
        if name not in self._hosts and not _is_address(name):
            message = f"this server does not accept the host name {given[:100]!r}"
            raise ApiError(421, f"{message}; the operator can allow it with --allowed-host", code="wrong_host")

    def _authenticate(self, scope: MutableMapping[str, Any]) -> None:
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        key = given.strip() if scheme.lower() == b"bearer" else None
        if scheme.lower() == b"basic" and scope["method"] in _BY_HAND:
            key = _password(given.strip())
        digest = hashlib.sha256(key or b"").digest()
        # No early end: the time tells neither which key matched nor how much of it.
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        if key is None or not any(matches):
            message = "missing or wrong API key; send it as 'Authorization: Bearer KEY'"
            if scope["path"].startswith("/v1/"):
                challenge = "Bearer"
            else:
                message += ", or in a browser as the password with any user name"
                challenge = 'Basic realm="lusifer", charset="UTF-8"'
            raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": challenge})


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _password(given: bytes) -> bytes | None:
    try:
        return base64.b64decode(given, validate=True).partition(b":")[2]
    except binascii.Error:
        return None
