"""HTTP as fetching needs it: no surprise redirects, patience with limits, and reasons in words."""

from __future__ import annotations

import functools
import http.client
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import sd_perf
from sd_perf.files import first_error, one_line
from sd_perf.optional import optional

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

MAX_JOBS = 64
"""files that are fetched at once, at most: as many connections are kept open to a host"""
REDIRECTS = 5
"""that are followed from one URL"""
CHUNK = 2**18
"""bytes that are read at once, at most"""
_BUSY = (408, 425, 429, 500, 502, 503, 504)
"""answers after which to ask again"""


class Transient(Exception):
    """What may be better the next time."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait
        """seconds that the server asks to wait"""


class Refused(Exception):
    """A source does not give a file, and asking again would not change that."""


class Ended(Exception):
    """The fetch has been stopped while this thread was at work."""


@dataclass(frozen=True)
class Patience:
    """How long a source is waited for."""

    connect: float = 20
    """seconds for a connection"""
    silence: float = 60
    """seconds without a byte"""
    window: float = 60
    """seconds over which the rate is looked at"""
    least_rate: float = 1024
    """bytes per second below which a connection is given up"""
    attempts: int = 6
    """that bring nothing new, in a row, before a source is given up"""
    first_attempts: int = 3
    """the same for a host that has not answered yet"""
    progress: int = 2**17
    """bytes that make an attempt one that has brought something"""
    pause: float = 1
    """seconds before the second attempt; twice as long before each further one"""
    longest: float = 600
    """longest wait that a server may ask for"""


PATIENCE = Patience()


def urllib3() -> Any:
    """The package urllib3; ConfigError where it is missing."""
    return optional("urllib3", "fetching needs urllib3", "fetch")


class Web:
    """Requests of one fetch, from any thread."""

    def __init__(
        self, tell: Callable[[str], object] = print, patience: Patience | None = None
    ) -> None:
        self.patience = patience or PATIENCE
        self.ended = threading.Event()
        """set when the fetch stops: what waits or reads then raises Ended"""
        self._tell = tell
        self._answered: set[str] = set()
        """hosts that have"""

    @contextmanager
    def get(
        self, url: str, headers: dict[str, str] | None = None, redirects: int = REDIRECTS
    ) -> Iterator[BaseHTTPResponse]:
        """The answer to GET, its body unread, for a block: status 200, 206 or 416.

        Redirects are followed within the scheme. Raises Transient or Refused for all else, for
        errors of the connection in the block, too.
        """
        try:
            response = self._final(url, headers or {}, redirects)
            try:
                yield response
            finally:
                response.close()  # the rest of the body is not wanted
        except urllib3().exceptions.HTTPError as error:
            raise _fault(error) from error

    def text(self, url: str, limit: int) -> str:
        """The text at a URL, of at most `limit` bytes, without a redirect; Refused or Transient."""
        with self.get(url, redirects=0) as response:
            if response.status != 200:
                raise Refused(f"it answers {response.status} to a request for all of it")
            content = b"".join(self.chunks(response, limit + 1))
        if len(content) > limit:
            raise Refused(f"it has more than {limit:,} bytes")
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            raise Refused("it is no text in UTF-8") from None

    def chunks(self, response: BaseHTTPResponse, limit: float = float("inf")) -> Iterator[bytes]:
        """The bytes of an answer as they come, until it ends or `limit` is reached.

        Raises Transient where too few come, and Ended where the fetch has been stopped.
        """
        start, came = time.monotonic(), 0
        while limit > 0:
            if self.ended.is_set():
                raise Ended
            chunk = response.read1(int(min(CHUNK, limit)), decode_content=False)
            if not chunk:
                return
            yield chunk
            limit -= len(chunk)
            came += len(chunk)
            passed = time.monotonic() - start
            if passed < self.patience.window:
                continue
            if came < self.patience.least_rate * passed:
                raise Transient(f"only {came:,} bytes came in {passed:.0f} s")
            start, came = time.monotonic(), 0

    def wait_after(self, fault: Transient, url: str, failures: int) -> None:
        """Wait before a source is asked again, after so many failures in a row; tells of it.

        Refused after as many as patience has, and where the server asks for too long a wait.
        """
        has_answered = urlsplit(url).netloc in self._answered
        if failures >= (self.patience.attempts if has_answered else self.patience.first_attempts):
            raise Refused(f"{fault}, {failures} times in a row") from fault
        asked = fault.wait or 0
        if asked > self.patience.longest:
            raise Refused(f"{fault}, and it asks for a wait of {asked:,.0f} s or more") from fault
        pause = self.patience.pause * 2 ** max(0, failures - 1) * random.uniform(1, 1.25)
        seconds = max(asked, pause)
        self._tell(f"{short(url)}: {fault}; asking again in {seconds:.0f} s")
        self.rest(seconds)

    def rest(self, seconds: float) -> None:
        """Wait; Ended where the fetch is stopped meanwhile."""
        if self.ended.wait(seconds):
            raise Ended

    def _final(self, url: str, headers: dict[str, str], redirects: int) -> BaseHTTPResponse:
        place = url
        for _ in range(redirects + 1):
            response = self._ask(place, headers)
            if response.status in (301, 302, 303, 307, 308):
                place = _redirected(place, response)
                continue
            return _acceptable(response)
        if redirects:
            raise Refused(f"it redirects more than {redirects} times")
        raise Refused(f"it redirects to {short(place)}, and a list is not looked for elsewhere")

    def _ask(self, url: str, headers: dict[str, str]) -> BaseHTTPResponse:
        parts = urlsplit(url)
        proxy = getproxies().get(parts.scheme)
        if proxy and proxy_bypass(parts.hostname or ""):
            proxy = None
        timeout = urllib3().Timeout(connect=self.patience.connect, read=self.patience.silence)
        identity = {
            "User-Agent": f"sd-perf/{sd_perf.__version__}",
            "Accept-Encoding": "identity",
        }
        response = _pool(proxy).request(
            "GET",
            url,
            headers=identity | headers,
            timeout=timeout,
            retries=False,
            redirect=False,
            preload_content=False,
            decode_content=False,
        )
        self._answered.add(parts.netloc)
        return response


@functools.cache
def _pool(proxy: str | None) -> Any:
    options = {"maxsize": MAX_JOBS}
    return urllib3().ProxyManager(proxy, **options) if proxy else urllib3().PoolManager(**options)


def _acceptable(response: BaseHTTPResponse) -> BaseHTTPResponse:
    """The answer itself, if its body can be used; Transient or Refused otherwise."""
    status, encoding = response.status, response.headers.get("Content-Encoding", "identity")
    if status in (200, 206) and encoding != "identity":
        response.close()
        raise Refused(f"it sends the file compressed ({encoding[:40]}), though asked not to")
    if status in (200, 206, 416):
        return response
    response.close()
    told = f"{status} {response.reason or ''}".strip()[:80]
    if status in _BUSY:
        raise Transient(told, _retry_after(response))
    raise Refused(told)


def _retry_after(response: BaseHTTPResponse) -> float | None:
    value = response.headers.get("Retry-After")
    try:
        return urllib3().Retry().parse_retry_after(value) if value else None
    except urllib3().exceptions.InvalidHeader:
        return None


def _redirected(url: str, response: BaseHTTPResponse) -> str:
    """Where an answer redirects to; Refused where that is no URL of the same scheme."""
    response.close()
    try:
        target = urljoin(url, response.headers.get("Location") or "")
        before, after = urlsplit(url).scheme, urlsplit(target).scheme
    except ValueError:
        raise Refused("it redirects to what is no URL") from None
    if target == url:
        raise Refused(f"it redirects to itself ({response.status})")
    if before != after:
        raise Refused(f"it redirects from {before} to {short(target)}, another scheme")
    return target


def _fault(error: Exception) -> Transient | Refused:
    """Why a connection failed, in words."""
    cause = first_error(error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return Refused(f"its certificate is not valid ({one_line(cause)})")
    if isinstance(error, urllib3().exceptions.LocationValueError):
        return Refused(f"it is no URL ({one_line(error)})")
    if isinstance(error, urllib3().exceptions.NameResolutionError):
        return Transient("its name is not found")
    if isinstance(cause, http.client.IncompleteRead):
        return Transient("the connection broke off")
    if isinstance(cause, TimeoutError) or isinstance(error, urllib3().exceptions.ReadTimeoutError):
        return Transient("it does not answer, or falls silent")
    return Transient(f"the connection failed ({one_line(cause)})")


def short(url: str) -> str:
    """A URL as it is named in a sentence: host and last part of the path."""
    parts = urlsplit(url)
    name = parts.path.rstrip("/").rpartition("/")[2]
    return f"{parts.netloc}/.../{name}" if len(url) > 70 else url
