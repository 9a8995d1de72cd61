"""A real S3 server on loopback, for tests: moto's, in a thread. Some of its requests may fail."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BUCKET = "bucket"


class Flaky:
    """A WSGI application that answers some requests with 500: half of these it has done, half it
    hasn't."""

    def __init__(self, application: Any) -> None:
        self.application, self.random, self.lock = application, random.Random(0), threading.Lock()
        self.rate, self.failed = 0.0, 0

    def __call__(self, environ: Any, start_response: Any) -> Any:
        with self.lock:
            fails, does = self.random.random() < self.rate, self.random.random() < 0.5
            self.failed += fails
        if not fails:
            return self.application(environ, start_response)
        if does:
            b"".join(self.application(environ, lambda *_: None))
        else:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response("500 Internal Server Error", [("Content-Length", "0")])
        return []


@contextmanager
def s3_server(failing: float = 0.0) -> Iterator[dict[str, str]]:
    """An S3 server with one empty bucket. Gives the environment in which `s3://bucket/...` leads
    there.

    Args:
        failing: the part of the requests that fails, by a fixed order of chance.
    """
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        env = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        client = boto3.client(
            "s3",
            endpoint_url=env["AWS_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name=env["AWS_DEFAULT_REGION"],
        )
        client.create_bucket(Bucket=BUCKET)
        if failing:
            served: Any = server._server
            served.app = flaky = Flaky(served.app)
            flaky.rate = failing
        yield env
    finally:
        server.stop()
