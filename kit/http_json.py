"""Ask a server for JSON over HTTP, with the standard library alone."""

from __future__ import annotations

import http.client
import json
import os
import urllib.request

# what goes wrong between here and a server, and an answer that is not JSON (ValueError)
FAULTS = (OSError, http.client.HTTPException, ValueError)


def call(url: str, question: dict | None = None, *, timeout: float, key: str) -> object:
    """POST a question as JSON, or GET if there is none, and return the answer's JSON.

    timeout: seconds without a byte. key: environment variable with the server's key, if it wants one.
    Raises urllib.error.HTTPError for a status that is an error, other OSError and http.client.HTTPException
    for a connection that fails or ends early, and ValueError for an answer that is not JSON.
    """
    headers = {"Content-Type": "application/json"}
    if secret := os.environ.get(key):
        headers["Authorization"] = f"Bearer {secret}"
    body = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(url, body, headers)
    with urllib.request.urlopen(request, timeout=timeout) as reply:
        return json.loads(reply.read())


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")
