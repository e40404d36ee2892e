"""`python -m newllm.report.memory <folders>`: loss by segment of whole texts, with memory, without it and with another text's."""

import sys
from collections.abc import Iterator, Sequence
from math import exp

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from newllm.config.command_line import refuse as refuse_all
from newllm.report.command import keep, measured_runs, parser_of, readable_runs, refuse_unmeasured, show
from newllm.report.segments import Corpus, Reader, Segments, corpora_of
from newllm.report.style import COLOURS, FAINT, new_figure, styled, tidy
from newllm.report.tables import NONE, Table, number, spread, with_interval

STYLES = {"exact": "-", "memory_off": "--", "other_memory": ":"}
WORDS = {"exact": "on", "memory_off": "off", "other_memory": "another text's"}
NOTE = (
    "Losses in nats per token, mean +- standard deviation over seeds. Differences are paired by text, means over seeds, with the 95 % "
    "interval of resampled texts. worth: loss without memory, or with another text's, minus loss with it, on the same targets: for the "
    "first ones no other text had written anything yet. gain: loss of {reference} minus loss of this one. Bytes: what a text carries "
    "from block to block."
)
Difference = tuple[float, float | None, float | None]


def segment_table(corpus: Corpus) -> Table:
    """One row for each configuration and group of segments."""
    reference = corpus.reference
    rows = [
        [
            *(reader.group.letter, reader.name, number(reader.state_bytes), number(reader.memory_bytes)),
            *(segments.name, str(len(segments.texts)), number(segments.targets.sum())),
            *(spread(segments.losses), number(exp(min(segments.loss("exact"), 700)))),
            *_shown_differences(reader, segments, reference),
        ]
        for reader in corpus.readers
        for segments in reader.segments
    ]
    size = sorted({reader.segment_length for reader in corpus.readers})
    columns = ["", "layers", "state bytes", "memory bytes", "segments", "texts", "targets", "loss", "perplexity"]
    columns += ["worth against off", "worth against another's", "on targets", "gain"]
    title = f"{corpus.name}, segments of {', '.join(map(str, size))} tokens"
    note = NOTE.format(reference="attention alone" if reference is None else reference.name)
    return Table(title, columns, rows, note, frozenset((0, 1, 4)))


def _differences(reader: Reader, segments: Segments, reference: Reader | None) -> Iterator[Difference | None]:
    """Worth against memory off and another text's, gain over the reference; None where one does not apply."""
    for mode in ("memory_off", "other_memory"):
        yield segments.more_than(mode) if mode in segments.nats else None
    theirs = reader.paired(segments, reference)
    yield None if theirs is None else theirs.more_than("exact", segments)


def _shown_differences(reader: Reader, segments: Segments, reference: Reader | None) -> list[str]:
    """The differences, and of how many targets that against another text's memory is."""
    off, other, gain = map(_shown, _differences(reader, segments, reference))
    return [off, other, NONE if other == NONE else number(segments.targets_of_other.sum()), gain]


def _shown(difference: Difference | None) -> str:
    if difference is None:
        return NONE
    return with_interval(*difference, sign="+")


def draw_segments(corpora: Sequence[Corpus]) -> Figure:
    """Draw for each corpus the losses by segment, what the memories are worth, and what they gain over attention alone.

    Args:
        corpora: at least one.
    """
    with styled():
        figure = new_figure(15.0, 0.4 + 3.9 * len(corpora))
        for row, corpus in enumerate(corpora):
            panels = [figure.add_subplot(len(corpora), 3, 3 * row + column + 1) for column in range(3)]
            named = "attention alone" if corpus.reference is None else corpus.reference.name
            titles = ("loss: memory on -, off - -, another text's ..", "worth: loss off - -, another's .. minus on")
            for axes, title in zip(panels, (*titles, f"gain: loss of {named} minus loss"), strict=True):
                tidy(axes, f"{corpus.name}: {title}")
                axes.set_xlabel("segment of the text")
                axes.set_ylabel("nats per token")
                axes.tick_params(axis="x", labelrotation=30)  # names of many segments side by side
            for place, reader in enumerate(corpus.readers):
                _draw_reader(panels, reader, corpus.reference, COLOURS[place % len(COLOURS)])
            panels[0].legend()
            for axes in panels[1:]:
                axes.axhline(0, color=FAINT, linewidth=0.9)
        return figure


def _draw_reader(panels: Sequence[Axes], reader: Reader, reference: Reader | None, colour: str) -> None:
    losses, worth, gain = panels
    names = [segments.name for segments in reader.segments]
    for mode, style in STYLES.items():
        # Lines of one panel are of the same targets: another text's memory is missing where it was not there for all.
        measured = [segments for segments in reader.segments if mode in segments.nats and segments.is_whole(mode)]
        label = f"{reader.name}, {number(reader.state_bytes)} B" if mode == "exact" else None
        if measured:
            values = [segments.loss(mode) for segments in measured]
            places = [segments.name for segments in measured]
            losses.plot(places, values, color=colour, linestyle=style, marker=".", label=label)
    columns = list(zip(*(_differences(reader, segments, reference) for segments in reader.segments), strict=True))
    for axes, mode, differences in zip((worth, worth, gain), (*list(STYLES)[1:], "exact"), columns, strict=True):
        _draw_differences(axes, names, differences, colour, STYLES[mode])


def _draw_differences(
    axes: Axes, names: Sequence[str], differences: Sequence[Difference | None], colour: str, style: str
) -> None:
    """A line with its intervals, where there are any."""
    known = [(name, *found) for name, found in zip(names, differences, strict=True) if found is not None]
    if not known:
        return
    axes.plot([name for name, *_ in known], [mean for _, mean, *_ in known], color=colour, linestyle=style, marker=".")
    within = [(name, low, high) for name, _, low, high in known if low is not None and high is not None]
    axes.vlines(
        [name for name, *_ in within],
        [low for _, low, _ in within],
        [high for *_, high in within],
        color=colour,
        alpha=0.4,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 when the picture is written, 2 when there is nothing to tell."""
    given = parser_of("memory", __doc__, picture="memory_by_segment.png").parse_args(arguments)
    runs = readable_runs(given.folders)
    try:
        corpora = corpora_of(measured_runs(runs, "memory"))
    except ValueError as error:
        refuse_all([str(error)])
    if not corpora:
        refuse_unmeasured(runs, "memory")
    show(map(segment_table, corpora))
    keep(draw_segments(corpora), given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
