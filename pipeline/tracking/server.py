"""Checks that a tracking store answers, without importing MLflow: the driver checks before it loads anything heavy."""

import base64
import contextlib
import http.client
import os
import socket
import sqlite3
import ssl
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from pipeline.contact import check_path
from pipeline.tracking.config import HOST_REFUSED, HOST_REMEDY, LOGIN_REMEDY

ANSWER_SECONDS = 10.0
"""How long a server may take, which may have much other work; that none listens is known at once."""
_FILE_SECONDS = 1.5
"""How long another process may write to an SQLite file before it counts as one that can be written."""
_PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306, "mssql": 1433, "oracle": 1521}
"""Those of databases whose URI has none."""
_LONGEST_START = 1000
"""Characters of an answer from which its kind is seen."""
_QUESTION = "/api/2.0/mlflow/experiments/search"
_CERTIFICATES = ("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""Variables of MLflow's client that name the certificates of authorities; the first that is set counts."""
_CLIENT_CERTIFICATE = "MLFLOW_TRACKING_CLIENT_CERT_PATH"
REMEDY = "start one (`mlflow server`), or leave the option out to record in the storage folder"


def check_server(tracking_uri: str) -> None:
    """Sends one request to a tracking server, or opens one connection to a database.

    MLflow's own client would retry an absent server for minutes.

    Raises:
        ValueError: If no MLflow server answers within `ANSWER_SECONDS`, if it refuses the login or the host of the URI,
            if what answers is another program, or if the database or its driver is not there.
    """
    if not tracking_uri.startswith(("http://", "https://")):
        if tracking_uri.startswith("databricks"):
            _check_databricks(tracking_uri)
        elif "://" in tracking_uri:
            _check_database(tracking_uri)
        return
    redirects = _Redirects()
    try:
        request, has_login = _request(tracking_uri)
        with _opener(tracking_uri, redirects).open(request, timeout=ANSWER_SECONDS) as response:
            answer, place = response.read(_LONGEST_START).decode(errors="replace").strip(), response.url
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403):
            if HOST_REFUSED.encode() in error.read(_LONGEST_START):
                raise ValueError(
                    f"tracking.uri = {tracking_uri}: the server refuses requests to this host ({HOST_REFUSED}): "
                    f"{HOST_REMEDY}"
                ) from error
            _check_redirect(tracking_uri, redirects)
            if not has_login:
                return  # it asks for a login, which MLflow's client may have from elsewhere: `Tracker` finds out
            raise ValueError(
                f"tracking.uri = {tracking_uri}: the server refuses the login ({error}): give another one, or "
                f"{LOGIN_REMEDY}"
            ) from error
        if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
            raise ValueError(
                f"tracking.uri = {tracking_uri}: the certificate of the server is not accepted ({error}): set "
                f"{_CERTIFICATES[0]} to a PEM file with the certificate of the authority that has signed it; MLflow's "
                "client does not take those that are installed on this machine"
            ) from error
        remedy = f"{_proxy_to_leave_out(tracking_uri)}{REMEDY}"
        raise ValueError(f"tracking.uri = {tracking_uri}: no MLflow server answers ({error}): {remedy}") from error
    if not answer.startswith("{"):  # an MLflow server answers with a JSON object
        what = "a web page, such as a form for a login" if answer.startswith("<") else "no JSON"
        raise ValueError(
            f"tracking.uri = {tracking_uri}: no MLflow server answers, for {urlsplit(place).netloc.rpartition('@')[2]} "
            f"has sent {what}: give the address at which programs, not browsers, reach the server, with a login if it "
            f"wants one; or {_proxy_to_leave_out(tracking_uri)}{REMEDY}"
        )
    _check_redirect(tracking_uri, redirects)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects as MLflow's client does: the login goes to no other host.

    Attributes:
        moved: where the last redirect led that makes a GET of a POST; None if there was none.
    """

    def __init__(self) -> None:
        self.moved: str | None = None

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        from requests import Session

        followed = super().redirect_request(req, fp, code, msg, headers, newurl)
        if followed is not None and Session().should_strip_auth(req.full_url, newurl):
            followed.remove_header("Authorization")
        if code in (301, 302, 303):
            self.moved = newurl
        return followed


def _check_redirect(tracking_uri: str, redirects: _Redirects) -> None:
    """Checks that the server is asked without a redirect that only reading survives.

    Raises:
        ValueError: If it is not: MLflow's client would find experiments, and would record nothing.
    """
    if redirects.moved is None or not urlsplit(redirects.moved).path.endswith(_QUESTION):
        return
    place = redirects.moved.partition(_QUESTION)[0]
    raise ValueError(
        f"tracking.uri = {tracking_uri}: the server has moved to {place}, and nothing can be recorded by way of a "
        f"redirect: give {place}"
    )


def _request(tracking_uri: str) -> tuple[urllib.request.Request, bool]:
    """A request for one experiment, with the login of the URI as a header; and whether there is one."""
    parts = urlsplit(tracking_uri)
    login, _, host = parts.netloc.rpartition("@")
    url = f"{parts.scheme}://{host}{parts.path.rstrip('/')}{_QUESTION}?max_results=1"
    request = urllib.request.Request(url)
    if login:
        user, _, password = login.partition(":")
        encoded = base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
        request.add_header("Authorization", f"Basic {encoded}")
    return request, bool(login)


def _proxy_to_leave_out(tracking_uri: str) -> str:
    """A remedy for a server of one's own that was asked through a proxy, as MLflow's client would ask it too."""
    parts = urlsplit(tracking_uri)
    if parts.scheme not in urllib.request.getproxies() or _goes_around_proxies(tracking_uri):
        return ""
    host = parts.hostname or ""
    return f"it was asked through the proxy of {parts.scheme}_proxy, so add {host} to no_proxy if it is near; or "


def _opener(tracking_uri: str, redirects: _Redirects) -> urllib.request.OpenerDirector:
    """Sends requests as MLflow's client does: with its certificates, and by its reading of no_proxy."""
    handlers: list[urllib.request.BaseHandler] = [redirects]
    if tracking_uri.startswith("https://"):
        handlers.append(urllib.request.HTTPSHandler(context=_tls()))
    if _goes_around_proxies(tracking_uri):
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers)


