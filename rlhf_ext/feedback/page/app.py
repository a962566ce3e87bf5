"""The application: one page, a few JSON calls, and the rules about who may call them.

Texts travel as JSON and are put on the page as text, so that markup in a completion stays inert; a content-security
policy stands behind that. Positions in calls are those that were shown: the order is drawn per annotator and
comparison, and only the server knows the stored one.
"""

import hashlib
import json
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..records import LabelRefused, check_name
from ..store import LabelStore
from .accounts import Accounts, Sessions


STATIC = Path(__file__).parent / "static"
COOKIE = "rlhf_ext_session"
MAX_BODY = 64 * 1024
MAX_COMMENT = 4000
MAX_ID = 2**31 - 1  # of the tables; more is no id, and no database takes it
KINDS = ("best", "tie", "ranking", "incomparable", "skip")
"""Answers of the page. A judge's weights come by import: their places would be those of the store."""
PROGRESS_SECONDS = 2.0

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Refused(Exception):
    """A call that is answered by an error of HTTP."""

    def __init__(self, status: int, reason: str, message: str):
        super().__init__(message)
        self.status, self.reason = status, reason


def build_app(
    store: LabelStore,
    *,
    pool: str | None = None,
    guidelines: str = "",
    accounts: Accounts | None = None,
    hosts: list[str] | None = None,
    secure_cookie: bool = False,
) -> Starlette:
    """
    The labelling page over a store.

    Args:
        store ([`LabelStore`]):
            Where tasks come from and labels go.
        pool (`str`, *optional*):
            Label this pool only.
        guidelines (`str`, *optional*):
            Text shown to every annotator.
        accounts ([`Accounts`], *optional*):
            With them a login needs a password; without, a name is enough, which is right for one's own machine only.
        hosts (`list[str]`, *optional*):
            Names by which the page may be called; by default those of this machine. Another name is refused, so that a
            foreign page cannot have itself resolved to this address.
        secure_cookie (`bool`, *optional*, defaults to `False`):
            Send the session by HTTPS only.
    """
    page = _Page(store, pool, guidelines, accounts, secure_cookie)
    routes = [
        Route("/", page.index),
        Route("/api/session", page.answer(page.session), methods=["GET"]),
        Route("/api/login", page.answer(page.login), methods=["POST"]),
        Route("/api/logout", page.answer(page.logout), methods=["POST"]),
        Route("/api/task", page.answer(page.task), methods=["POST"]),
        Route("/api/label", page.answer(page.label), methods=["POST"]),
        Route("/api/undo", page.answer(page.undo), methods=["POST"]),
        Route("/api/labels", page.answer(page.labels), methods=["GET"]),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    allowed = ["127.0.0.1", "localhost", "[::1]", *(hosts or [])]
    return Starlette(
        routes=routes,
        middleware=[Middleware(_Headers), Middleware(TrustedHostMiddleware, allowed_hosts=allowed)],
        exception_handlers={500: _failed},
    )


def shown_order(annotator: str, comparison_id: int, size: int) -> list[int]:
    """Stored positions in the order in which one annotator sees them: random, and the same after a reload."""
    seed = hashlib.sha256(json.dumps([annotator, comparison_id]).encode()).digest()
    order = list(range(size))
    random.Random(seed).shuffle(order)
    return order


async def _failed(request: Request, error: Exception) -> Response:
    """A fault of ours, which the server logs. Starlette answers it outside of all middleware."""
    message = "The server failed; its log says why. Nothing was stored."
    return JSONResponse({"reason": "failed", "message": message}, 500, headers=HEADERS)


class _Headers:
    """Sets [`HEADERS`] on every answer but that of [`_failed`], which has them."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
            await send(message)

        await self.app(scope, receive, send_with_headers)


class _Page:
    def __init__(
        self,
        store: LabelStore,
        pool: str | None,
        guidelines: str,
        accounts: Accounts | None,
        secure_cookie: bool,
    ):
        self.store, self.pool, self.guidelines = store, pool, guidelines
        self.accounts, self.secure_cookie = accounts, secure_cookie
        self.sessions = Sessions()
        self._counted: dict[str, tuple[float, dict[str, int]]] = {}

    async def index(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    def answer(self, call: Callable[[Request, dict[str, Any]], Any]) -> Callable[[Request], Awaitable[Response]]:
        """A route that reads JSON, lets the store work in a thread, and answers with JSON."""

        async def route(request: Request) -> Response:
            try:
                body = {} if request.method == "GET" else await _read_body(request)
                found = await run_in_threadpool(call, request, body)
            except Refused as error:
                return JSONResponse({"reason": error.reason, "message": str(error)}, error.status)
            except LabelRefused as error:
                return JSONResponse({"reason": error.reason, "message": str(error)}, 409)
            except ValueError as error:
                return JSONResponse({"reason": "invalid", "message": str(error)}, 400)
            return found if isinstance(found, Response) else JSONResponse(found)

        return route

    def session(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        name = self.sessions.name_of(request.cookies.get(COOKIE), self.accounts)
        guidelines = "" if name is None else self.guidelines
        return {"name": name, "needs_password": self.accounts is not None, "guidelines": guidelines}

    def login(self, request: Request, body: dict[str, Any]) -> Response:
        name, mark = check_name("name", _text(body, "name", "").strip()), None
        if self.accounts is not None:
            if not self.sessions.may_try(name):
                raise Refused(429, "too_many", "Too many wrong passwords. Wait five minutes.")
            mark = self.accounts.mark(name)  # before the check: a password changed meanwhile ends this session
            if not self.accounts.check(name, _text(body, "password", "")):
                raise Refused(403, "password", "Name and password do not belong together.")
        token = self.sessions.start(name, mark)
        response = JSONResponse({"name": name})
        response.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=self.secure_cookie)
        return response

    def logout(self, request: Request, body: dict[str, Any]) -> Response:
        self.sessions.end(request.cookies.get(COOKIE))
        response = JSONResponse({})
        response.delete_cookie(COOKIE)
        return response

    def task(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        name = self._annotator(request)
        task = self.store.claim(name, pool=self.pool)
        shown = None
        if task is not None:
            order = shown_order(name, task.comparison_id, len(task.completions))
            shown = {
                "comparison_id": task.comparison_id,
                "prompt": task.prompt,
                "completions": [task.completions[place] for place in order],
                "truncated": [task.truncated[place] for place in order],
            }
        return {"task": shown, "progress": self._progress(name, may_be_old=True)}

    def label(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        name = self._annotator(request)
        comparison = self.store.comparison(_integer(body, "comparison_id"))
        if self.pool not in (None, comparison.pool):
            raise LabelRefused("unknown", f"Comparison {comparison.id} is not of the pool {self.pool!r}.")
        order = shown_order(name, comparison.id, len(comparison.candidates))
        comment, kind = _text(body, "comment"), body.get("kind")
        if comment is not None and len(comment) > MAX_COMMENT:
            raise ValueError(f"`comment` has {len(comment)} characters; at most {MAX_COMMENT} are taken.")
        if kind not in KINDS:
            raise ValueError(f"`kind` is {_short(kind)}; use one of {list(KINDS)}.")
        label = self.store.submit(
            name,
            comparison.id,
            kind,
            _stored(kind, body.get("value"), order),
            seconds=_seconds(body),
            comment=comment or None,
            shown=order,
            key=_text(body, "key"),
        )
        return {"label_id": label.id, "progress": self._progress(name)}

    def undo(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        name = self._annotator(request)
        self.store.undo(name, _integer(body, "label_id"), pool=self.pool)
        return {"progress": self._progress(name)}

    def labels(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """One's own current labels, newest first, with positions as they were shown."""
        name = self._annotator(request)
        own = []
        for label in self.store.labels_of(name, pool=self.pool, limit=20):
            entry = {"id": label.id, "comparison_id": label.comparison_id, "kind": label.kind}
            own.append({**entry, "seconds": label.seconds, "created": label.created})
        return {"labels": own}

    def _annotator(self, request: Request) -> str:
        name = self.sessions.name_of(request.cookies.get(COOKIE), self.accounts)
        if name is None:
            raise Refused(401, "login", "Log in first.")
        return name

    def _progress(self, name: str, may_be_old: bool = False) -> dict[str, int]:
        """Counts for an annotator; the call that follows a label asks again, and gets what was counted for that."""
        counted = self._counted.get(name)
        if may_be_old and counted is not None and counted[0] > time.monotonic() - PROGRESS_SECONDS:
            return counted[1]
        found = self.store.progress(name, pool=self.pool)
        wanted = found.labels + found.missing
        progress = {"own": found.own_labels, "skipped": found.own_skips, "labels": found.labels, "wanted": wanted}
        self._counted[name] = (time.monotonic(), progress)
        return progress


async def _read_body(request: Request) -> dict[str, Any]:
    """The JSON object of a call that comes from this very page."""
    host = request.headers.get("host", "")
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    own = {f"http://{host}", f"https://{host}"}
    if (origin is not None and origin not in own) or site not in (None, "same-origin"):
        raise Refused(403, "cross_site", "Calls from other sites are refused.")
    # A form of another site cannot send this type without being asked for permission first.
    if request.headers.get("content-type", "").split(";")[0] != "application/json":
        raise Refused(415, "type", "Send JSON.")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise Refused(413, "too_long", f"A call has at most {MAX_BODY} bytes.")
    try:
        found = json.loads(body or b"{}")
    except RecursionError as error:
        raise Refused(400, "invalid", "The JSON is nested too deeply.") from error
    if not isinstance(found, dict):
        raise Refused(400, "invalid", "Send a JSON object.")
    return found


def _stored(kind: str, value: Any, order: list[int]) -> Any:
    """A value of shown positions as one of stored positions.

    Raises:
        ValueError: what is no position. The store takes 1.0 for one, so it must not be left to judge.
    """

    def place(shown: Any) -> int:
        if type(shown) is not int or not 0 <= shown < len(order):
            raise ValueError(f"`value` has {_short(shown)}, expected a position from 0 to {len(order) - 1}.")
        return order[shown]

    if kind == "best":
        return place(value)
    if kind in ("ranking", "tie") and isinstance(value, list):
        return [place(item) for item in value]
    return value


def _integer(body: dict[str, Any], name: str) -> int:
    value = body.get(name)
    if type(value) is not int or not 0 <= value <= MAX_ID:
        raise ValueError(f"`{name}` is {_short(value)}. Give a whole number from 0 to {MAX_ID}.")
    return value


def _text(body: dict[str, Any], name: str, default: str | None = None) -> str | None:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, str):
        raise ValueError(f"`{name}` is {_short(value)}. Give a text.")
    return value


def _seconds(body: dict[str, Any]) -> float | None:
    value = body.get("seconds")
    # An integer may be too large for a float; ten years are enough for an answer.
    if value is not None and (type(value) not in (int, float) or not 0 <= value <= 3.2e8):
        raise ValueError(f"`seconds` is {_short(value)}. Give the time an answer took, at least 0, or null.")
    return value


def _short(value: Any) -> str:
    """A value for a message; a number of thousands of digits has no text in Python."""
    try:
        return repr(value)[:60]
    except ValueError:
        return "too long a number"
