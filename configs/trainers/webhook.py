#!/usr/bin/env python3
"""Hands training to a service: `[train.captioner] command = ["python3", "configs/trainers/webhook.py", "https://trainer.example.org/jobs"]`.

The service is sent a POST with JSON: `role`, `export` (the folder of the exported version), `champion` (that of the checkpoint in service, or null),
`output` (the folder where the new one is expected) and `params` (the section of the config). It answers

    200, 201    the checkpoint is in `output`
    202         it is at work; its `Location` is asked again every `Retry-After` seconds (10 if not said) until it answers something else
    else        it failed; what it says is passed on

An answer of 200 or 201 may name the address of a tar file in `checkpoint`, for services that do not share the folder; it is unpacked there. While
nobody answers, and at 429, 502, 503 and 504, it is tried again for WEBHOOK_PATIENCE seconds (600). WEBHOOK_TOKEN is sent as a bearer token,
to the scheme and host of the service alone.
The same task is sent with the same `Idempotency-Key`, so that a run which was killed asks for the same work again. Standard library only.
"""

import hashlib
import json
import os
import sys
import tarfile
import time
import urllib.error
import urllib.request
from urllib.parse import urljoin, urlsplit

BUSY = (429, 502, 503, 504)


def request(url: str, body: bytes | None = None) -> urllib.request.Request:
    """A request with the token, if it goes to the service itself: an answer may send us elsewhere."""
    made = urllib.request.Request(url, data=body)
    if (token := os.environ.get("WEBHOOK_TOKEN")) and urlsplit(url)[:2] == urlsplit(sys.argv[1])[:2]:
        # Not handed on when the answer is a redirect.
        made.add_unredirected_header("Authorization", f"Bearer {token}")
    return made


def ask(url: str, body: bytes | None, key: str) -> tuple[int, dict, bytes]:
    """Status, headers and body of the answer."""
    asked = request(url, body)
    asked.add_header("Idempotency-Key", key)
    if body is not None:
        asked.add_header("Content-Type", "application/json")
    patience = time.monotonic() + float(os.environ.get("WEBHOOK_PATIENCE", "600"))
    pause = 1.0
    while True:
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return answer.status, dict(answer.headers), answer.read(1 << 20)
        except urllib.error.HTTPError as error:
            said = error.read(1000).decode(errors="replace")
            if error.code not in BUSY or time.monotonic() > patience:
                sys.exit(f"webhook: {url} answered {error.code}: {said}")
        except OSError as error:
            if time.monotonic() > patience:
                sys.exit(f"webhook: {url} cannot be reached: {error}")
        time.sleep(pause)
        pause = min(2 * pause, 30.0)


def fetch(url: str, output: str) -> None:
    """Unpacks a tar of plain files into `output`."""
    with urllib.request.urlopen(request(url), timeout=60) as answer, tarfile.open(fileobj=answer, mode="r|*") as tar:
        tar.extractall(output, filter="data")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("webhook: name the address of the service, and nothing else")
    url = sys.argv[1]
    job = {name: os.environ.get(f"CAPFILT_{name.upper()}") for name in ("role", "export", "champion", "output")}
    job["params"] = json.loads(os.environ["CAPFILT_PARAMS"])
    body = json.dumps(job).encode()
    key = hashlib.sha256(body).hexdigest()
    status, headers, said = ask(url, body, key)
    while status == 202:
        url = urljoin(url, headers.get("Location", ""))
        time.sleep(float(headers.get("Retry-After", "10")))
        status, headers, said = ask(url, None, key)
    if status not in (200, 201):
        sys.exit(f"webhook: {url} answered {status}")
    answer = json.loads(said) if said.strip() else {}
    if isinstance(answer, dict) and answer.get("checkpoint"):
        fetch(urljoin(url, answer["checkpoint"]), job["output"])


if __name__ == "__main__":
    main()
