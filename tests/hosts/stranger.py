"""Sends requests to every port of a Ray head without the token, and prints the answers as JSON.

python stranger.py ADDRESS PORT...
"""

import http.client
import json
import sys
import urllib.request

import ray

JOB = b'{"entrypoint": "id"}'
REQUESTS = (
    ("/", None), ("/nodes?view=summary", None), ("/api/jobs/", None), ("/api/jobs/", JOB), ("/api/job_agent/jobs/", JOB)
)  # fmt: skip


def main(head: str, *ports: str) -> None:
    answers = {}
    for port in ports:
        for path, data in REQUESTS:
            try:
                with urllib.request.urlopen(f"http://{head}:{port}{path}", data, timeout=3) as answer:
                    answers[f"{'POST' if data else 'GET'} :{port}{path}"] = answer.read(200).decode(errors="replace")
            except (OSError, http.client.HTTPException):  # refused, or another protocol
                continue
    for address in (f"{head}:6379", f"ray://{head}:10001"):
        try:
            ray.init(address=address, log_to_driver=False)
            answers[address] = str(ray.nodes())
        except Exception as error:  # whatever refuses
            print(f"{address}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        finally:
            ray.shutdown()
    print("ANSWERS", json.dumps(answers))


main(*sys.argv[1:])
