"""One request to a judge, on a connection that stays open. Standard library only."""

import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

MAX_BODY_BYTES = 16 * 2**20
"""Of an answer."""
RETRIED = (408, 425, 429)
"""Statuses below 500 after which the same request may succeed."""


class AttemptError(Exception):
    """A request without an answer. The message says why, without the token or the answer's content."""

    def __init__(self, reason: str, *, again: bool = True, wait_s: float | None = None) -> None:
        """`again`: whether it may be sent again; `wait_s`: how long the server asked to wait before."""
        super().__init__(reason)
        self.again = again
        self.wait_s = wait_s


class Client:
    """Sends requests to one address. May be used by several threads."""

    def __init__(self, url: str, token: str | None) -> None:
        """`url` as `config.judge_rules` accepts it. Certificates are those of the system, or of SSL_CERT_FILE."""
        parts = urlsplit(url)
        self._https = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._context = ssl.create_default_context() if self._https else None
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "User-Agent": "megatron-fipo",
        }
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._idle: list[http.client.HTTPConnection] = []

    def post(self, body: bytes, timeout_s: float) -> bytes:
        """The body of the answer with status 200. Takes at most about `timeout_s`. Raises `AttemptError`."""
        deadline = time.monotonic() + timeout_s
        while True:
            connection, used = (self._idle.pop(), True) if self._idle else (self._new(timeout_s), False)
            try:
                answer = self._exchange(connection, body, deadline)
            except BaseException as error:
                connection.close()
                if used and isinstance(error, _Closed):
                    continue  # the server closed it since the last answer
                if isinstance(error, _Closed):
                    raise AttemptError("it closed the connection") from None
                raise
            if connection.sock is not None:  # the server keeps it open
                self._idle.append(connection)
            return answer

    def close(self) -> None:
        """Close the connections that are open."""
        while self._idle:
            self._idle.pop().close()

    def _new(self, timeout_s: float) -> http.client.HTTPConnection:
        if self._https:
            return http.client.HTTPSConnection(
                self._host, self._port, timeout=timeout_s, context=self._context
            )
        return http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)

    def _exchange(self, connection: http.client.HTTPConnection, body: bytes, deadline: float) -> bytes:
        expired = threading.Event()
        try:
            if connection.sock is None:
                connection.connect()
            with _closed_at(connection.sock, deadline, expired):
                connection.request("POST", self._target, body, self._headers)
                response = connection.getresponse()
                data = response.read(MAX_BODY_BYTES + 1)
        except ssl.SSLCertVerificationError as error:
            raise AttemptError(
                f"its certificate is not valid ({error.verify_message})", again=False
            ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            if expired.is_set() or isinstance(error, TimeoutError):
                raise AttemptError("it did not answer in time") from None
            if isinstance(error, http.client.RemoteDisconnected | BrokenPipeError | ConnectionResetError):
                raise _Closed from None
            name = type(error).__name__
            raise AttemptError(
                f"{name}: {error.strerror}" if isinstance(error, OSError) and error.strerror else name
            ) from None
        if expired.is_set():
            raise AttemptError("it did not answer in time")
        if len(data) > MAX_BODY_BYTES:
            raise AttemptError(f"its answer has more than {MAX_BODY_BYTES // 2**20} MiB", again=False)
        _check_status(response)
        return data


class _Closed(Exception):
    """The server closed a connection before it answered."""


@contextlib.contextmanager
def _closed_at(connection: socket.socket, deadline: float, expired: threading.Event) -> Iterator[None]:
    """Shut a connection down at `deadline`, and set `expired`: a server that sends a byte from time to time has no end."""

    def shut() -> None:
        expired.set()
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _check_status(response: http.client.HTTPResponse) -> None:
    """Raise `AttemptError` for another status than 200."""
    status = response.status
    if status == 200:
        return
    if 300 <= status < 400:
        host = urlsplit(response.getheader("Location") or "").hostname
        raise AttemptError(
            f"it redirects{f' to {host}' if host else ''}, which is not followed; set reward.http.url to the final address",
            again=False,
        )
    if status in (401, 403):
        raise AttemptError(
            f"it refuses the token (status {status}); check reward.http.token_variable", again=False
        )
    again = status in RETRIED or status >= 500
    raise AttemptError(f"it answers with status {status}", again=again, wait_s=_retry_after(response))


def _retry_after(response: http.client.HTTPResponse) -> float | None:
    """Seconds that the server asks to wait: a number, or a date."""
    text = (response.getheader("Retry-After") or "").strip()
    if text.isdecimal() and len(text) < 9:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
