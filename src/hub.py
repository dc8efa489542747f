"""What may be asked of the Hugging Face Hub, and whether it can be reached."""

import os
import re
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import get_session

MADE_HERE = ("tiny", "synthetic")  # the model and the data that need no file
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def local_path(name: str) -> Path | None:
    """The path that a name stands for, there or not; None for a name of something on the Hub.

    What looks like a path is one. So is what begins with a folder that is here: a stranger may own `checkpoints/best`.
    """
    path = os.path.expanduser(name)
    owner = name.partition("/")[0]
    return Path(path) if not HUB_ID.fullmatch(name) or os.path.exists(path) or os.path.isdir(owner) else None


def local_name(name: str) -> str:
    """The name, which is no longer that of something on the Hub where it stands for a path: `./mine`."""
    path = None if name in MADE_HERE else local_path(name)
    return os.path.join(".", path) if path else name


def hub_problem(timeout: float = 5.0) -> str | None:
    """Return why the Hugging Face Hub cannot be reached, or None if it answers.

    Asks once, through the Hub's own client, so that proxies, mirrors and offline mode count. Left to themselves,
    `datasets` and `transformers` retry for 25 seconds or more.

    Args:
        timeout: seconds to wait for a connection to one address, and then for an answer.
    """
    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception as error:  # the client's HTTP library, and with it the error's type, differs by version
        return " ".join(str(error).split())[:300] or type(error).__name__
    return None
