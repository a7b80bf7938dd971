#!/usr/bin/env python3
"""Hands training to a service: `[train.captioner] command = ["python3", "configs/trainers/webhook.py", "https://trainer.example.org/jobs"]`.

The service is sent a POST with JSON: `role`, `export` (the folder of the exported version), `champion` (that of the checkpoint in service, or null),
`output` (the folder where the new one is expected) and `params` (the section of the config). It answers

    200, 201    the checkpoint is in `output`
    202         it is at work; its `Location` is asked again every `Retry-After` seconds (10 if not said) until it answers something else
    else        it failed; what it says is passed on

An answer of 200 or 201 may name the address of a tar file in `checkpoint`, for services that do not share the folder; it is unpacked there. While
nobody answers, and at 429, 502, 503 and 504, it is tried again for WEBHOOK_PATIENCE seconds (600); work that takes longer than WEBHOOK_DEADLINE
seconds (a week) is given up. WEBHOOK_TOKEN is sent as a bearer token, to the scheme and host of the service alone.
The same task is sent with the same `Idempotency-Key`, so that a run which was killed asks for the same work again; where that has left nothing in
`output`, since the folder was emptied meanwhile, it is asked for anew under another key. A service should forget the key of work that has failed.
Standard library only.
"""

import hashlib
import json
import os
import sys
import tarfile
import time
import urllib.error
import urllib.request
from datetime import datetime, timezone
from email.message import Message
from email.utils import parsedate_to_datetime
from urllib.parse import urljoin, urlsplit

BUSY = (429, 502, 503, 504)
# Bytes that a checkpoint may unpack to.
LARGEST = 256 << 30


def request(url: str, body: bytes | None = None) -> urllib.request.Request:
    """A request with the token, if it goes to the service itself: an answer may send us elsewhere."""
    if urlsplit(url).scheme not in ("http", "https"):
        sys.exit(f"webhook: {url} is no address of http or https")
    made = urllib.request.Request(url, data=body)
    if (token := os.environ.get("WEBHOOK_TOKEN")) and urlsplit(url)[:2] == urlsplit(sys.argv[1])[:2]:
        # Not handed on when the answer is a redirect.
        made.add_unredirected_header("Authorization", f"Bearer {token}")
    return made


def ask(url: str, body: bytes | None, key: str) -> tuple[int, Message, bytes]:
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
                return answer.status, answer.headers, answer.read(1 << 20)
        except urllib.error.HTTPError as error:
            said = error.read(1000).decode(errors="replace")
            if error.code not in BUSY or time.monotonic() > patience:
                sys.exit(f"webhook: {url} answered {error.code}: {said}")
        except OSError as error:
            if time.monotonic() > patience:
                sys.exit(f"webhook: {url} cannot be reached: {error}")
        time.sleep(pause)
        pause = min(2 * pause, 30.0)


def pause(headers: Message) -> float:
    """Seconds after which it is to be asked again, 1 to 300: `Retry-After` is a number of them, or a date."""
    said = headers.get("Retry-After", "10")
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(said) - datetime.now(timezone.utc)).total_seconds()
        except (TypeError, ValueError):
            seconds = 10.0
    return max(1.0, min(300.0, seconds))


def fetch(url: str, output: str) -> None:
    """Unpacks a tar of plain files into `output`."""
    room = LARGEST

    def plain(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo:
        nonlocal room
        room -= member.size
        if not (member.isreg() or member.isdir()) or room < 0:
            sys.exit(f"webhook: {url} has in it what is no plain file, or more than {LARGEST} bytes: {member.name}")
        return tarfile.data_filter(member, path)

    try:
        with urllib.request.urlopen(request(url), timeout=60) as answer, tarfile.open(fileobj=answer, mode="r|*") as tar:
            tar.extractall(output, filter=plain)
    except (OSError, tarfile.TarError) as error:
        sys.exit(f"webhook: {url} cannot be unpacked: {error}")


def train(url: str, body: bytes, key: str) -> tuple[str, bytes]:
    """Asks for the work and waits for its end; the address and the body of the last answer."""
    deadline = time.monotonic() + float(os.environ.get("WEBHOOK_DEADLINE", "604800"))
    status, headers, said = ask(url, body, key)
    while status == 202:
        if time.monotonic() > deadline:
            sys.exit(f"webhook: {url} is still at work after WEBHOOK_DEADLINE")
        url = urljoin(url, headers.get("Location", ""))
        time.sleep(pause(headers))
        status, headers, said = ask(url, None, key)
    if status not in (200, 201):
        sys.exit(f"webhook: {url} answered {status}")
    return url, said


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("webhook: name the address of the service, and nothing else")
    url = sys.argv[1]
    job = {name: os.environ.get(f"CAPFILT_{name.upper()}") for name in ("role", "export", "champion", "output")}
    job["params"] = json.loads(os.environ["CAPFILT_PARAMS"])
    body = json.dumps(job).encode()
    key = hashlib.sha256(body).hexdigest()
    for key in (key, f"{key}-again"):
        last, said = train(url, body, key)
        answer = json.loads(said) if said.strip() else {}
        if isinstance(answer, dict) and answer.get("checkpoint"):
            fetch(urljoin(last, answer["checkpoint"]), job["output"])
        if os.listdir(job["output"]):
            return
    sys.exit(f"webhook: {url} has left nothing in {job['output']}")


if __name__ == "__main__":
    main()
