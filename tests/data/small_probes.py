"""Small configurations of the recall probes, and their rows read by hand."""

from pathlib import Path
from typing import Any

from small_texts import shared_keys

from newllm.data.mqar import MqarConfig
from newllm.data.overwrite import OverwriteConfig
from newllm.data.passkey import PasskeyConfig
from newllm.data.prepared import NO_TARGET
from newllm.data.recall import Rows
from newllm.data.state_tracking import StateTrackingConfig

HERE = Path()  # probes cache nothing
DRAWN = {"num_samples": 12, "generator_seed": 3}


def mqar_config(**changes: Any) -> MqarConfig:
    own = {"kind": "mqar", "vocab_size": 20, "num_pairs": 3, "gap_power": 0.01, "filler": "random", "block_length": 17}
    return MqarConfig(**shared_keys(HERE, **(DRAWN | own | changes)))


def passkey_config(**changes: Any) -> PasskeyConfig:
    own = {"kind": "passkey", "vocab_size": 11, "passkey_length": 2, "segment_length": 4, "block_length": 19}
    return PasskeyConfig(**shared_keys(HERE, **(DRAWN | own | changes)))


def overwrite_config(**changes: Any) -> OverwriteConfig:
    own = {
        "kind": "overwrite",
        "vocab_size": 30,
        "num_pairs": 4,
        "num_rewritten": 2,
        "filler_length": 5,
        "filler": "random",
    }
    return OverwriteConfig(**shared_keys(HERE, **(DRAWN | own | {"block_length": 24} | changes)))


def tracking_config(**changes: Any) -> StateTrackingConfig:
    own = {"kind": "state_tracking", "group": "s3", "block_length": 13}
    return StateTrackingConfig(**shared_keys(HERE, **(DRAWN | own | changes)))


def asked(rows: Rows) -> list[tuple[list[int], int, int, dict[str, str]]]:
    """Return every question: its row, position, target and the names of its slice."""
    return [
        (row, position, label, rows.slice_names[rows.slices[number, position]])
        for number, row in enumerate(rows.inputs.tolist())
        for position, label in enumerate(rows.labels[number].tolist())
        if label != NO_TARGET
    ]


def last_value(row: list[int], position: int) -> tuple[int, int]:
    """Return what follows the last occurrence of the asked key before its question, and where that stands."""
    before = max(place for place in range(position) if row[place] == row[position])
    return row[before + 1], before + 1
