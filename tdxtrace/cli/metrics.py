"""Prometheus exporter of the watch counters, on loopback only and without thread names."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tdxtrace.errors import InputError, QueryError
from tdxtrace.tables.text import one_line
from tdxtrace.watch.totals import RunningTotals

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from prometheus_client.core import Metric

# Upper bounds of the histogram of attempts, without the last bucket (+Inf).
_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1023)


def parse_address(text: str) -> tuple[str, int]:
    """Parse HOST:PORT; the host must be a loopback address.

    Raises:
        QueryError: If it is not an address, or not a loopback address.
    """
    host, _, port = text.rpartition(":")
    host = "127.0.0.1" if host == "localhost" else host.strip("[]")
    shown = one_line(text, 60)
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise QueryError(f"not an address: {shown!r}; write e.g. 127.0.0.1:9464")
    if not _is_loopback(host):
        raise QueryError(f"{shown!r} is not on loopback; use 127.0.0.1 and forward the port")
    return host, int(port)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def serve(totals: RunningTotals, host: str, port: int) -> Iterator[None]:
    """Serve metrics within the context.

    Raises:
        InputError: If the port cannot be bound.
    """
    from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server

    registry = CollectorRegistry()
    registry.register(_Collector(totals))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    server.set_app(_for_this_host(make_wsgi_app(registry)))
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _for_this_host(app: WSGIApplication) -> WSGIApplication:
    """Return ``app``, restricted to requests whose Host header is a loopback address or localhost.

    This prevents DNS rebinding: a web page in a browser on this host may use a name of its own
    that resolves to loopback; the Host header (RFC 9110 7.2) is then that name.
    """

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        host = environ.get("HTTP_HOST", "localhost")
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        if name == "localhost" or _is_loopback(name):
            return app(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain")])
        return [b"unknown Host; ask for localhost\n"]

    return guarded


class _Collector:
    """Collector that reads the counters at each scrape."""

    def __init__(self, totals: RunningTotals) -> None:
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        """Yield the current metrics."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        totals = self._totals
        yield from _by_leaf(totals)
        busy = CounterMetricFamily(
            "tdxtrace_busy", "Busy answers by resource.", labels=["leaf", "resource"]
        )
        for (leaf, what), n in list(totals.busy.items()):
            busy.add_metric([leaf, what], n)
        yield busy
        yield CounterMetricFamily("tdxtrace_events", "Events seen.", totals.n_events)
        yield CounterMetricFamily("tdxtrace_lost_events", "Events lost.", totals.n_lost)
        yield CounterMetricFamily(
            "tdxtrace_zero_step_refusals",
            "Entries refused by zero-step mitigation.",
            totals.n_refused,
        )
        yield GaugeMetricFamily(
            "tdxtrace_chains_in_flight", "Requests not settled yet.", totals.chains.n_in_flight
        )
        yield GaugeMetricFamily(
            "tdxtrace_max_attempts", "Most attempts of a request.", totals.quantity("max-attempts")
        )


def _by_leaf(totals: RunningTotals) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

    calls = CounterMetricFamily("tdxtrace_seamcalls", "SEAMCALL attempts.", labels=["leaf"])
    retried = CounterMetricFamily(
        "tdxtrace_retried_seamcalls", "Requests answered busy at least once.", labels=["leaf"]
    )
    attempts = HistogramMetricFamily("tdxtrace_attempts", "Attempts per request.", labels=["leaf"])
    for leaf, one in list(totals.leaves.items()):
        calls.add_metric([leaf], one.n_calls)
        retried.add_metric([leaf], one.n_retried)
        counted = dict(one.attempts)
        below = [
            (str(bound), sum(n for k, n in counted.items() if k <= bound)) for bound in _BOUNDS
        ]
        total = sum(k * n for k, n in counted.items())
        attempts.add_metric([leaf], [*below, ("+Inf", sum(counted.values()))], total)
    yield from (calls, retried, attempts)
