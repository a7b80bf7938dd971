#!/usr/bin/env python3
"""Trains in a Kubernetes Job: `[train.captioner] command = ["python3", "configs/trainers/kubernetes_job.py", "configs/trainers/job.yaml"]`.

In the template, `$ROLE`, `$EXPORT` (the folder of the exported version), `$CHAMPION` (that of the checkpoint in service, or ""), `$OUTPUT` (the folder
where the new one is expected), `$PARAMS` (the section of the config as JSON) and `$NAME` (of the Job) are replaced, each by a quoted string;
write `$$` for a dollar sign. The folders must lie on a volume that both this program and the Job mount at the same place.

The Job's name comes from the task, so a run that was killed finds its Job again; one that has failed is deleted and made anew. The API server and the
credentials are those of the service account, or KUBERNETES_API, KUBERNETES_TOKEN and KUBERNETES_NAMESPACE; the account may get, create and
delete Jobs. While the API does not answer, it is asked again for KUBERNETES_PATIENCE seconds (600). Standard library only.
"""

import hashlib
import json
import os
import ssl
import string
import sys
import time
import urllib.error
import urllib.request

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


def fail(what: str):
    sys.exit(f"kubernetes_job: {what}")


def account(name: str, file: str, default: str | None = None) -> str:
    """A setting of the environment, or of the service account."""
    if value := os.environ.get(name):
        return value
    try:
        with open(f"{ACCOUNT}/{file}", encoding="utf-8") as found:
            return found.read().strip()
    except OSError as error:
        return default if default is not None else fail(f"set {name}, or run where there is a service account: {error}")


class Api:
    def __init__(self):
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if ":" in host:
            host = f"[{host}]"
        server = os.environ.get("KUBERNETES_API") or (f"https://{host}:{port}" if host else fail("set KUBERNETES_API: this is no pod"))
        authority = f"{ACCOUNT}/ca.crt"
        self.tls = ssl.create_default_context(cafile=authority if os.path.exists(authority) else None)
        self.jobs = f"{server.rstrip('/')}/apis/batch/v1/namespaces/{account('KUBERNETES_NAMESPACE', 'namespace', 'default')}/jobs"

    def ask(self, method: str, path: str = "", body: bytes | None = None, kind: str = "application/json") -> tuple[int, dict]:
        """Status and answer; what is no fault of ours is tried again."""
        patience = time.monotonic() + float(os.environ.get("KUBERNETES_PATIENCE", "600"))
        pause = 1.0
        while True:
            # Read each time: a pod's token is replaced every hour.
            token = account("KUBERNETES_TOKEN", "token", "")
            headers = {"Accept": "application/json", "Content-Type": kind} | ({"Authorization": f"Bearer {token}"} if token else {})
            request = urllib.request.Request(self.jobs + path, body, headers, method=method)
            try:
                with urllib.request.urlopen(request, timeout=60, context=self.tls) as answer:
                    return answer.status, json.load(answer)
            except urllib.error.HTTPError as error:
                said = error.read(1000).decode(errors="replace")
                if error.code in (404, 409):
                    return error.code, {}
                if error.code not in (429, 500, 502, 503, 504) or time.monotonic() > patience:
                    fail(f"{method} {self.jobs}{path} answered {error.code}: {said}")
            except OSError as error:
                if time.monotonic() > patience:
                    fail(f"{self.jobs} cannot be reached: {error}")
            time.sleep(pause)
            pause = min(2 * pause, 30.0)


def main() -> None:
    if len(sys.argv) != 2:
        fail("name the template of the Job, and nothing else")
    names = ("ROLE", "EXPORT", "CHAMPION", "OUTPUT", "PARAMS")
    task = {name: os.environ.get(f"CAPFILT_{name}", "") for name in names}
    key = hashlib.sha256("\0".join(task.values()).encode()).hexdigest()[:16]
    job = f"capfilt-train-{key}"
    try:
        with open(sys.argv[1], encoding="utf-8") as file:
            template = string.Template(file.read())
        # A string of JSON is one of YAML.
        made = template.substitute({name: json.dumps(value) for name, value in (task | {"NAME": job}).items()})
    except (OSError, KeyError, ValueError) as error:
        fail(f"{sys.argv[1]}: {error}")
    if json.dumps(job) not in made:
        fail(f"{sys.argv[1]} does not use $NAME as the name of its Job")

    api = Api()

    def create() -> bool:
        """Whether the Job is a new one."""
        status, _ = api.ask("POST", body=made.encode(), kind="application/yaml")
        return status != 409 if status != 404 else fail(f"{api.jobs} is not there: is that the namespace?")

    fresh = create()
    pause = 1.0
    while True:
        status, found = api.ask("GET", f"/{job}")
        # Deleted by somebody, or by us a moment ago; one that is being deleted stands in the way of the next.
        if status == 404:
            time.sleep(pause)
            fresh = create()
            continue
        conditions = {condition["type"]: condition for condition in found.get("status", {}).get("conditions", []) if condition["status"] == "True"}
        if "Complete" in conditions and os.listdir(task["OUTPUT"]):
            return
        if "deletionTimestamp" not in found["metadata"] and conditions.keys() & {"Complete", "Failed"}:
            if fresh:
                why = conditions.get("Failed") or {"message": f"it is complete, but left nothing in {task['OUTPUT']}"}
                fail(f"Job {job} has failed: {why.get('reason', '')} {why.get('message', '')}")
            # It belongs to an earlier attempt, whose output is gone.
            api.ask("DELETE", f"/{job}?propagationPolicy=Background")
        time.sleep(pause)
        pause = min(1.5 * pause, 15.0)


if __name__ == "__main__":
    main()
