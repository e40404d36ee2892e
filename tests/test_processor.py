"""What the system tells of a processor, in the words of several makers."""

from pathlib import Path

import pytest

from newllm import processor


@pytest.mark.parametrize(
    ("brand", "name"),
    [
        ("Intel(R) Xeon(R) Processor", "Intel Xeon"),
        ("Intel(R) Core(TM) i7-8700 CPU @ 3.20GHz", "Intel Core i7-8700"),
        ("AMD EPYC 9B45 128-Core Processor", "AMD EPYC 9B45"),
    ],
)
def test_a_processor_is_named_in_a_word_or_two(
    brand: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: Maker\nmodel name\t: {brand}\nflags\t\t: avx512f amx_bf16\n")
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "cpuinfo")

    assert processor.name() == name
    assert processor.multiplies_bf16()
    assert processor.zen_generation() == 0


@pytest.mark.parametrize(
    ("family", "flags", "name"),
    [
        (26, "avx512f", "AMD EPYC (Zen 5)"),
        (25, "avx512f", "AMD EPYC (Zen 4)"),
        (25, "avx2", "AMD EPYC (Zen 3)"),
        (23, "avx2", "AMD EPYC"),
    ],
)
def test_a_processor_whose_model_is_not_told_is_named_by_its_generation(
    family: int, flags: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = f"vendor_id\t: AuthenticAMD\ncpu family\t: {family}\nmodel name\t: AMD EPYC\nflags\t\t: {flags}\n"
    (tmp_path / "cpuinfo").write_text(told)
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "cpuinfo")

    assert processor.name() == name


@pytest.mark.parametrize("told", ["", "processor\t: 0\nFeatures\t: fp asimd\n"])
def test_a_system_that_tells_no_brand_still_names_something(
    told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(told)
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(processor.platform, "processor", lambda: "")
    monkeypatch.setattr(processor.platform, "machine", lambda: "aarch64")

    assert processor.name() == "aarch64"
