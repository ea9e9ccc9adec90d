"""Hides passwords and keys in every text that leaves a process: console, files, MLflow, error messages.

Two things are hidden. By form: the login of any URL, the value of any option or variable whose name says that it is
secret. By value: the secrets that the command line and the environment of this process hold, however a library's
message quotes them.
"""

import functools
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

MASK = "***"
# What a terminal obeys instead of showing it, and what turns the direction of the text around it.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
# Repetitions are bounded, so that the time is that of one pass, whatever the text is.
_SECRET_NAME = (
    r"[\w.-]{0,64}(?:passw(?:or)?d|passphrase|pwd|_pass|secret(?:[_-]?key)?|token|credential"
    r"|(?:access|account|api|private|encryption|signing|master|fernet|shared)[_-]?key)(?:_id)?"
)
# A login ends at the last @ before the path, or, since databases take a password with a slash, at the first @ at all.
_LOGIN = re.compile(r"(?<=://)(?:[^\s/?#'\"<>]{0,512}|[^\s/:@'\"]{1,256}:(?!\d+(?:/|$))[^\s@'\"]{0,512})@")
_LOGIN_WITHOUT_SLASHES = re.compile(r"\b(\w[\w+.-]{0,64}):[^\s/'\"<>]{1,256}@(?=\w)")
_IN_QUERY = re.compile(rf"(?<=[?&;])({_SECRET_NAME}|[\w-]{{0,64}}signature|sig|key|odbc_connect)=[^\s&;#'\"]+", re.I)
# `NAME=value`, `NAME: value` and `"NAME": "value"` as in a diff, a YAML file or JSON; not `$NAME`, and not code.
_ASSIGNED = re.compile(
    rf"\b({_SECRET_NAME})([\"']?[ \t]{{0,8}}[:=][ \t]{{0,8}})(?!\*\*\*)"
    r"(\"[^\"\n]+\"|'[^'\n]+'|[^\s\"'$(){}\[\],;=]+(?![\w.]*[(\[]))",
    re.I,
)
_HEADER = re.compile(
    r"(\bAuthorization[\"']?[ \t]{0,8}[:=][ \t]{0,8}[\"']?\w{1,32}|\bBearer)[ \t]{1,8}[\w.~+/=-]{6,4096}", re.I
)
_KEY_BLOCK = re.compile(r"(-----BEGIN [A-Z ]{0,32}PRIVATE KEY-----)(?:(?!-----BEGIN)[\s\S]){1,16384}?(?=-----END |\Z)")
_WHOLE_URI = re.compile(r"(?:^|=)[A-Za-z][\w+.-]*://(?P<rest>\S+)$")
_SECRET_VARIABLE = re.compile(
    r"(?:PASSWORD|PASSWD|_PASS|_PWD|SECRET|TOKEN|(?:ACCESS|SECRET|API|PRIVATE|ENCRYPTION)_KEY)$"
)
# A shorter secret is part of ordinary words; it is hidden by its form alone.
_SHORTEST = 6
_NO_SECRETS = {"none", "null", "true", "false", "str", "bytes", "int", "bool", MASK}


def mask(text: str) -> str:
    """`text` with each password and key replaced by `***`."""
    text = _LOGIN.sub(f"{MASK}@", text)
    text = _LOGIN_WITHOUT_SLASHES.sub(rf"\1:{MASK}@", text)
    text = _IN_QUERY.sub(rf"\1={MASK}", text)
    text = _ASSIGNED.sub(_hide_assigned, text)
    text = _HEADER.sub(rf"\1 {MASK}", text)
    text = _KEY_BLOCK.sub(rf"\1{MASK}", text)
    for secret in _own_secrets():
        text = text.replace(secret, MASK)
    return text


def printable(text: str) -> str:
    """`text` with control characters as Python writes them, but for tabs and line ends: strangers name files."""
    return CONTROL.sub(lambda found: repr(found.group())[1:-1], text)


def masked(value: Any) -> Any:
    """`value` with `mask` applied to every text in it: a text, or mappings, lists and tuples that hold texts."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {
            name: MASK if _is_secret(name) and item and isinstance(item, str) else masked(item)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(masked(item) for item in value)
    return value


def _is_secret(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(_SECRET_NAME, name, re.IGNORECASE) is not None


def _hide_assigned(found: re.Match[str]) -> str:
    name, between, value = found.groups()
    if value.strip("'\"").lower() in _NO_SECRETS:
        return found.group()
    return f"{name}{between}{MASK}"


def _own_secrets() -> tuple[str, ...]:
    """The secrets of this process, longest first."""
    variables = os.environ.items()
    known = (value for name, value in variables if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST)
    return _secrets((*sys.argv, *(value for _, value in variables if "://" in value)), tuple(known))


@functools.lru_cache(maxsize=8)
def _secrets(texts: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    found = {form for text in texts for secret in _in_uri(text) for form in (secret, unquote(secret))} | set(known)
    return tuple(sorted((secret for secret in found if len(secret) >= _SHORTEST), key=len, reverse=True))


def _in_uri(text: str) -> Iterator[str]:
    """The secrets of the one URI that `text` is, or that it ends with after an equals sign."""
    if (found := _WHOLE_URI.search(text)) is None:
        return
    rest = found["rest"]
    yield from (item.group().partition("=")[2] for item in _IN_QUERY.finditer(rest))
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    inside = "@" in authority
    login, at, _ = authority.rpartition("@") if inside else rest.partition("@")
    user, colon, password = login.partition(":")
    # Behind the authority an @ belongs to a path, as in the name of a home folder, unless it may end a password that
    # has a slash: then there are an authority and a colon before it.
    if at and authority and colon and password != user:
        yield password
    elif inside and not colon:
        yield user
