"""Passwords and keys are hidden in every form in which they come, and nothing else is."""

import sys
import time

import pytest

from pipeline.masking import mask, masked


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql+psycopg2://user:hunter2@db:5432/mlflow", "postgresql+psycopg2://***@db:5432/mlflow"),
        ("mysql://user:hunter2/x#?@db/mlflow", "mysql://***@db/mlflow"),
        ("https://user:hunt@er2@host/path@1", "https://***@host/path@1"),
        ("https://hunter2@host", "https://***@host"),
        ("mysql:hunt@er2@db", "mysql:***@db"),
        ("user:hunter2@host:5432", "user:***@host:5432"),
        ("s3://AKIAHUNTER2:hunter2%2Fx@bucket/runs?region=eu", "s3://***@bucket/runs?region=eu"),
        ("s3://b/runs?secret_key=hunter2&scheme=http", "s3://b/runs?secret_key=***&scheme=http"),
        ("s3://b?Access_Key=AKIAHUNTER2&secret_key=hunter2", "s3://b?Access_Key=***&secret_key=***"),
        ("https://h/x?X-Amz-Signature=hunter2&sig=hunter2", "https://h/x?X-Amz-Signature=***&sig=***"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Du%3BPWD%3Dhunter2", "mssql+pyodbc:///?odbc_connect=***"),
        ("one a://u:hunter2@h/, two 'b://u:hunter2@h'", "one a://***@h/, two 'b://***@h'"),
        ('{"uri":"a://u:hunter2@h","mail":"x@y"}', '{"uri":"a://***@h","mail":"x@y"}'),
        ("+    AWS_SECRET_ACCESS_KEY: hunter2", "+    AWS_SECRET_ACCESS_KEY: ***"),
        ("export MLFLOW_TRACKING_PASSWORD='hunter2'", "export MLFLOW_TRACKING_PASSWORD=***"),
        ('"api_key": "hunter2",', '"api_key": ***,'),
        ("x-api-key: hunter2", "x-api-key: ***"),
        ("DB_PASS=hunter2", "DB_PASS=***"),
        ("fernet_key: hunter2", "fernet_key: ***"),
        ("Authorization: Basic aHVudGVyMg==", "Authorization: Basic ***"),
        ('"Authorization": "Bearer hunter2"', '"Authorization": "Bearer ***"'),
        (
            "-----BEGIN RSA PRIVATE KEY-----\nhun\nter2\n-----END RSA PRIVATE KEY-----",
            "-----BEGIN RSA PRIVATE KEY-----***-----END RSA PRIVATE KEY-----",
        ),
    ],
)
def test_a_secret_is_hidden(text: str, expected: str) -> None:
    assert mask(text) == expected
    assert mask(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "models:/perceiver@champion",
        "http://host:5000/a@b",
        "sqlite:////home/me@work/mlflow.db",
        "s3://bucket/runs?endpoint_override=localhost:8333&scheme=http",
        "num_tokens = 64, tokens=3",
        "    token = read_token()",
        "a basic understanding of keys: private ones",
        "bypass=everything",
        "    token: str | None = None",
        "PASSWORD=$MLFLOW_TRACKING_PASSWORD",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert mask(text) == text


def test_the_secrets_of_this_process_are_hidden_however_they_are_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--tracking.uri=postgresql://user:hunt%40er2@db/mlflow"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc/def+ghi")
    monkeypatch.setenv("PERCEIVER_STORAGE", "s3://AKIA:jkl%2Fmno@bucket")
    text = "nonnumeric port: 'hunt@er2@db', 'hunt%40er2'; abc/def+ghi is not the key, nor is jkl/mno"
    assert mask(text) == "nonnumeric port: '***@db', '***'; *** is not the key, nor is ***"


@pytest.mark.parametrize(
    ("uri", "texts"),
    [
        (
            "sqlite:////home/jane@corp.local/runs/mlflow.db",
            ["/home/jane@corp.local/runs/report.html", "sqlite:////home/jane@corp.local/runs/other.db"],
        ),
        ("sqlite:////home/jane:ab/cdefg@corp/mlflow.db", ["ab/cdefg@corp/runs"]),
        ("file:///home/jane@corp/runs", ["/home/jane@corp/runs/a.jpg", "//home/jane"]),
        ("s3://photos/2026@home/flowers", ["s3://photos/2026@home/flowers/a.jpg", "photos/2026 is kept"]),
        ("s3://photos?prefix=2026@home", ["photos?prefix=2026@home/a.jpg"]),
        ("http://host/experiments#jane@corp", ["host/experiments#jane"]),
    ],
)
def test_an_at_sign_in_a_path_makes_no_secret_of_what_stands_before_it(
    uri: str, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--data.path", uri, f"--tracking.uri={uri}"])
    for text in (uri, *texts):
        assert mask(text) == text


@pytest.mark.parametrize(
    ("uri", "secret", "shown"),
    [
        ("http://user:pa/sswd@host/", "pa/sswd", "http://***@host/"),
        ("mysql://user:hunter2/x#?@db/mlflow", "hunter2/x#?", "mysql://***@db/mlflow"),
        # Not a login by its form: it may be a port, or a user's name with a slash. A library that quotes it hides it.
        ("mysql://user:1234/x@db/mlflow", "1234/x", "mysql://user:***@db/mlflow"),
        ("mysql://us/er:hunter2@db/mlflow", "hunter2", "mysql://us/er:***@db/mlflow"),
        ("redis://:hunt/er2@db", "hunt/er2", "redis://:***@db"),
        ("https://hunter2@host/a@b", "hunter2", "https://***@host/a@b"),
    ],
)
def test_what_may_be_a_password_with_a_slash_is_hidden(
    uri: str, secret: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--tracking.uri", uri])
    assert mask(uri) == shown
    assert mask(f"cannot connect with '{secret}'") == "cannot connect with '***'"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("pipeline", "python pipeline/run.py, and the pipeline was fast"),
        ("cifar100", "cifar100: perceiver"),
        ("Perceiver", "tracking.experiment = perceiver"),
        ("token", "a token of five letters"),
        ("      ", "what      is apart"),
        ("100000", "100000 rows, batch 100000"),
        ("***", "***"),
        ("", "nothing"),
        ("geheimnis", "Geheimnisse, mygeheimnis_1"),
        ("20261127", "file-120261127, 0.20261127, 20261127.5"),
    ],
)
def test_words_and_numbers_of_a_text_stay_although_a_secret_is_one_of_them(
    value: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", value)
    assert mask(text) == text


@pytest.mark.parametrize(
    ("value", "text", "expected"),
    [
        ("geheimnis", r"user:geheimnis. %3Dgeheimnis&x \ngeheimnis", r"user:***. %3D***&x \n***"),
        ("geheimnis\n", "user:geheimnis.", "user:***."),
        ("20261127", "PIN '20261127'.", "PIN '***'."),
        ("letme1n", "xletme1nx", "x***x"),
        ("pipeline", "HF_TOKEN=pipeline, https://me:pipeline@host", "HF_TOKEN=***, https://***@host"),
        ('pa"ss\\wörd', r'{"x": "pa\"ss\\w\u00f6rd"}', '{"x": "***"}'),
        ('pa"ss\\wörd', "?x=pa%22ss%5Cw%C3%B6rd", "?x=***"),
        ("it's\ttrue", repr("it's\ttrue"), '"***"'),
    ],
)
def test_a_secret_is_hidden_where_it_stands_and_however_it_is_written(
    value: str, text: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", value)
    assert mask(text) == expected


@pytest.mark.parametrize(
    "piece",
    ["a.", "a:", "://", "a-b ", "secret ", "x@", "token=a&", "A" * 100, "Bearer ", "-----BEGIN PRIVATE KEY-----"],
)
def test_a_long_text_takes_one_pass(piece: str) -> None:
    text = piece * (100_000 // len(piece))
    start = time.process_time()
    mask(text)
    assert time.process_time() - start < 3


def test_all_texts_in_a_value_are_masked() -> None:
    value = {"uri": "a://u:hunter2@h", "n": (1, ["b://u:hunter2@h"]), "tracking.password": "hunter2", "rate": 0.5}
    expected = {"uri": "a://***@h", "n": (1, ["b://***@h"]), "tracking.password": "***", "rate": 0.5}
    assert masked(value) == expected
