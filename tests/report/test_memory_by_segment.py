"""Loss by segment of several readers of the same texts: sums and pairs by hand, the table and the picture."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_runs import exit_code, write_evaluation, write_run

from newllm.report.collect import collect
from newllm.report.memory import draw_segments, main, segment_table
from newllm.report.segments import Corpus, corpora_of


def write_reader(folder: Path, stack: list[str], nats: dict[str, list[list[float]]], **changes: Any) -> None:
    """A run that read two texts, of which one reaches the second segment; `nats` by reading and segment.

    In the first segment another text's memory was there for 20 targets of the second text.
    """
    of_other = [[0, 20], [20]]
    shapes = [("0", [3, 8], [10, 30]), ("1", [8], [20])]
    by_text = [
        {"segments": name, "texts": texts, "targets": targets}
        | {f"nats_{mode}": sums[place] for mode, sums in nats.items()}
        | ({"targets_other_memory": of_other[place]} if "other_memory" in nats else {})
        for place, (name, texts, targets) in enumerate(shapes)
    ]
    measured = {"by_text": by_text, "segment_length": 4, "state_bytes": 96, "memory_bytes": 32 * (len(nats) > 1)}
    data, of = changes.pop("kind", "bible"), changes.pop("of", {})
    config = {"layers": {"stack": stack, "memory_kernel": "elu"}, "data": {"kind": data}}
    write_run(folder, seed=changes.pop("seed", 0), config=config, data={"fingerprint": data}, **changes)
    write_evaluation(folder, {"memory": measured}, **of)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Attention alone and a memory with two seeds on one corpus, the memory alone on another, one run not measured."""
    memory = {
        "exact": [[10.0, 30.0], [20.0]],
        "memory_off": [[10.0, 30.0], [40.0]],
        "own_memory": [[0.0, 18.0], [20.0]],
        "other_memory": [[0.0, 20.0], [30]],
    }
    better = {
        "exact": [[10.0, 30.0], [16.0]],
        "memory_off": [[10.0, 30.0], [40.0]],
        "own_memory": [[0.0, 18.0], [16.0]],
        "other_memory": [[0.0, 20.0], [30]],
    }
    write_reader(tmp_path / "a", ["pythia", "pythia"], {"exact": [[10.0, 70.0], [28.0]]}, losses=(3.0,))
    write_reader(tmp_path / "b", ["infini", "pythia"], memory)
    write_reader(tmp_path / "c", ["infini", "pythia"], better, seed=1)
    write_reader(tmp_path / "d", ["infini", "pythia"], memory, kind="stdlib")
    write_run(tmp_path / "e", config={"layers": {"stack": ["pythia"]}})
    return tmp_path


def corpora(folder: Path) -> list[Corpus]:
    return corpora_of(collect([folder])[0])


def test_readers_of_the_same_texts_stand_together(folder: Path) -> None:
    found = corpora(folder)

    assert [(corpus.name, [reader.name for reader in corpus.readers]) for corpus in found] == [
        ("bible", ["infini + pythia, elu", "pythia"]),
        ("stdlib", ["infini + pythia, elu"]),
    ]
    assert [corpus.reference and corpus.reference.name for corpus in found] == ["pythia", None]


def test_losses_are_means_over_seeds_weighted_by_targets(folder: Path) -> None:
    memory = corpora(folder)[0].readers[0]

    first, second = memory.segments
    assert (first.loss("exact"), second.loss("exact"), second.loss("memory_off")) == (1.0, 0.9, 2.0)
    assert second.losses == [1.0, 0.8]
    assert second.more_than("memory_off") == (pytest.approx(1.1), None, None)


def test_another_texts_memory_is_compared_where_there_was_one(folder: Path) -> None:
    first = corpora(folder)[0].readers[0].segments[0]

    assert (first.loss("other_memory"), first.loss("own_memory")) == (1.0, 0.9)
    assert first.more_than("other_memory") == (pytest.approx(0.1), None, None)  # one text of two


