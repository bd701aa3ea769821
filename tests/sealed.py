"""The main jobs in a process of their own that opens no connection and unpickles nothing; what is tried is written down.

    python -m tests.sealed JOBS FOLDER

runs the jobs that are named, in `FOLDER`, and writes what was tried to `FOLDER/tried.json`.
"""

from __future__ import annotations

import json
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

TRIED: list[str] = []
CONNECTING = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg")


class SealedError(RuntimeError):
    """Something was tried that is not allowed here."""


def refuse(what: str) -> None:
    # The lines say who asked; libraries may swallow the error.
    lines = "".join(traceback.format_stack(limit=12)[:-1])
    TRIED.append(f"{what}\n{lines}")
    raise SealedError(what)


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse connections and pickles, whoever asks: Python itself announces them."""
    if event in CONNECTING and getattr(arguments[0], "family", None) != getattr(socket, "AF_UNIX", None):
        refuse(f"{event} {arguments[1:] if event != 'socket.getaddrinfo' else arguments}")
    if event == "pickle.find_class":
        refuse(f"{event} {arguments}")


def seal() -> None:
    """From here on, refuse."""

    class Sealed(pickle.Unpickler):
        def load(self) -> Any:
            refuse("pickle.Unpickler.load")

    def never(*arguments: Any, **options: Any) -> Any:
        refuse("an unpickling function")

    sys.addaudithook(watch)
    pickle.Unpickler = Sealed  # type: ignore[misc]
    pickle.load = pickle.loads = never
    import numpy as np
    import torch

    torch.load = never
    read_magic = np.lib.format.read_array

    def read_array(*arguments: Any, allow_pickle: bool = False, **options: Any) -> Any:
        if allow_pickle:
            refuse("numpy with allow_pickle")
        return read_magic(*arguments, **options)

    np.lib.format.read_array = read_array


def api(folder: Path) -> None:
    """What a notebook does, on both classes of models and on a folder's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from iclgd_lens import ParameterUpdate, capture, compare, gd, lcgd, load_model, load_task, untrained_twin
    from iclgd_lens.models.hooked import HookedTransformer
    from tests.tokenizers_zoo import FIXTURES, gpt2_style

    GPT2LMHeadModel(GPT2Config(vocab_size=800, n_positions=128, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder / "gpt2")
    gpt2_style().save_pretrained(folder / "gpt2")
    backends = ("bridge",) if HookedTransformer is None else ("hooked", "bridge")
    models = [load_model("bundled", backend=backend) for backend in backends]
    for model in models:
        for name in ("bundled/remapped", "bundled/natural"):
            episode = load_task(name).episode(model, k=3, n_queries=4, seed=0)
        capture(model, episode.queries, context=episode.demonstrations)
        update = gd(model, episode.demonstrations, lr=0.1)
        update.save(folder / "update.safetensors")
        capture(model, episode.queries, update=ParameterUpdate.load(folder / "update.safetensors"))
        lcgd(model, episode.demonstrations, lr=0.1)
        compare(model, episode, untrained=untrained_twin(model))
    for backend in backends:
        model = load_model(folder / "gpt2", backend=backend)
        episode = load_task("sst2", data=FIXTURES).episode(model, k=1, n_queries=1)
        compare(model, episode)


def command(*arguments: str) -> Callable[[Path], None]:
    """A command, whose folder `OUT` is one of its own, and which is to succeed."""

    def run(folder: Path) -> None:
        from typer.testing import CliRunner

        from iclgd_lens.cli import app

        found = CliRunner().invoke(app, [argument.replace("OUT", str(folder)) for argument in arguments])
        if found.exit_code:
            raise SystemExit(f"{found.output}{''.join(traceback.format_exception(found.exception))}")

    return run


def sweep(folder: Path) -> None:
    """A study in this process, its results and its report."""
    from iclgd_lens import load_results

    study = "{models: bundled, tasks: bundled/remapped, seeds: [0, 1], k: 3, queries: 4, lr: 0.1, executor: {kind: debug}}"
    (folder / "tiny.yaml").write_text(study)
    command("sweep", "OUT/tiny.yaml", "--dry-run", "--out", "OUT/sweep")(folder)
    command("sweep", "OUT/tiny.yaml", "--out", "OUT/sweep")(folder)
    assert len(load_results(folder / "sweep").frame())
    command("report", "OUT/sweep")(folder)


SPOILT = {
    "connection": "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=1)",
    "name": "import socket\nsocket.getaddrinfo('example.org', 80)",
    "hub": "from iclgd_lens import load_model\nload_model('gpt2')",
    "pickle": "import pickle\npickle.loads(pickle.dumps(1))",
    "pickle of another module": "import _pickle, pathlib\n_pickle.loads(_pickle.dumps(pathlib.Path('a')))",
    "torch": "import io, torch\ntorch.load(io.BytesIO(b''))",
    "numpy": "import io, numpy as np\nf = io.BytesIO()\nnp.save(f, np.array([{}]))\nf.seek(0)\nnp.load(f, allow_pickle=True)",
}
"""What the seal must see."""


def see(folder: Path) -> None:
    """Check that whatever is not allowed is refused and written down, also where a library swallows the error."""
    for name, code in SPOILT.items():
        before = len(TRIED)
        with suppress(Exception):
            exec(code, {})
        assert len(TRIED) > before, f"the seal does not see: {name}"
        del TRIED[before:]


SMALL = ("--k", "3", "--queries", "4")
JOBS: dict[str, Callable[[Path], None]] = {
    "see": see,
    "api": api,
    "demo": command("demo", "--episodes", "1", *SMALL, "--out", "OUT/demo"),
    "report": command("report", "OUT/demo"),
    "kernels": command("kernels", "--episodes", "1", *SMALL, "--no-twins", "--out", "OUT/kernels"),
    "reproduce": command(
        *("reproduce", "--task", "bundled/remapped", "--seed", "0", *SMALL, "--lr", "0.1", "--orders", "1", "--no-twins"),
        *("--control", "none", "--no-pictures", "--out", "OUT/reproduce"),
    ),
    "sweep": sweep,
    "bench": command(
        *("bench", "--model", "bundled", "--k", "2", "--demonstration", "4", "--queries", "2", "--query", "3", "--repeats", "1"),
        *("--out", "OUT/bench.parquet"),
    ),
}


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    try:
        seal()
        for job in sys.argv[1].split(","):
            JOBS[job](folder)
    finally:
        (folder / "tried.json").write_text(json.dumps(TRIED))
