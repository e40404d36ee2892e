"""Peak arithmetic speed of known devices, for model FLOPs utilisation."""

# Dense matrix FLOPs per second from the vendors' data sheets: in bf16 or fp16 on tensor cores, and in fp32 without them
# (torch's default precision of float32 products). The longer name comes first where one contains the other.
PEAK_FLOPS = {
    "B200": (2250e12, 80e12),
    "GH200": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "A10G": (70e12, 35e12),
    "A10": (125e12, 31.2e12),
    "A40": (149.7e12, 37.4e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "V100": (125e12, 15.7e12),
    "T4": (65e12, 8.1e12),
    "RTX 4090": (165.2e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}
SLOWER_OR_FASTER = frozenset(("D", "Laptop", "MIG", "NVL", "Ti"))  # words that tell another device, or a part of one


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the FLOPs per second a device can do at best; None where the device is not in the table.

    Args:
        device_name: as torch.cuda.get_device_name tells it; "cpu" is not known.
        precision: Lightning's precision flag, for instance "bf16-mixed" or "32-true"; no peak of "64-true" is known.
    """
    words = device_name.replace("-", " ").split()
    if "64" in precision or SLOWER_OR_FASTER.intersection(words):
        return None
    for name, (half, single) in PEAK_FLOPS.items():
        if f" {name} " in f" {' '.join(words)} ":  # whole words: an RTX A4000 is no A40
            return half if "16" in precision else single
    return None
