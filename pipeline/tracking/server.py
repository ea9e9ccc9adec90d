"""Checks that an MLflow server answers, without importing MLflow: the driver checks before it loads anything heavy."""

import http.client
import urllib.error
import urllib.request

ANSWER_SECONDS = 1.5


def check_server(tracking_uri: str) -> None:
    """Sends one request to a tracking server; does nothing for a database URI.

    MLflow's own client would retry an absent server for minutes.

    Raises:
        ValueError: If no MLflow server answers within `ANSWER_SECONDS`.
    """
    if not tracking_uri.startswith(("http://", "https://")):
        return
    url = f"{tracking_uri.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1"
    try:
        urllib.request.urlopen(url, timeout=ANSWER_SECONDS).close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403):
            return  # it asks for a login, which MLflow's client has
        raise ValueError(
            f"tracking.uri = {tracking_uri}: no MLflow server answers ({error}): start one (`mlflow server`), or leave "
            "the option out to record in the storage folder"
        ) from error
