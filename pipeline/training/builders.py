"""What makes a builder of models another one: what it holds, its file, its place there, and the package around it."""

import contextlib
import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

INSTALLED = ("site-packages", "dist-packages")
"""Folders of packages that pip has installed, which nobody edits."""


def state_of(builder: Callable[..., Any]) -> str:
    """What a builder holds that is neither in its file nor among its defaults, for a message; empty if nothing."""
    if inspect.isclass(builder):
        # Its attributes and methods may hold whatever the function around it had.
        return "is a class within a function, whose variables it may use" if "<locals>" in builder.__qualname__ else ""
    if inspect.ismethod(builder):
        return f"is bound to {builder.__self__!r}"
    if inspect.isbuiltin(builder):
        return ""  # it has no source file
    if not inspect.isfunction(builder):
        return f"is an object of {type(builder).__module__}.{type(builder).__qualname__}"
    if builder.__code__.co_name == "<lambda>":
        return "is a lambda, which has no name"
    if builder.__closure__:
        return f"uses {', '.join(builder.__code__.co_freevars)} of the function around it"
    return ""


def number_among_namesakes(builder: Callable[..., Any], file: str, source: bytes) -> int:
    """How many functions or classes of the same qualified name begin before the builder in its file, as with `if`.

    Raises:
        ValueError: if it is a class that nothing tells from its namesakes, since it has no methods.
    """

    def blocks(code: CodeType) -> Iterator[CodeType]:
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                yield inner
                yield from blocks(inner)

    own = getattr(builder, "__code__", None)
    name = own.co_qualname if own else builder.__qualname__
    whole = compile(source, file, "exec", dont_inherit=True)
    found = sorted((code for code in blocks(whole) if code.co_qualname == name), key=lambda code: code.co_firstlineno)
    if own:
        return sum(code.co_firstlineno < own.co_firstlineno for code in found)
    if len(found) < 2:
        return 0
    # Python 3.11 does not say where a class begins. Lines are part of what makes two methods equal.
    methods = {method.__code__ for method in vars(builder).values() if inspect.isfunction(method)}
    its = [number for number, code in enumerate(found) if methods.intersection(code.co_consts)]
    if len(its) != 1:
        raise ValueError(
            f"{file} defines {len(found)} classes {name}, and no method tells which of them is the "
            "builder: give them different names"
        )
    return its[0]


def folders_of_package(builder: Callable[..., Any]) -> list[str]:
    """The folders of the top-level package in which a builder is: several of a namespace package, none of a module."""
    top, dot, _ = (getattr(builder, "__module__", None) or "").partition(".")
    return sorted(getattr(sys.modules.get(top), "__path__", ())) if dot else []


def is_installed(folders: list[str]) -> bool:
    """Whether pip has put a package there, other than as a link to its sources."""
    return any(name in Path(folder).parts for folder in folders for name in INSTALLED)


def digest_of_package(folders: list[str]) -> str:
    """A digest of the names and contents of all Python files in these folders and below them, without hidden ones."""
    files = []
    for top in folders:
        for folder, below, names in os.walk(top):
            below[:] = [name for name in below if not name.startswith(".") and name not in ("__pycache__", *INSTALLED)]
            for path in (Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(".")):
                with contextlib.suppress(OSError):  # a link to nothing, as editors make them
                    files.append((path.relative_to(top).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()))
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in sorted(files)).encode()).hexdigest()
