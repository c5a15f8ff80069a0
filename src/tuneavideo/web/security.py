"""Checks of every request before the page sees it, and the headers of every answer."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import time
from collections.abc import Collection
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
SAFE = {"GET", "HEAD"}
LARGEST_FORM = 2**16  # bytes of a request's body
LARGEST_CLIP = 2**29  # bytes of an upload
SLOWEST_CHUNK = 20.0  # seconds between two parts of a body
SLOWEST_FORM = 30.0  # seconds for the body of a form
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # with no-referrer browsers send the origin null
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}


class Guard:
    """Middleware that refuses requests of other sites, without the token, or too large; and sets headers.

    Args:
        app: The application.
        token: What a browser has to know; empty if everybody may use the page.
        hosts: Names under which the page is reached, without port.
        any_address: Accept every IP address as host, since the server listens on several.
    """

    def __init__(self, app: ASGIApp, token: str, hosts: Collection[str], any_address: bool = False) -> None:
        self.app, self.token, self.any_address = app, token, any_address
        self.hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        headers = Headers(scope=scope)
        answer = self._refusal(scope, headers) or self._admission(scope, headers)
        if answer:
            await answer(scope, receive, send_with_headers)
        else:
            await self.app(scope, _limited(receive, scope), send_with_headers)

    def _refusal(self, scope: Scope, headers: Headers) -> PlainTextResponse | None:
        """Return the answer to a request that comes from another site or is too large."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            return PlainTextResponse("Host: expected the address that 'tuneavideo web' printed\n", 421)
        if scope["method"] not in SAFE:
            origin = urlsplit(headers.get("origin", ""))
            site = headers.get("sec-fetch-site", "same-origin")
            if origin.netloc.lower() != hosts[0].lower() or site != "same-origin":
                return PlainTextResponse("Origin: expected a request of this page\n", 403)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 15 or int(length) > largest(scope):
            return PlainTextResponse(f"body: expected at most {largest(scope)} bytes\n", 413)
        return None

    def _is_own(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
            _ = urlsplit(f"//{host}").port
        except ValueError:
            return False
        if name in self.hosts:
            return True
        try:
            return self.any_address and bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    def _admission(self, scope: Scope, headers: Headers) -> PlainTextResponse | RedirectResponse | None:
        """Return the answer to a request without cookie; one with the token in its address gets the cookie."""
        if not self.token:
            return None
        name, expected = cookie_name(scope), cookie_value(self.token)
        pairs = [pair.strip().partition("=") for pair in headers.get("cookie", "").split(";")]
        if any(key == name and hmac.compare_digest(value.encode(), expected.encode()) for key, _, value in pairs):
            return None
        try:
            query = parse_qsl(scope["query_string"].decode("latin-1"), max_num_fields=100)
        except ValueError:
            query = []
        given = next((value for key, value in query if key == "token"), "")
        if scope["method"] == "GET" and hmac.compare_digest(given.encode("utf-8", "replace"), self.token.encode()):
            rest = urlencode([(key, value) for key, value in query if key != "token"])
            path = "/" + scope["path"].lstrip("/\\")
            answer = RedirectResponse(f"{path}?{rest}" if rest else path, 303)
            answer.set_cookie(name, expected, httponly=True, samesite="lax", max_age=30 * 86_400)
            return answer
        return PlainTextResponse("open the link with the token that 'tuneavideo web' printed\n", 401)


def largest(scope: Scope) -> int:
    """Return how many bytes the body of a request may have."""
    return LARGEST_CLIP if takes_file(scope) else LARGEST_FORM


def takes_file(scope: Scope) -> bool:
    """Return whether the body of a request is a file."""
    return scope["path"] == "/clips" or (scope["path"].startswith("/runs/") and scope["path"].endswith("/masks"))


def cookie_name(scope: Scope) -> str:
    """Return the cookie's name, which has the port, since browsers send cookies to all ports of a host."""
    return f"tuneavideo-{(scope.get('server') or ('', 0))[1]}"


def cookie_value(token: str) -> str:
    return hashlib.sha256(f"cookie {token}".encode()).hexdigest()


def _limited(receive: Receive, scope: Scope) -> Receive:
    """Return `receive` with limits on the size of the body and on the time that it takes."""
    count, most, is_form = 0, largest(scope), not takes_file(scope)
    end = time.monotonic() + SLOWEST_FORM
    done = scope["method"] in SAFE

    async def limited() -> Message:
        nonlocal count, done
        if done:  # only the end of the connection may follow
            return await receive()
        wait = min(SLOWEST_CHUNK, max(0.1, end - time.monotonic())) if is_form else SLOWEST_CHUNK
        try:
            message = await asyncio.wait_for(receive(), wait)
        except TimeoutError:
            done = True
            raise HTTPException(408, "the request's body came too slowly") from None
        if message["type"] == "http.request":
            count += len(message.get("body", b""))
            done = not message.get("more_body", False)
        if count > most:
            done = True
            raise HTTPException(413, f"body: expected at most {most} bytes")
        return message

    return limited
