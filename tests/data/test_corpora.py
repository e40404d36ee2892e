"""The Pile, UltraChat and chats, from clones of their repositories, local files, a package, and a hub that refuses."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from huggingface_hub import constants
from small_texts import BYTES, sentences, shared_keys, streaming_keys

from newllm.config.schema import DataConfig
from newllm.data.hub_corpus import HubSplit
from newllm.data.messages import messages_form
from newllm.data.module import TextDataModule
from newllm.data.pile import PileConfig, pile_form
from newllm.data.ultrachat import UltrachatConfig

LIMIT_SECONDS = 10.0
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"


def pile_lines(count: int) -> bytes:
    records = [
        {"text": sentences(seed), "meta": {"pile_set_name": "ArXiv" if seed % 2 else "Books3"}} for seed in range(count)
    ]
    return "".join(json.dumps(record) + "\n" for record in [*records, {"text": "short", "meta": {}}]).encode()


def dialogue(seed: int) -> dict[str, Any]:
    turns = [
        {"role": role, "content": sentences(seed * 10 + turn, 20)} for turn, role in enumerate(("user", "assistant"))
    ]
    return {"prompt": turns[0]["content"], "prompt_id": str(seed), "messages": turns}


@pytest.fixture
def pile_clone(tmp_path: Path) -> Path:
    folder = tmp_path / "pile"
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "00.jsonl.zst").write_bytes(zstandard.compress(pile_lines(20)))
    return folder


@pytest.fixture
def ultrachat_clone(tmp_path: Path) -> Path:
    folder = tmp_path / "ultrachat"
    (folder / "data").mkdir(parents=True)
    for first, name in ((0, "train_sft"), (100, "test_sft")):
        table = pyarrow.Table.from_pylist([dialogue(first + number) for number in range(12)])
        pyarrow.parquet.write_table(table, folder / "data" / f"{name}-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train_sft\n    path: data/train_sft-*\n"
        "  - split: test_sft\n    path: data/test_sft-*\n---\n"
    )
    return folder


def pile_config(folder: Path, **changes: Any) -> PileConfig:
    own = {"kind": "pile", "repository": "owner/name", "revision": "main", "path": None, "max_documents": None}
    own |= {"min_characters": 100, "validation": None, "max_validation_blocks": 9, **streaming_keys()}
    return PileConfig(**shared_keys(folder, **(own | changes)))


def ultrachat_config(folder: Path, **changes: Any) -> UltrachatConfig:
    own = {"kind": "ultrachat", "repository": "owner/name", "revision": "main", "split": "train_sft", "path": None}
    own |= {"max_documents": None, "format": "chat_template", "chat_template": TEMPLATE, "validation": None}
    return UltrachatConfig(**shared_keys(folder, **(own | {"max_validation_blocks": 9, **streaming_keys()} | changes)))


def facts(config: DataConfig) -> dict[str, Any]:
    module = TextDataModule(config, BYTES, seed=0)
    module.prepare()
    return module.facts


@pytest.mark.parametrize("streaming", [False, True])
def test_the_pile_of_a_clone_gives_long_texts_and_their_parts(
    pile_clone: Path, tmp_path: Path, streaming: bool
) -> None:
    config = pile_config(tmp_path, repository=str(pile_clone), streaming=streaming, sample_characters=10**6)

    found = facts(config)

    assert found["skipped"] == {"shorter than 100 characters": 1}
    assert set(found["parts"]) == {"ArXiv", "Books3"}


@pytest.mark.parametrize("name", ["pile.jsonl", "pile.jsonl.zst"])
def test_local_files_of_the_piles_form_are_read(tmp_path: Path, name: str) -> None:
    content = pile_lines(20)
    (tmp_path / name).write_bytes(zstandard.compress(content) if name.endswith("zst") else content)

    found = facts(pile_config(tmp_path, path=str(tmp_path / name), max_documents=15))

    assert found["skipped"] == {}
    assert found["parts"] == {"ArXiv": 7, "Books3": 8}
    assert sum(split["documents"] + split["documents_left_out"] for split in found["splits"].values()) == 15


@pytest.mark.parametrize("streaming", [False, True])
def test_ultrachat_validates_on_its_own_held_out_split(ultrachat_clone: Path, tmp_path: Path, streaming: bool) -> None:
    config = ultrachat_config(
        tmp_path,
        repository=str(ultrachat_clone),
        streaming=streaming,
        validation="test_sft",
        max_validation_blocks=None,
    )
    config = config if not streaming else ultrachat_config(tmp_path, repository=str(ultrachat_clone), streaming=True)

    found = facts(config)

    assert all("/test_sft:" in name for name in found["validation_documents"])
    assert "test_sft" in found["split_rule"]


def test_local_dialogues_are_held_out_by_range(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps(dialogue(seed)) for seed in range(12)))

    found = facts(ultrachat_config(tmp_path, path=str(path), validation="4:6", max_validation_blocks=None))

    assert sorted(found["validation_documents"]) == ["chat.jsonl:5", "chat.jsonl:6"]
    with pytest.raises(ValueError, match=r"data.validation=50000:50020: .* source's 12 allow"):
        facts(ultrachat_config(tmp_path, path=str(path), validation="50000:50020"))
    with pytest.raises(ValueError, match=r"data.validation=test_sft: is a split of owner/name, and data.path="):
        facts(ultrachat_config(tmp_path, path=str(path), validation="test_sft"))


def test_a_split_that_does_not_exist_is_named(ultrachat_clone: Path) -> None:
    with pytest.raises(ValueError, match=r"has no split train. Allowed: test_sft, train_sft"):
        HubSplit(str(ultrachat_clone), "main", "train", pile_form(), "ultrachat").stream()


def test_dialogues_are_written_as_asked() -> None:
    messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]

    written = {
        name: messages_form(name, TEMPLATE).read({"messages": messages}, "x") for name in ("plain", "chat_template")
    }

    assert written == {"plain": "Hello?\nYes.", "chat_template": "<|user|>\nHello?\n<|assistant|>\nYes.\n"}


@pytest.mark.parametrize("messages", [None, [], "text", [{"role": "user"}], [{"role": "user", "content": None}]])
def test_a_record_without_a_dialogue_is_named(messages: Any) -> None:
    with pytest.raises(ValueError, match=r"a.jsonl line 3: has no dialogue of roles and contents"):
        messages_form("plain", "").read({"messages": messages}, "a.jsonl line 3")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", r"data.chat_template: cannot be rendered \("),
        ("{{ messages[0].content }}", r"data.chat_template: leaves the content of a message out"),
    ],
)
def test_a_template_that_does_not_serve_is_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        messages_form("chat_template", template)


class Hub(BaseHTTPRequestHandler):
    """Lists a data set's files and refuses them, as the hub does with gated ones."""

    def do_GET(self) -> None:
        body = json.dumps({"id": "owner/name", "sha": "0" * 40, "siblings": [{"rfilename": "train.jsonl"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.send_response(403)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


class Silent(Hub):
    """Takes a question and does not answer it in time."""

    def do_GET(self) -> None:
        time.sleep(LIMIT_SECONDS + 5)


@pytest.fixture
def _hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), request.param)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()


@pytest.mark.usefixtures("_hub")
@pytest.mark.parametrize(
    ("_hub", "reason"),
    [
        (Hub, r"HTTP 403, it is gated or private: log in"),
        pytest.param(Silent, r"timed out|no answer within", marks=pytest.mark.slow),
    ],
    indirect=["_hub"],
)
def test_a_hub_that_does_not_give_the_data_is_told_within_ten_seconds(tmp_path: Path, reason: str) -> None:
    start = time.monotonic()

    with pytest.raises(ValueError, match=rf"data=pile: owner/name is not to be had from the hub \(.*({reason})"):
        facts(pile_config(tmp_path))

    assert time.monotonic() - start < LIMIT_SECONDS


def test_offline_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(
        ValueError, match=r"data=pile: .* \(HF_HUB_OFFLINE is set\). Allowed without a network: data.path="
    ):
        facts(pile_config(tmp_path))


def test_conversations_of_the_package_are_dialogues() -> None:
    from newllm.data.chat import data_folder, read_conversations

    skipped: Counter[str] = Counter()
    form = messages_form("chat_template", TEMPLATE)

    documents = list(read_conversations(data_folder("english"), form, skipped))

    assert len(documents) > 2000
    assert documents[0].text.startswith("<|user|>\nWhat is AI?\n<|assistant|>\nArtificial Intelligence is")
    assert skipped == {"conversation without an answer": 1}
    with pytest.raises(ValueError, match=r"data.language=klingon: has no conversations. Allowed: .*english"):
        data_folder("klingon")
