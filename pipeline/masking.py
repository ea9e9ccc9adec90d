"""Hides passwords and keys in every text that leaves a process: console, files, MLflow, error messages.

Two things are hidden. By form: the login of any URL, the value of any option or variable whose name says that it is
secret. By value: the secrets that the command line and the environment of this process hold, however a library's
message quotes them.

A value that is an ordinary word or number is not hidden wherever it stands. To replace `pipeline` in every path would
tell what the secret is, and to replace a count would spoil a record. So a word or a number is hidden only where it
stands alone, and not at all by value if it is a word of this program's own source or a short number.
"""

import functools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

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
# A shorter secret is part of ordinary words; it is hidden by its form alone. A shorter number is any count.
_SHORTEST, _SHORTEST_NUMBER = 6, 8
_WORD = re.compile(r"[^\W\d_]+")
_NUMBER = re.compile(r"[\d.,:_-]+")
# Where a word or a number begins and ends; in an escaped text, a letter before it may belong to the escape.
_BEGINS, _ENDS = r"(?:(?<!\w)|(?<=%[0-9A-Fa-f]{2})|(?<=\\[nrt]))", r"(?!\w)"
_NUMBER_BEGINS, _NUMBER_ENDS = rf"(?<!\d\.){_BEGINS}", rf"{_ENDS}(?!\.\d)"
_OWN_WORD = re.compile(rf"[^\W\d_]\w{{{_SHORTEST - 1},}}")
_SOURCE = Path(__file__).resolve().parents[1]
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
        text = secret.sub(MASK, text)
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


def _own_secrets() -> tuple[re.Pattern[str], ...]:
    """The secrets of this process, longest first."""
    variables = os.environ.items()
    known = (value for name, value in variables if _SECRET_VARIABLE.search(name))
    return _secrets((*sys.argv, *(value for _, value in variables if "://" in value)), tuple(known))


@functools.lru_cache(maxsize=8)
def _secrets(texts: tuple[str, ...], known: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    found = {form for text in texts for secret in _in_uri(text) for form in (secret, unquote(secret))} | set(known)
    forms = {form: secret for secret in map(str.strip, found) if _is_hidden(secret) for form in _forms(secret)}
    return tuple(_pattern(form, secret) for form, secret in sorted(forms.items(), key=lambda item: -len(item[0])))


def _is_hidden(secret: str) -> bool:
    """Whether a secret is hidden by its value, and not by its form alone."""
    if _NUMBER.fullmatch(secret):
        return len(secret) >= _SHORTEST_NUMBER
    if len(secret) < _SHORTEST or secret == MASK:
        return False
    return not (_OWN_WORD.fullmatch(secret) and secret.lower() in _own_words())


def _forms(secret: str) -> set[str]:
    """How a secret is written in texts: as it is, in a URL, in JSON, and as Python shows it."""
    in_json = (json.dumps(secret, ensure_ascii=ascii)[1:-1] for ascii in (True, False))
    in_url = (quote(secret, safe=safe, errors="replace") for safe in ("", "/"))
    return {secret, *in_json, *in_url, repr(secret)[1:-1]}


def _pattern(form: str, secret: str) -> re.Pattern[str]:
    begins, ends = "", ""
    if _WORD.fullmatch(secret):
        begins, ends = _BEGINS, _ENDS
    elif _NUMBER.fullmatch(secret):
        begins, ends = _NUMBER_BEGINS, _NUMBER_ENDS
    return re.compile(begins + re.escape(form) + ends)


@functools.cache
def _own_words() -> frozenset[str]:
    """The words and names in the source of this program, in lower case: those that it may show."""
    files = (file for package in ("pipeline", "perceiver", "tune") for file in _SOURCE.glob(f"{package}/**/*.py"))
    return frozenset(word.lower() for file in files for word in _OWN_WORD.findall(_read(file)))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


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