def _goes_around_proxies(tracking_uri: str) -> bool:
    """Whether no_proxy names the host; networks as 10.0.0.0/8 are known to MLflow's client and not to urllib."""
    from requests.utils import should_bypass_proxies  # a moment to import, which only web servers need

    return should_bypass_proxies(tracking_uri, no_proxy=None)


def _tls() -> ssl.SSLContext:
    """The certificates that MLflow's client accepts, and the one that it shows.

    Raises:
        OSError: if a file that a variable names cannot be read, or is none; names the variable.
    """
    from requests.utils import DEFAULT_CA_BUNDLE_PATH

    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        context = ssl._create_unverified_context()
    else:
        name = next((name for name in _CERTIFICATES if os.environ.get(name)), None)
        # Not those of the system, among which may be one of an authority that MLflow's client does not know.
        path = os.environ[name] if name else DEFAULT_CA_BUNDLE_PATH
        with _named(name or "certifi", path):
            is_folder = Path(path).is_dir()
            context = ssl.create_default_context(capath=path if is_folder else None, cafile=None if is_folder else path)
    if own := os.environ.get(_CLIENT_CERTIFICATE):
        with _named(_CLIENT_CERTIFICATE, own):
            context.load_cert_chain(own, password="")  # without one, OpenSSL asks the terminal for that of a key
    return context


@contextlib.contextmanager
def _named(name: str, path: str) -> Iterator[None]:
    """Adds to errors of a file the name of the variable that names it."""
    try:
        yield
    except OSError as error:  # so are those of `ssl`
        raise OSError(f"{name} = {path} cannot be read as certificates: {error.strerror or error}") from error


def _check_database(uri: str) -> None:
    # A driver of a server's database; loaded here, because most runs need none.
    import sqlalchemy
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    try:
        url = sqlalchemy.make_url(uri)
        dialect = url.get_dialect()
        dialect.import_dbapi()
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise ValueError(f"tracking.uri = {uri}: is no URI of a database that SQLAlchemy knows: {error}") from error
    except ImportError as error:
        raise ValueError(
            f"tracking.uri = {uri}: the driver of the database is not installed ({error}): install it with pip "
            "(psycopg2-binary for postgresql://, mysqlclient for mysql://, pyodbc for mssql://) on all hosts, or name "
            "another one, such as postgresql+psycopg2://"
        ) from error
    if dialect.name == "sqlite":
        return _check_file(uri, url.database)
    try:
        if url.host and (port := url.port or _PORTS.get(dialect.name)):  # drivers wait for minutes
            socket.create_connection((url.host, port), ANSWER_SECONDS).close()
        engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
        engine.connect().close()
    except (OSError, SQLAlchemyError) as error:
        why = str(getattr(error, "orig", None) or error).strip()
        raise ValueError(
            f"tracking.uri = {uri}: the database does not answer ({why}): start it, or mend the URI"
        ) from error


def _check_file(uri: str, file: str | None) -> None:
    """Checks that an SQLite file is one, or can be made, and can be written: MLflow would try for minutes."""
    if not file or file == ":memory:":
        raise ValueError(f"tracking.uri = {uri}: keeps nothing when the run has ended: give sqlite:///FILE")
    check_path(file, "tracking.uri")
    try:
        folder = Path(file).absolute().parent
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # SQLite and MLflow have files of their own beside it
        if not Path(file).exists():
            return
        with contextlib.closing(sqlite3.connect(file, timeout=_FILE_SECONDS)) as database:
            database.execute("BEGIN IMMEDIATE")  # reads the file, and asks for the right to write it
            database.rollback()
    except (OSError, sqlite3.Error) as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
            return  # another process writes, which MLflow waits for
        raise ValueError(
            f"tracking.uri = {uri}: cannot be read and written as an SQLite database ({error}): give another file"
        ) from error


def _check_databricks(uri: str) -> None:
    """Checks that there is a login: MLflow would look for one, in vain, with each record."""
    place = os.environ.get("DATABRICKS_CONFIG_FILE") or "~/.databrickscfg"
    if not os.environ.get("DATABRICKS_HOST") and not Path(os.path.expanduser(place)).is_file():
        raise ValueError(
            f"tracking.uri = {uri}: there is no login: set DATABRICKS_HOST and DATABRICKS_TOKEN, or give http://HOST:PORT"
        )


def has_database(uri: str) -> bool:
    """Whether the SQLite file of `uri` is one of MLflow; True for any other store, whose server is to be asked.

    MLflow would make one, or its tables in the database of another program.
    """
    if not uri.startswith("sqlite:///"):
        return True
    file = Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()
    check_path(str(file), "tracking.uri")
    if not file.is_file():
        return False
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
            return bool(database.execute("SELECT 1 FROM sqlite_master WHERE name = 'registered_models'").fetchall())
    except sqlite3.Error:
        return True  # in use, or damaged, which is said when it is opened
