#!/usr/bin/env python3
"""Serves a built demo site on the loopback address: several virtual hosts on one port, with the moods of site.json.

    serve.py [--data .cache/demo] [--port 0] [--time-scale 1.0] [--stay]

A client names the host either as a plain HTTP proxy's client does (`GET http://wildlife.test/ HTTP/1.1`) or by the Host
header. The first line printed is the address, for example http://127.0.0.1:40123. `GET /__stats` gives counts as JSON,
among them how often a path that robots.txt closes was asked for. The server ends with the process that started it,
unless --stay is given. Standard library only.
"""

import argparse
import asyncio
import collections
import json
import os
import signal
import sys
from http import HTTPStatus
from urllib.parse import unquote, urlsplit

TYPES = {".html": "text/html; charset=utf-8", ".jpg": "image/jpeg", ".png": "image/png", ".gif": "image/gif", ".txt": "text/plain"}
HEAD_LIMIT = 32 * 1024
IDLE_SECONDS = 60
DRIP_SECONDS = 0.25


class Site:
    """The files of every host, the rules by address, and what clients did."""

    def __init__(self, data: str, time_scale: float):
        with open(os.path.join(data, "site.json")) as file:
            description = json.load(file)
        self.rules, self.robots, self.time_scale = description["rules"], description["robots"], time_scale
        root = os.path.join(data, "site")
        self.hosts = set(description["hosts"])
        # an index made once: an address can only ever lead to a file that stands in it
        self.files = {}
        for folder, _, names in os.walk(root):
            for name in names:
                path = os.path.join(folder, name)
                self.files[os.path.relpath(path, root).replace(os.sep, "/")] = path
        self.requests, self.status, self.violations = collections.Counter(), collections.Counter(), collections.Counter()
        self.live, self.most_at_once = collections.Counter(), collections.Counter()

    def file(self, host: str, path: str) -> str | None:
        return self.files.get(f"{host}{path}") or self.files.get(f"{host}{path.rstrip('/')}/index.html")

    def closed(self, host: str, path: str) -> bool:
        return path != "/robots.txt" and any(path.startswith(folder) for folder in self.robots.get(host, ()))

    def stats(self) -> bytes:
        return json.dumps(
            {
                "requests": sum(self.requests.values()), "status": dict(sorted(self.status.items())), "robots_violations": dict(self.violations),
                "most_at_once": dict(self.most_at_once),
            }
        ).encode()


class Connection:
    """One client connection: requests one after another until either side has enough."""

    def __init__(self, site: Site, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.site, self.reader, self.writer = site, reader, writer

    async def run(self) -> None:
        try:
            while await self.request():
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.TimeoutError, ValueError):
            pass  # the client went away or spoke nonsense: nothing to answer
        except asyncio.CancelledError:
            pass  # the server ends while an endless answer is under way
        finally:
            self.writer.close()

    async def request(self) -> bool:
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), IDLE_SECONDS)
        first, *lines = head.decode("latin-1").rstrip().split("\r\n")
        method, target, version = first.split(" ")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        url = urlsplit(target)
        host = (url.netloc or headers.get("host", "")).split(":")[0].lower()
        path = unquote(url.path or "/")
        keep = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
        if path == "/__stats":
            return await self.send(200, self.site.stats(), {"Content-Type": "application/json"}, keep, method)
        if method not in ("GET", "HEAD"):
            return await self.send(405, b"", {"Allow": "GET, HEAD"}, False, method)
        site = self.site
        site.requests[host, path] += 1
        site.live[host] += 1
        site.most_at_once[host] = max(site.most_at_once[host], site.live[host])
        if site.closed(host, path):
            site.violations[host] += 1
        try:
            return await self.answer(method, host, path, url.query, keep)
        finally:
            site.live[host] -= 1

    async def answer(self, method: str, host: str, path: str, query: str, keep: bool) -> bool:
        site = self.site
        if host not in site.hosts:
            return await self.send(502, b"no such host\n", {"Content-Type": "text/plain"}, keep, method)
        rule = site.rules.get(f"{host}{path}", {})
        if "delay_ms" in rule:
            await asyncio.sleep(rule["delay_ms"] / 1000 * site.time_scale)
        if rule.get("endless"):
            return await self.endless(host, keep)
        if "redirect" in rule and query != "moved=1":
            return await self.send(rule["status"], b"", {"Location": rule["redirect"]}, keep, method)
        if rule.get("status", 200) >= 400 and site.requests[host, path] <= rule.get("times", sys.maxsize):
            wait = {"Retry-After": str(rule["retry_after"])} if "retry_after" in rule else {}
            return await self.send(rule["status"], b"not now\n", {"Content-Type": "text/plain", **wait}, keep, method)
        if rule.get("drip"):
            return await self.drip(path, keep)
        file = site.file(host, path)
        if file is None:
            return await self.send(404, b"<h1>404</h1>\n", {"Content-Type": TYPES[".html"]}, keep, method)
        with open(file, "rb") as opened:
            body = opened.read()
        kind = rule.get("content_type") or TYPES.get(os.path.splitext(file)[1], "application/octet-stream")
        return await self.send(200, body, {"Content-Type": kind, **rule.get("headers", {})}, keep, method)

    def start(self, status: int, headers: dict[str, str], keep: bool) -> None:
        self.site.status[status] += 1
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {value}" for name, value in headers.items())]
        lines.append(f"Connection: {'keep-alive' if keep else 'close'}")
        self.writer.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))

    async def send(self, status: int, body: bytes, headers: dict[str, str], keep: bool, method: str) -> bool:
        self.start(status, {**headers, "Content-Length": str(len(body))}, keep)
        if method != "HEAD":
            self.writer.write(body)
        await self.writer.drain()
        return keep

    async def endless(self, host: str, keep: bool) -> bool:
        """A page without an end: chunk after chunk of links, until the client has had enough."""
        self.start(200, {"Content-Type": TYPES[".html"], "Transfer-Encoding": "chunked"}, keep)
        day = 0
        while True:
            lines = "".join(f'<p><a href="http://{host}/calendar.html?day={day + n}">day {day + n}</a></p>\n' for n in range(200)).encode()
            self.writer.write(f"{len(lines):x}\r\n".encode() + lines + b"\r\n")
            await self.writer.drain()
            await asyncio.sleep(0.005)
            day += 200

    async def drip(self, path: str, keep: bool) -> bool:
        """An answer that comes a byte at a time and never comes whole."""
        kind = TYPES.get(os.path.splitext(path)[1], "application/octet-stream")
        self.start(200, {"Content-Type": kind, "Content-Length": "1000000"}, keep)
        while True:
            self.writer.write(b".")
            await self.writer.drain()
            await asyncio.sleep(DRIP_SECONDS * self.site.time_scale)


async def serve(args: argparse.Namespace) -> None:
    site, stop = Site(args.data, args.time_scale), asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    server = await asyncio.start_server(lambda r, w: Connection(site, r, w).run(), "127.0.0.1", args.port, limit=HEAD_LIMIT, backlog=512)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    parent = os.getppid()
    while not stop.is_set() and (args.stay or os.getppid() == parent):
        try:
            await asyncio.wait_for(stop.wait(), 0.5)
        except asyncio.TimeoutError:
            pass
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=".cache/demo", help="what build_site.py made")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--time-scale", type=float, default=1.0, help="0.1 makes every delay ten times shorter")
    parser.add_argument("--stay", action="store_true", help="stay when the process that started the server ends")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
