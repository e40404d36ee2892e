"""Packages that only some choices need: asked for where the choice is made, before torch is imported."""

import netrc
import os
from importlib.util import find_spec
from urllib.parse import urlsplit


def not_installed(given: str, package: str, extra: str, instead: str) -> list[str]:
    """Return a sentence where a choice needs a package that is not there.

    Args:
        given: the choice, as the user wrote it.
        package: what it imports.
        extra: extra of newllm that brings the package.
        instead: what works without it.
    """
    spec = find_spec(package)
    if spec is not None and spec.origin is not None:  # a mere folder of that name, as wandb leaves one, is no package
        return []
    return [
        f"{given}: needs the package {package}, which is not installed. Allowed here: {instead}. "
        f'Install the extra: pip install "newllm[{extra}]".'
    ]


def no_wandb_login() -> list[str]:
    """Return a sentence where Weights & Biases would stop and ask who is there."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or os.environ.get("WANDB_API_KEY"):
        return []
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        known = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        known = {}
    if host in known:
        return []
    return [
        f"logger.wandb=true: there is no login for {host}. Allowed: a login, or WANDB_MODE=offline. "
        "Run `wandb login`, or set WANDB_MODE=offline and send the run later with `wandb sync`."
    ]
