"""The hub is reached as huggingface_hub reaches it: mirrors with a port and a path, proxies, time
limits, offline. The servers here are local; the client is the library's own.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from configs import TINY_RUN
from mirror import COMMIT, MODEL, mirror

CONFIG = json.dumps(TINY_RUN["model"]["architecture"]).encode()
ASK = """
import sys
from tp_trainer.config import hub_file
for file in sys.argv[1:]:
    try:
        print("got", hub_file("owner/model", file).read_text())
    except (LookupError, OSError) as error:
        print(type(error).__name__, error)
"""


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    with mirror({"config.json": CONFIG}) as state:
        yield state


@pytest.fixture
def closed() -> str:
    """A port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def asked(home: Path, *files: str, script: str = ASK, **environment: str) -> list[str]:
    """What comes of asking for files of owner/model, in a process of its own (huggingface_hub reads
    the environment once)."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("HF_") and not key.lower().endswith("_proxy")
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *(files or ["config.json"])],
        env={**kept, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


GOT = f"got {CONFIG.decode()}"


def test_a_mirror_with_a_port_and_a_path(server: SimpleNamespace, tmp_path: Path) -> None:
    found = asked(tmp_path, "config.json", "gone.json", HF_ENDPOINT=f"http://{server.at}/mirror/hf")
    assert found == [GOT, "LookupError owner/model has no gone.json"]
    assert f"GET {MODEL}main/config.json" in server.asked


def test_through_a_proxy(server: SimpleNamespace, closed: str, tmp_path: Path) -> None:
    """The hub's name need not resolve here; what NO_PROXY names isn't asked through it."""
    away = "http://hub.invalid:8080/mirror/hf"
    proxy = f"http://user:secret@{server.at}"
    assert asked(tmp_path / "a", HF_ENDPOINT=away, HTTP_PROXY=proxy) == [GOT]
    assert f"HEAD {away}/owner/model/resolve/main/config.json" in server.asked
    here = {"HF_ENDPOINT": f"http://{server.at}/mirror/hf", "HTTP_PROXY": f"http://{closed}"}
    assert asked(tmp_path / "b", **here, NO_PROXY="127.0.0.1") == [GOT]
    (refused,) = asked(tmp_path / "c", **here)
    assert refused.startswith(f"OSError http://{server.at}/mirror/hf can't be reached (")


def test_a_proxy_that_refuses(server: SimpleNamespace, tmp_path: Path) -> None:
    (refused,) = asked(
        tmp_path,
        HF_ENDPOINT="https://me:secret@hub.invalid:8443/x",
        HTTPS_PROXY=f"http://{server.at}",
    )
    assert server.asked == ["CONNECT hub.invalid:8443"]
    assert refused.startswith("OSError hub.invalid:8443/x can't be reached (403")
    assert refused.endswith("and config.json is not in the cache") and "secret" not in refused


@pytest.mark.parametrize("fault", ["closed", "silent", "gateway", "no scheme"])
def test_out_of_reach_is_soon_and_the_cache_serves(
    server: SimpleNamespace, closed: str, tmp_path: Path, fault: str
) -> None:
    at = f"http://{server.at}/mirror/hf"
    assert asked(tmp_path, HF_ENDPOINT=at) == [GOT]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server.status = 503
        endpoint = {
            "closed": f"http://{closed}/mirror/hf",
            "silent": f"http://127.0.0.1:{silent.getsockname()[1]}/mirror/hf",
            "gateway": at,
            "no scheme": f"{server.at}/mirror/hf",
        }[fault]
        began = time.monotonic()
        found = asked(tmp_path, "config.json", "new.json", "newer.json", HF_ENDPOINT=endpoint)
    assert time.monotonic() - began < 12  # one time limit, not one a file, nor the client's retries
    assert found[0] == GOT
    place = endpoint if "http" in endpoint else "127.0.0.1"
    for refused, file in zip(found[1:], ("new", "newer"), strict=True):
        assert refused.startswith(f"OSError {place}") and "can't be reached (" in refused
        assert refused.endswith(f", and {file}.json is not in the cache")


def test_what_is_no_hub_is_said_to_be_none(server: SimpleNamespace, tmp_path: Path) -> None:
    server.hub = False
    (refused,) = asked(tmp_path, HF_ENDPOINT=f"http://{server.at}/mirror/hf")
    assert "gave no answer that is a hub's (" in refused and "not in the cache" in refused


def test_offline_nothing_is_asked(server: SimpleNamespace, tmp_path: Path) -> None:
    at = {"HF_ENDPOINT": f"http://{server.at}/mirror/hf"}
    offline = {**at, "HF_HUB_OFFLINE": "1"}
    assert asked(tmp_path, **offline) == [
        "OSError HF_HUB_OFFLINE is set, and config.json is not in the cache"
    ]
    assert not server.asked
    assert asked(tmp_path, **at) == [GOT] and asked(tmp_path, **offline) == [GOT]


def test_a_tokenizers_commit_is_asked_of_the_mirror_and_soon_given_up(
    server: SimpleNamespace, closed: str, tmp_path: Path
) -> None:
    ask = "from tp_trainer.data.tokenizer import commit; print(commit('owner/model'))"
    at = {"HF_ENDPOINT": f"http://{server.at}/mirror/hf"}
    assert asked(tmp_path / "a", script=ask, **at) == [COMMIT]
    began = time.monotonic()
    assert asked(tmp_path / "b", script=ask, HF_ENDPOINT=f"http://{closed}/x") == ["None"]
    assert time.monotonic() - began < 12


def test_the_mirror_reaches_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    from tp_trainer.config.surroundings import Cluster
    from tp_trainer.driver.ray_cluster import environment_of

    monkeypatch.setenv("HF_ENDPOINT", "http://mirror:8080/hf")
    assert environment_of(Cluster())["HF_ENDPOINT"] == "http://mirror:8080/hf"
