"""Who may come in, and with how much: passwords and the size of requests."""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from reglue.app.uploads import MOST_BYTES
from reglue.errors import UserError, option

OWN_MACHINE = ("127.0.0.1", "localhost", "::1")
ENVELOPE = 2**20
"""Bytes around an upload."""
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def password_for(host: str, named: str | None) -> str | None:
    """The password: what an environment variable says, or a new one where others may come; None for this machine alone.

    Raises UserError for a variable that is not set.
    """
    if named is not None:
        if not os.environ.get(named):
            raise UserError(f"{option('password')} {named}: there is no such environment variable; set it")
        return os.environ[named]
    return None if host in OWN_MACHINE else secrets.token_urlsafe(12)


def check_of(password: str | None) -> Callable[[str, str], bool] | None:
    """What says whether somebody may come in, by any name and the password; None where everybody may."""
    if password is None:
        return None
    return lambda _, given: hmac.compare_digest(given.encode(), password.encode())


@dataclass
class Bounded:
    """ASGI: refuses requests whose bodies are larger than an upload may be, before they are read."""

    app: Callable[[Message, Receive, Send], Awaitable[None]]
    most: int = MOST_BYTES + ENVELOPE

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """See ASGI. A body without a length is cut off where it becomes too large."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self.most:
            await send({"type": "http.response.start", "status": 413, "headers": [(b"content-type", b"text/plain")]})
            return await send({"type": "http.response.body", "body": b"too large"})
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            return message if taken <= self.most else {"type": "http.disconnect"}

        return await self.app(scope, bounded, send)