def test_segments_in_which_nobody_had_written_say_nothing_of_another_memory(tmp_path: Path) -> None:
    nats = {mode: [[10.0, 30.0], [20.0]] for mode in ("exact", "memory_off", "own_memory", "other_memory")}
    write_reader(tmp_path / "a", ["infini", "pythia"], nats)
    file = tmp_path / "a" / "evaluation.json"
    measured = json.loads(file.read_text())
    measured["memory"]["by_text"][0] |= {"targets_other_memory": [0, 0]}
    file.write_text(json.dumps(measured))

    table = segment_table(corpora(tmp_path)[0])
    figure = draw_segments(corpora(tmp_path))

    told = [(row[table.columns.index("worth against another's")], row[-2]) for row in table.rows]
    assert told == [("-", "-"), ("+0.0000", "20")]
    assert [list(line.get_xdata()) for line in figure.axes[0].lines] == [["0", "1"], ["0", "1"], ["1"]]


def test_models_are_compared_text_by_text(folder: Path) -> None:
    memory, attention = corpora(folder)[0].readers

    mean, low, high = attention.segments[0].more_than("exact", memory.segments[0])

    assert mean == pytest.approx(1.0)  # 40 nats more over 40 targets
    assert (low, high) == (pytest.approx(0.0), pytest.approx(40 / 30))  # the first text twice, the second twice
    assert attention.paired(attention.segments[0], attention) is None


def test_table_tells_worth_gain_and_bytes(folder: Path) -> None:
    table = segment_table(corpora(folder)[0])

    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    late = rows[1]
    assert table.title == "bible, segments of 4 tokens"
    assert (late["layers"], late["segments"], late["texts"], late["loss"]) == (
        "infini + pythia, elu",
        "1",
        "1",
        "0.9000 +- 0.1414",
    )
    assert (late["worth against off"], late["worth against another's"], late["gain"]) == (
        "+1.1000",
        "+0.6000",
        "+0.5000",
    )
    assert (rows[3]["layers"], rows[3]["worth against off"], rows[3]["gain"]) == ("pythia", "-", "-")
    assert [row["on targets"] for row in rows] == ["20", "20", "-", "-"]
    assert (late["state bytes"], late["memory bytes"], rows[3]["memory bytes"]) == ("96", "32", "0")


def test_picture_shows_every_reading_and_difference(folder: Path) -> None:
    figure = draw_segments(corpora(folder))

    losses, worth, gain, *second = figure.axes
    assert len(second) == 3
    assert [list(map(float, line.get_ydata())) for line in losses.lines] == [
        [1.0, 0.9],
        [1.0, 2.0],
        [1.5],
        [2.0, 1.4],
    ]
    assert [label.get_text() for label in losses.get_legend().get_texts()] == [
        "infini + pythia, elu, 96 B",
        "pythia, 96 B",
    ]
    assert list(map(float, gain.lines[0].get_ydata())) == pytest.approx([1.0, 0.5])
    assert list(map(float, worth.lines[1].get_ydata())) == pytest.approx([0.1, 0.6])


def test_a_seed_measured_on_another_split_is_left_out_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nats = {"exact": [[1.0, 3.0], [2.0]], "memory_off": [[1.0, 3.0], [4.0]], "other_memory": [[1.0, 3.0], [3.0]]}
    write_reader(folder / "f", ["infini", "pythia"], nats, seed=2, of={"split": "test"})

    assert main([str(folder)]) == 0

    shown = capsys.readouterr()
    assert "0.9000 +- 0.1414" in shown.out
    assert f"left out: {folder / 'f'}" in shown.err
    assert f"Run: python evaluate.py run={folder / 'f'} 'evaluation=[memory]'" in shown.err


def test_seeds_that_read_different_texts_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "c" / "evaluation.json"
    found = json.loads(path.read_text())
    found["memory"]["by_text"] = found["memory"]["by_text"][:1]
    path.write_text(json.dumps(found))

    assert exit_code(main, [str(folder)]) == 2

    assert (
        f"{folder / 'c'}: evaluation=[memory] was measured on other texts than in {folder / 'b'}."
        in capsys.readouterr().err
    )


def test_the_command_writes_the_picture_and_says_what_is_missing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder)]) == 0
    assert (folder / "memory_by_segment.png").read_bytes().startswith(b"\x89PNG")
    assert "stdlib, segments of 4 tokens" in capsys.readouterr().out

    assert exit_code(main, [str(folder / "e")]) == 2
    assert "report: none of 1 run has finished with evaluation=[memory]" in capsys.readouterr().err
