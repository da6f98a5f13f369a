"""Addresses of databases, with and without their password."""

from __future__ import annotations

from urllib.parse import quote, urlencode

from sqlalchemy import URL


def password_of(url: URL) -> str | None:
    """The password, which libpq also takes from the query of a URL, and from there first."""
    given = url.query.get("password", url.password)
    return given if given is None or isinstance(given, str) else given[-1]


def without_password(url: URL) -> str:
    """The address as libpq reads it, for its programs."""
    return _libpq(url, "")


def masked(url: URL) -> str:
    """The address for people: `postgresql://user:***@host/name`."""
    return _libpq(url, "" if password_of(url) is None else ":***")


def _libpq(url: URL, password: str) -> str:
    # Not SQLAlchemy's rendering, which writes a space as +: libpq takes that for a plus.
    user = f"{quote(url.username or '', safe='')}{password}"
    host = f"[{url.host}]" if ":" in (url.host or "") else quote(url.host or "", safe=",")
    port = "" if url.port is None else f":{url.port}"
    query = urlencode({k: v for k, v in url.query.items() if k != "password"}, doseq=True, quote_via=quote)
    at, mark = "@" if user else "", "?" if query else ""
    return f"postgresql://{user}{at}{host}{port}/{quote(url.database or '', safe='')}{mark}{query}"
