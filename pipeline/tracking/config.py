"""Settings of MLflow tracking and of the name of the registered model."""

import re
from dataclasses import dataclass

from pipeline.fields import require

TRACKING_STORES = ("http://", "https://", "databricks", "sqlite:///", "postgresql", "mysql", "mssql")


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
        remedy = "give http://HOST:PORT, sqlite:///FILE or the URI of another database"
        require(self.uri is None or self.uri.startswith(TRACKING_STORES), "tracking.uri", self.uri, remedy)
        # MLflow would refuse these names too, but only after training, when the model is registered.
        require(bool(self.experiment.strip()), "tracking.experiment", self.experiment, "give a name")
        remedy = "give a name that starts with a letter or digit, without / and :"
        require(bool(re.fullmatch(r"\w[^/:]*", self.model_name)), "tracking.model_name", self.model_name, remedy)
        remedy = "give a name of letters, digits, _ and - that is neither `latest` nor like a version, e.g. v1"
        named = re.fullmatch(r"(?!latest$|v[0-9]+$)[\w-]+", self.alias, re.IGNORECASE)
        require(bool(named), "tracking.alias", self.alias, remedy)
        require(
            self.alias != "challenger",
            "tracking.alias",
            self.alias,
            "this is the alias of the others: give another name",
        )
