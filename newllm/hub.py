"""Files of the Hugging Face hub, with an answer within seconds when it cannot be reached."""

import threading
import urllib.error
import urllib.request
from pathlib import Path

QUESTION_SECONDS = 5.0  # the library's own retries take 20 to 50 s before they give up
OFFLINE_CHOICES = "tokenizer=bpe, tokenizer=bytes, tokenizer=unigram, tokenizer=file tokenizer.path=<tokenizer.json>"


def fetch_file(repository: str, name: str, *, key: str, choices: str = OFFLINE_CHOICES) -> Path:
    """Return the local path of a hub file: from the local hub cache, else downloaded after one short question.

    Args:
        repository: owner/name on the hub.
        name: file in the repository.
        key: part of the configuration that asks for it, for messages.
        choices: what can be had without a network instead, for messages.
    Raises:
        ValueError: the file is not on this machine, and the hub does not give it.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repository, name)
    if isinstance(cached, str):
        return Path(cached)
    url = f"{constants.ENDPOINT}/{repository}/resolve/main/{name}"
    reason = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else ask(url)
    if reason is None:
        try:
            return Path(hf_hub_download(repository, name, etag_timeout=QUESTION_SECONDS))
        except Exception as error:  # whatever the library and its transport raise, the user can only choose again
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    raise ValueError(
        f"{key}: {name} of {repository} is neither in the local hub cache nor to be had from the hub ({reason}). "
        f"Allowed without a network: {choices}. Choose one of these or connect to the hub."
    )


def ask(url: str) -> str | None:
    """Return why the address does not give its file, None if it would.

    The question runs in a thread: looking up a host name cannot be given a time limit.
    """
    answers: list[str | None] = []
    thread = threading.Thread(target=lambda: answers.append(_head(url)), daemon=True)
    thread.start()
    thread.join(QUESTION_SECONDS + 1.0)
    return answers[0] if answers else f"no answer within {QUESTION_SECONDS:.0f} s"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Takes a redirection as the answer: the hub redirects to where it keeps large files."""

    def redirect_request(self, *arguments: object) -> None:
        return None


def _head(url: str) -> str | None:
    from huggingface_hub.utils import build_hf_headers

    request = urllib.request.Request(url, method="HEAD", headers=build_hf_headers())
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=QUESTION_SECONDS):
            return None
    except urllib.error.HTTPError as error:
        if error.code < 400:
            return None
        is_gated = error.code in (401, 403)
        return f"HTTP {error.code}" + (", it is gated or private: log in with `hf auth login`" if is_gated else "")
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
