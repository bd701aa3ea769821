"""The hub: what to say when it cannot be reached."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_NOISY = ("huggingface_hub", "datasets", "transformers")


@contextmanager
def asked(what: str, instead: str) -> Iterator[None]:
    """Turn whatever fails while the hub is asked for something into one message that says what to do.

    The libraries' own reports of retries are held back meanwhile.

    Args:
        what: What is asked for, as the message names it.
        instead: What to do without a hub.

    Raises:
        OSError: If anything below fails.
    """
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    except Exception as error:  # of the library, of its HTTP client, of the file system
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # which no connection would mend
            raise
        reason = (str(error) or type(error).__name__).strip().split("\n", maxsplit=1)[0].rstrip(".")
        raise OSError(
            f"cannot load {what} from the hub or its local cache: {reason}. Without a connection: {instead}"
            " With what is needed in the cache already, HF_HUB_OFFLINE=1 saves the wait."
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
