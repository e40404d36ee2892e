import inspect
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from small_texts import BYTES, jsonl_config, shared_keys

from newllm.data import stdlib
from newllm.data.bible import BibleConfig, read_books
from newllm.data.document import Document, Source, read_source
from newllm.data.module import TextDataModule
from newllm.data.stdlib import StdlibConfig, module_files, module_name, read_modules


def test_the_bible_has_66_books_that_begin_where_they_should() -> None:
    books = {document.id: document.text for document in read_books(Counter())}

    assert len(books) == 66
    assert books["bible/Genesis"].startswith("In the beginning God created the heavens and the earth.")
    assert books["bible/Exodus"].startswith("Now these are the names of the sons of Israel")
    assert books["bible/Revelation"].endswith("Amen.")
    assert sum(len(text) for text in books.values()) > 4_050_000


def test_the_bible_becomes_blocks(tmp_path: Path) -> None:
    config = BibleConfig(kind="bible", validation="0:1", **shared_keys(tmp_path, block_length=64))
    data = TextDataModule(config, BYTES, seed=0)

    data.prepare()

    assert data.facts["validation_documents"] == ["bible/Genesis"]
    assert bytes(data.prepared.validation.__getitems__([0])["labels"][0].tolist()).startswith(b"n the beginning God")
    assert data.facts["skipped"] == {}


def test_other_code_that_reads_the_documents_makes_another_cache(tmp_path: Path, monkeypatch) -> None:
    def poems(number, skipped):
        yield Document("verse " * number, "poem", "poems")

    source = Source("poems", {}, partial(poems, 3))
    before = source.key
    changed = tmp_path / "changed.py"
    changed.write_text("other code")
    monkeypatch.setattr(inspect, "getfile", lambda function: changed if function is poems else "")

    assert source.key != before


def make_library(folder: Path) -> Path:
    files = {
        "json/__init__.py": b"one",
        "json/decoder.py": b"# -*- coding: latin-1 -*-\n# \xe9t\xe9",
        "test/test_json.py": b"a test",
        "site-packages/other.py": b"installed",
        "broken.py": b"# \xff\xfe",
        "os.py": b"two",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_library_gives_its_modules_decoded_as_they_declare(tmp_path: Path) -> None:
    skipped: Counter[str] = Counter()

    documents = {document.id: document.text for document in read_modules(make_library(tmp_path), skipped)}

    assert documents == {
        "stdlib/json": "one",
        "stdlib/json.decoder": "# -*- coding: latin-1 -*-\n# \u00e9t\u00e9",
        "stdlib/os": "two",
    }
    assert skipped == {"not decodable": 1}


def test_a_folder_called_test_above_the_library_leaves_nothing_out(tmp_path: Path) -> None:
    library = make_library(tmp_path / "test" / "lib")

    assert module_name(library / "json" / "__init__.py", library) == "json"
    assert len(module_files(library)) == 4


def test_the_library_becomes_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(make_library(tmp_path / "lib")))
    config = StdlibConfig(kind="stdlib", validation="1:2", **shared_keys(tmp_path, block_length=2, test_share=0.0))
    data = TextDataModule(config, BYTES, seed=0)

    data.prepare()

    assert data.facts["validation_documents"] == ["stdlib/json.decoder"]
    assert data.facts["skipped"] == {"not decodable": 1}


def test_a_source_of_files_asks_for_its_path(tmp_path: Path) -> None:
    config = jsonl_config(tmp_path, path=None)

    assert config.check(None) == [  # type: ignore[arg-type]
        "data.path=null: is not given. Allowed: a file, folder or pattern. Set data.path=<path>."
    ]
    assert jsonl_config(tmp_path).check(None) == []  # type: ignore[arg-type]


def test_files_of_other_types_are_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.pdf"):
        (tmp_path / name).write_text(f"the text of {name}")
    data = TextDataModule(jsonl_config(tmp_path, block_length=2, test_share=0.0), BYTES, seed=0)

    data.prepare()

    assert data.facts["skipped"] == {"file of another type": 1}


def test_reading_the_real_library_skips_nothing_unsaid() -> None:
    folder = Path(stdlib.sysconfig.get_path("stdlib"))
    source = stdlib.Source("stdlib", {}, lambda skipped: read_modules(folder, skipped))

    reading = read_source(source)

    assert len(reading.documents) + sum(reading.skipped.values()) == len(module_files(folder))
    assert len(reading.documents) > 300
