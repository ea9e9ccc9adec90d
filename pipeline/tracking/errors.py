"""Errors of the tracking store, and which of them are worth another try."""

import re
import time
import traceback
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
# Statuses of HTTP by which a server, or a proxy before it, refuses what was sent, such as a file that is too large.
REFUSING_STATUSES = {400, 413, 414, 415, 422, 431}
# 407 is that of a proxy.
LOGIN_STATUSES = {401, 403, 407}
# Of the others between 400 and 499, those that say nothing of what was sent.
PASSING_STATUSES = {408, 425, 429}
# Packages of databases and of stores of artifacts whose errors are neither MLflow's nor OSErrors.
STORE_PACKAGES = {"azure", "boto3", "botocore", "google", "s3transfer", "sqlalchemy"}
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
    if isinstance(error, TrackingError) and error.error_code in REFUSALS:
        return False
    if (status := _http_status(error)) is not None:
        return status not in REFUSING_STATUSES
    if isinstance(error, TrackingError | TrackingUnavailable):
        return True
    if type(error).__module__.partition(".")[0] in STORE_PACKAGES:
        return True
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError)


def _http_status(error: Exception) -> int | None:
    """The status of the answer that `error` tells of, if MLflow made no error code of it; None if there is none.

    A proxy or a gateway before the server answers without the error codes of MLflow, and MLflow then does not tell the
    status: all that has it is the answer in the frame that raised the error.
    """
    answers = [getattr(error, "response", None)]
    if isinstance(error, TrackingError):
        if error.error_code != "INTERNAL_ERROR":
            return None
        frames = reversed(list(traceback.walk_tb(error.__traceback__)))
        answers = [frame.f_locals.get("response") for frame, _ in frames if _is_of_mlflow(frame.f_globals)]
    statuses = (getattr(answer, "status_code", None) for answer in answers)
    return next((status for status in statuses if isinstance(status, int)), None)


def _is_of_mlflow(names: dict[str, object]) -> bool:
    return str(names.get("__name__")).partition(".")[0] == "mlflow"


def may_refuse_content(error: Exception) -> bool:
    """Whether a transient error may be the answer to what was sent, and not to who sent it or when.

    A firewall that dislikes some contents answers 403 as to a login without rights, or another status. Only a call with
    other contents tells which of the two it is.
    """
    if isinstance(error, TrackingError) and error.error_code in {*LOGIN_REFUSALS, "ENDPOINT_NOT_FOUND"}:
        return True
    status = _http_status(error)
    return status is not None and 400 <= status < 500 and status not in PASSING_STATUSES


def check_login(error: Exception, uri: str) -> None:
    """Call this with an error of the store at `uri` before the same call is tried again.

    Raises:
        ValueError: if the server refuses the login or the name of its host; has the remedy, and no secret.
    """
    refused = isinstance(error, TrackingError) and error.error_code in LOGIN_REFUSALS
    if refused or _http_status(error) in LOGIN_STATUSES:
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
