"""The data of a run, as Lightning and everything else asks for it."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor

from newllm.config.schema import DataConfig, TokenizerConfig, TrainConfig
from newllm.data.compression import compressed_bits_per_byte
from newllm.data.lanes import LaneBatches, TextBlocks, in_lanes
from newllm.data.loader import EpochBatches, PositionLoader, make_loader
from newllm.data.positions import PositionReading, positions_of
from newllm.data.prepared import PreparedData, Samples
from newllm.data.streamed_blocks import StreamedBlocks, StreamLoader, TextStream, make_stream_loader
from newllm.data.tokenizer import Tokenizer
from newllm.data.tokenizer_kinds import saved_tokenizer


class TextDataModule(LightningDataModule):
    """Loaders of one source, and the facts about it. Everything but prepare() needs prepare() to have run.

    Args:
        data: the source; newllm/data/<kind>.py prepares it.
        tokenizer: how its text becomes ids.
        seed: of the order of training samples.
        in_lanes: texts follow each other in lanes, one per row of a batch (see newllm/data/lanes.py).
    """

    def __init__(self, data: DataConfig, tokenizer: TokenizerConfig, *, seed: int, in_lanes: bool = False) -> None:
        super().__init__()
        self.data_config = data
        self.tokenizer_config = tokenizer
        self.seed = seed
        self.in_lanes = in_lanes
        self.positions: PositionReading | None = None
        self._prepared: PreparedData | None = None
        self._read: dict[str, Any] = {}  # of a streamed corpus, up to the last checkpoint

    def prepare(self) -> None:
        """Read, tokenise or open the cache; the second call does nothing.

        Raises:
            ValueError: whatever is wrong with the data, in words for the user.
        """
        if self._prepared is None:
            source = importlib.import_module(f"newllm.data.{self.data_config.kind}")
            try:
                prepared = source.prepare(self.data_config, self.tokenizer_config)
            except MemoryError as error:
                raise ValueError(
                    f"data: its samples do not fit into memory ({error}). Allowed: what fits. Lower data.block_length or their number."
                ) from None
            self._prepared = in_lanes(prepared, num_lanes=self.data_config.batch_size) if self.in_lanes else prepared

    def prepare_data(self) -> None:
        self.prepare()

    def setup(self, stage: str | None = None) -> None:
        self.prepare()

    @property
    def prepared(self) -> PreparedData:
        assert self._prepared is not None, "the data are asked for something before prepare() was called"
        return self._prepared

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None where samples are generated as ids."""
        return self.prepared.tokenizer

    @property
    def vocab_size(self) -> int:
        return self.prepared.vocab_size

    @property
    def token_bytes(self) -> Tensor:
        """UTF-8 bytes of each token [V], int64; 0 for EOS, where there is no text and where tokens do not spell it."""
        return torch.from_numpy(self.prepared.token_bytes)

    @property
    def targets_are_next_tokens(self) -> bool:
        """False where a label is another token than the one after its input."""
        return self.prepared.targets_are_next_tokens

    @property
    def num_train_samples(self) -> int:
        return len(self.prepared.train)

    @property
    def num_validation_samples(self) -> int:
        return len(self.prepared.validation)

    @property
    def num_test_samples(self) -> int:
        return len(self.prepared.test)

    @property
    def train_document_hashes(self) -> frozenset[str]:
        return self.prepared.train_document_hashes

    @property
    def validation_document_hashes(self) -> frozenset[str]:
        return self.prepared.validation_document_hashes

    @property
    def fingerprint(self) -> str:
        """Hash of all samples; equal fingerprints mean equal batches."""
        return self.prepared.fingerprint

    @property
    def facts(self) -> dict[str, Any]:
        """What run.json records of the data."""
        read = {} if self.prepared.stream is None else {"read": self._read}
        return {**self.prepared.facts, "fingerprint": self.fingerprint, **read}

    def compression_bits_per_byte(self) -> dict[str, float] | None:
        """Return bits per byte of the validation text after `xz` (-9e) and `zstd` (-19); None where tokens spell none."""
        text = self.prepared.validation_text
        return None if text is None else compressed_bits_per_byte(text())

    def read_positions(self, reading: PositionReading) -> None:
        """Give training the single positions of the text instead of its blocks."""
        self.positions = reading

    def validate_on(self, samples: Samples) -> None:
        """Give validation some of its samples only; the facts stay those of all that was prepared."""
        self._prepared = dataclasses.replace(self.prepared, validation=samples)

    def train_dataloader(self) -> PositionLoader | StreamLoader:
        if self.positions is None:
            return self.block_dataloader()
        return self._position_loader(self.prepared.train, self.positions, shuffle=self.positions.shuffle)

    def block_dataloader(self) -> PositionLoader | StreamLoader:
        """Return the loader of the training blocks, also where training reads positions."""
        config = self.data_config
        if self.prepared.stream is not None:
            return self._stream_loader(self.prepared.stream)
        return self._loader(
            self.prepared.train,
            config.batch_size,
            num_workers=config.num_workers,
            seed=self.seed,
            shuffle=config.shuffle,
        )

    def val_dataloader(self) -> PositionLoader:
        if self.positions is not None and self.positions.held_out:
            return self._position_loader(self.prepared.validation, self.positions, shuffle=False)
        return self._held_out_loader(self.prepared.validation)

    def test_dataloader(self) -> PositionLoader:
        """Return the loader of the test split.

        Raises:
            ValueError: the test text is shorter than a block.
        """
        if self.num_test_samples == 0:
            raise ValueError(
                f"data.test_share={self.data_config.test_share}: the test text gives no block. "
                "Allowed: a share that holds at least one. Raise data.test_share or give more text."
            )
        return self._held_out_loader(self.prepared.test)

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.require_same(state_dict["fingerprint"])

    def require_same(self, fingerprint: str) -> None:
        """Refuse to continue on other data than the run's so far.

        Raises:
            ValueError: the samples are not those that were trained on.
        """
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"resume: the data have fingerprint {self.fingerprint[:12]}, the checkpoint's had "
                f"{fingerprint[:12]}. Allowed: the same texts and tokenizer. Restore them or start anew."
            )

    def _held_out_loader(self, samples: Samples) -> PositionLoader:
        # In the main process: to fetch these few batches costs less than to start loader processes for them.
        return self._loader(samples, self.data_config.eval_batch_size, num_workers=0, seed=self.seed, shuffle=False)

    def _position_loader(self, samples: Samples, reading: PositionReading, *, shuffle: bool) -> PositionLoader:
        positions = positions_of(
            samples, num_input_tokens=reading.num_input_tokens, reset_at_text=reading.reset_at_text
        )
        workers = self.data_config.num_workers if samples is self.prepared.train else 0
        return self._loader(positions, reading.batch_size, num_workers=workers, seed=self.seed, shuffle=shuffle)

    def _stream_loader(self, text: TextStream) -> StreamLoader:
        config = self.data_config
        ranks: dict[str, int] = {}
        if self.trainer is not None:
            ranks = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        rows, rest = divmod(config.batch_size, ranks.get("world_size", 1))
        if rest:
            raise ValueError(
                f"data.batch_size={config.batch_size}: does not divide among runtime.devices={ranks['world_size']}. "
                f"Allowed when streaming: multiples of {ranks['world_size']}. Change one of them."
            )
        blocks = StreamedBlocks(text, rows, seed=self.seed, shuffle=config.shuffle, **ranks)
        loader = make_stream_loader(blocks, num_workers=config.num_workers, pin_memory=torch.cuda.is_available())
        self._read = loader.read  # not the loader: its processes end with it
        return loader

    def _loader(
        self, samples: Samples, batch_size: int, *, num_workers: int, seed: int, shuffle: bool
    ) -> PositionLoader:
        ranks: dict[str, Any] = {"is_held_out": samples is not self.prepared.train}
        if self.trainer is not None:
            ranks |= {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        batches: EpochBatches
        if self.in_lanes:
            assert isinstance(samples, TextBlocks), "in_lanes has cut the texts"
            batches = LaneBatches(samples, batch_size, seed=seed, shuffle=shuffle, **ranks)
        else:
            batches = EpochBatches(len(samples), batch_size, seed=seed, shuffle=shuffle, **ranks)
        return make_loader(samples, batches, num_workers=num_workers, pin_memory=torch.cuda.is_available())


def build_data(
    config: TrainConfig, *, tokenizer_file: Path | None = None, in_lanes: bool | None = None
) -> TextDataModule:
    """Return the data module of a run, not yet prepared.

    Args:
        config: of the run.
        tokenizer_file: tokenizer.json that the run has saved; a resumed or evaluated run reads its text with that one,
            whatever has become of the cache. None where the run has none yet, or needs none.
        in_lanes: texts follow each other in lanes; None: as the trainer reads them.
    """
    tokenizer = config.tokenizer if tokenizer_file is None else saved_tokenizer(config.tokenizer, tokenizer_file)
    chosen = config.trainer.reads_in_lanes if in_lanes is None else in_lanes
    return TextDataModule(config.data, tokenizer, seed=config.seed, in_lanes=chosen)
