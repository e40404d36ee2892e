from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from small_texts import BYTES, delay_config, jsonl_config, prepared, write_jsonl
from torch import Tensor, nn

from newllm.config.compose import compose
from newllm.config.typed import real_config
from newllm.data.module import TextDataModule, build_data


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl")


def test_batches_are_what_all_models_expect(corpus: Path) -> None:
    data = prepared(corpus)

    for loader, size in ((data.train_dataloader(), 3), (data.val_dataloader(), 5), (data.test_dataloader(), 5)):
        batch = next(iter(loader))
        assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
            "input_ids": (size, 7),
            "labels": (size, 7),
            "sample_id": (size,),
            "starts_text": (size, 7),
        }


def test_validation_comes_in_order_and_whole(corpus: Path) -> None:
    data = prepared(corpus)

    ids = [sample_id for batch in data.val_dataloader() for sample_id in batch["sample_id"].tolist()]

    assert ids == list(range(data.num_validation_samples))
    assert len(ids) == data.facts["splits"]["validation"]["blocks"]


def test_preparing_twice_reads_once(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepared(corpus)
    first = data.prepared
    monkeypatch.setattr("newllm.data.jsonl.prepare", lambda *arguments: pytest.fail("the data were prepared twice"))

    data.prepare_data()
    data.setup("fit")

    assert data.prepared is first


def test_numbers_of_the_validation_text(corpus: Path) -> None:
    data = prepared(corpus)

    labels = torch.cat([batch["labels"].flatten() for batch in data.val_dataloader()])
    assert data.token_bytes.dtype == torch.int64
    assert int(data.token_bytes[labels].sum()) == data.facts["splits"]["validation"]["bytes"]
    bits = data.compression_bits_per_byte()
    assert bits is not None
    assert 0 < bits["xz"] < 8
    assert 0 < bits["zstd"] < 8


def test_a_test_split_without_a_block_is_refused_when_asked_for(corpus: Path) -> None:
    data = prepared(corpus, test_share=0.0)

    assert data.num_test_samples == 0
    with pytest.raises(ValueError, match=r"data.test_share=0.0: the test text gives no block"):
        data.test_dataloader()


def test_a_checkpoint_of_other_data_is_refused(corpus: Path) -> None:
    data = prepared(corpus)
    state = data.state_dict()

    data.load_state_dict(state)
    with pytest.raises(ValueError, match=r"resume: the data have fingerprint \w{12}, the checkpoint's had"):
        prepared(corpus, max_train_blocks=4).load_state_dict(state)


def test_delays_are_declared_not_to_be_next_tokens(corpus: Path, tmp_path: Path) -> None:
    delays = TextDataModule(delay_config(tmp_path), BYTES, seed=0)
    delays.prepare()

    assert not delays.targets_are_next_tokens
    assert delays.tokenizer is None
    assert delays.compression_bits_per_byte() is None
    assert prepared(corpus).targets_are_next_tokens


class Sum(LightningModule):
    """One weight whose value depends on every token and on the order in which they came."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        self.seen.append(batch["sample_id"].tolist())
        return (self.weight * batch["input_ids"].double().mean()).sin().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(corpus: Path, folder: Path, max_steps: int, resume: Path | None = None) -> tuple[Sum, Path]:
    """Train to a step, as one session of the program, and return the checkpoint of its last step."""
    data = TextDataModule(jsonl_config(corpus, max_train_blocks=20, num_workers=2), BYTES, seed=4)
    keep_all = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        accumulate_grad_batches=2,
        callbacks=[keep_all],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Sum()
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module, folder / f"step={max_steps}.ckpt"


# 7 batches, 4 optimizer steps an epoch: inside the first, at its end, after the second
@pytest.mark.parametrize("stops", [(3, 5), (4, 6), (2, 8)])
@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_at_the_exact_batch_twice(corpus: Path, tmp_path: Path, stops: tuple[int, int]) -> None:
    straight, _ = fit(corpus, tmp_path / "straight", 14)

    first, checkpoint = fit(corpus, tmp_path / "one", stops[0])
    second, checkpoint = fit(corpus, tmp_path / "two", stops[1], checkpoint)
    third, _ = fit(corpus, tmp_path / "three", 14, checkpoint)

    assert first.seen + second.seen + third.seen == straight.seen
    assert torch.equal(third.weight, straight.weight)


def test_more_samples_than_memory_are_refused() -> None:
    module = build_data(real_config(compose(["data=passkey", "data.num_samples=1000000000000"])))

    with pytest.raises(ValueError, match=r"^data: its samples do not fit into memory \("):
        module.prepare()
