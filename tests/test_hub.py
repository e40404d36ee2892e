import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from newllm import hub
from newllm.config.schema import TokenizerConfig
from newllm.data.tokenizer_kinds import ready_tokenizer
from newllm.hub import ask, fetch_file

LIMIT_SECONDS = 10.0
PYTHIA = TokenizerConfig(kind="pythia", vocab_size=50304, path=None)


class Refusing(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(403)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def refusing_server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def silent_address() -> Iterator[str]:
    with socket.socket() as listener:  # accepts, never answers
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def _empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("_empty_hub_cache")
def test_an_unreachable_hub_is_told_within_ten_seconds(silent_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", silent_address)
    start = time.monotonic()

    with pytest.raises(
        ValueError, match=r"tokenizer=pythia: .* nor to be had from the hub \((timed out|no answer).*tokenizer=bytes"
    ):
        ready_tokenizer(PYTHIA)

    assert time.monotonic() - start < LIMIT_SECONDS


@pytest.mark.usefixtures("_empty_hub_cache")
def test_offline_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "ask", lambda url: pytest.fail("the hub was asked"))

    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set"):
        ready_tokenizer(PYTHIA)


@pytest.mark.usefixtures("_empty_hub_cache")
def test_a_gated_file_is_told_within_ten_seconds(refusing_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", refusing_server)
    start = time.monotonic()

    with pytest.raises(ValueError, match=r"tokenizer=gpt2: .* \(HTTP 403, it is gated or private"):
        fetch_file("owner/name", "tokenizer.json", key="tokenizer=gpt2")

    assert time.monotonic() - start < LIMIT_SECONDS


def test_a_host_that_does_not_exist_is_a_reason() -> None:
    assert ask("http://hub.invalid") is not None


def test_a_file_in_the_local_cache_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_text("{}")
    references = tmp_path / "models--owner--name" / "refs"
    references.mkdir()
    (references / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "ask", lambda url: pytest.fail("the hub was asked"))

    assert fetch_file("owner/name", "tokenizer.json", key="tokenizer=gpt2") == snapshot / "tokenizer.json"
