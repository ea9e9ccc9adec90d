"""Settings of MLflow tracking and of the name of the registered model."""

import re
from dataclasses import dataclass

from pipeline.fields import require

TRACKING_STORES = re.compile(r"https?://.+|databricks(-uc)?(://.+)?|sqlite:///.+|(postgresql|mysql|mssql)(\+\w+)?://.+")
LOGIN_REMEDY = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to a login that it accepts"
)
HOST_REFUSED = "Invalid Host header"
"""What a server of MLflow answers to a request to a name that it does not know as its own."""
HOST_REMEDY = "start it with --allowed-hosts and the host of this address, or * (docs/cluster.md)"
STORE_REMEDY = "give http://HOST:PORT, sqlite:///FILE or the URI of another database"
# MLflow looks names up by filters in which they stand in single quotes, and other letters end the filter.
_NAME = re.compile(r"\w[^/:@'\"`\\\x00-\x1f]*")
LONGEST_NAME = 250


@dataclass(frozen=True)
class TrackingConfig:
    """Where MLflow records runs and models."""

    uri: str | None = None
    """MLflow tracking URI; default: $MLFLOW_TRACKING_URI, else an SQLite file inside the storage folder."""
    experiment: str = "perceiver"
    """MLflow experiment of the runs."""
    model_name: str = "perceiver"
    """Name of the registered model."""
    alias: str = "champion"
    """Alias of the best version; the newest version without it gets the alias `challenger`."""

    def __post_init__(self) -> None:
        usable = self.uri is None or TRACKING_STORES.fullmatch(self.uri) is not None
        require(usable, "tracking.uri", self.uri, STORE_REMEDY)
        # MLflow would refuse these names too, but only after training, when the model is registered.
        require(bool(self.experiment.strip()), "tracking.experiment", self.experiment, "give a name")
        require(len(self.experiment) <= LONGEST_NAME, "tracking.experiment", self.experiment, "give a shorter name")
        remedy = (
            f"give a name of at most {LONGEST_NAME} characters that starts with a letter or digit, without /, : and @ "
            "and without quotes"
        )
        usable = _NAME.fullmatch(self.model_name) is not None and len(self.model_name) <= LONGEST_NAME
        require(usable, "tracking.model_name", self.model_name, remedy)
        remedy = "give a name of letters, digits, _ and - that is neither `latest` nor like a version, e.g. v1"
        named = re.fullmatch(r"(?!latest$|v[0-9]+$)[\w-]{1,250}", self.alias, re.IGNORECASE | re.ASCII)
        require(bool(named), "tracking.alias", self.alias, remedy)
        require(
            self.alias != "challenger",
            "tracking.alias",
            self.alias,
            "this is the alias of the others: give another name",
        )
