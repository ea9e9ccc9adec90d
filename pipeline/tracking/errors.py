"""Errors of the tracking store, and which of them are worth another try."""

import re
import time
from collections.abc import Callable
from typing import TypeVar

from mlflow import MlflowException

from pipeline.masking import mask
from pipeline.tracking.config import HOST_REFUSED, HOST_REMEDY, LOGIN_REMEDY

TrackingError = MlflowException  # so that other packages need not import MLflow
T = TypeVar("T")
RETRY_SECONDS = 2.0
# Error codes of MLflow that the same call will always get.
REFUSALS = {"BAD_REQUEST", "INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"}
# Those of HTTP's 401 and 403.
LOGIN_REFUSALS = {"UNAUTHENTICATED", "PERMISSION_DENIED"}
# Of SQLAlchemy, SQLite, PostgreSQL, MySQL and SQL Server.
CONFLICT = re.compile(
    r"expected to update \d+ row|UNIQUE constraint failed|duplicate key value|Duplicate entry"
    r"|Violation of (?:PRIMARY|UNIQUE) KEY"
)


class TrackingUnavailable(RuntimeError):
    """The tracking store has not answered for too long."""


def is_transient(error: Exception) -> bool:
    """Whether the same call may succeed later: the store did not answer or failed, but did not refuse the request.

    So it is with a login that is refused: nothing is wrong with what was to be recorded. Where nobody can give another
    login meanwhile, `check_login` ends the attempts.
    """
    if isinstance(error, TrackingError):
        return error.error_code not in REFUSALS
    return isinstance(error, (OSError, TrackingUnavailable)) and not isinstance(error, FileNotFoundError)


def check_login(error: Exception, uri: str) -> None:
    """Call this with an error of the store at `uri` before the same call is tried again.

    Raises:
        ValueError: if the server refuses the login or the name of its host; has the remedy, and no secret.
    """
    if isinstance(error, TrackingError) and error.error_code in LOGIN_REFUSALS:
        said = " ".join(str(error).split())[:400]
        refusal = f"the server refuses the login, or its rights ({said}): {LOGIN_REMEDY}"
        if HOST_REFUSED in str(error):
            refusal = f"the server refuses requests to this host ({said}): {HOST_REMEDY}"
        raise ValueError(mask(f"tracking.uri = {uri}: {refusal}")) from error


def is_conflict(error: Exception) -> bool:
    """Whether the database refused a row because another writer had just inserted or deleted it.

    MLflow reads the row of an alias or a tag in the registry, and then inserts or updates it. If another writer comes
    between the two, the answer is BAD_REQUEST, with the words of SQLAlchemy or of the database. The same call succeeds
    afterwards, unless the database is damaged.
    """
    if not isinstance(error, TrackingError) or error.error_code != "BAD_REQUEST":
        return False
    return CONFLICT.search(str(error)) is not None


def retry_transient(call: Callable[[], T], uri: str, seconds: float) -> T:
    """Calls `call`, which must be idempotent, until it succeeds; returns its result.

    Errors that are transient or conflicts are retried.

    Args:
        uri: Tracking URI for the error message.
        seconds: How long they are retried.

    Raises:
        TrackingUnavailable: If the store has not answered by then.
        ValueError: If it refuses the login, at once: this process will have no other one.
        Exception: Any other error of `call`, at once; a conflict that lasts.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            return call()
        except Exception as error:
            check_login(error, uri)
            late = time.monotonic() > end
            if not is_transient(error) and (late or not is_conflict(error)):
                raise
            if late:
                raise TrackingUnavailable(
                    f"tracking.uri = {uri} has not answered for {seconds:.0f} s: once it does, run the same command to "
                    f"continue from here ({error})"
                ) from error
            time.sleep(RETRY_SECONDS)
