"""Prompts that lie on another device than the model are moved to it, at every entrance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from iclgd_lens import capture, compare, gd, lcgd, load_model, load_task, tangent_kernel
from iclgd_lens.data.episodes import Episode


class Elsewhere(torch.Tensor):
    """A tensor that behaves as on a device of its own: it can be moved, and not be put together with tensors that lie elsewhere."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.to:
            target = (kwargs or {}).get("device", args[1])
            if isinstance(target, cls):
                return args[0].as_subclass(cls)
            if isinstance(target, (str, torch.device, torch.Tensor)):
                return args[0].as_subclass(torch.Tensor).clone()
        given = [*args, *(kwargs or {}).values()]
        flat = [each for one in given for each in (one if isinstance(one, (list, tuple)) else [one])]
        with torch._C.DisableTorchFunctionSubclass():
            # Single numbers may be put together with anything, as on real devices.
            tensors = [each for each in flat if isinstance(each, torch.Tensor) and each.ndim]
        if any(isinstance(each, cls) for each in tensors) and not all(isinstance(each, cls) for each in tensors):
            raise RuntimeError(f"tensors of two devices are put together by {function}")
        return super().__torch_function__(function, types, args, kwargs or {})


def moved(example: Any, move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A demonstration or a query whose tensors are moved."""
    parts = {"tokens": move(example.tokens)}
    if hasattr(example, "separator"):
        parts["separator"] = move(example.separator)
    else:
        parts["label_tokens"] = tuple(move(tokens) for tokens in example.label_tokens)
    return replace(example, **parts)


def all_moved(episode: Episode, move: Callable[[torch.Tensor], torch.Tensor]) -> Episode:
    return replace(
        episode,
        demonstrations=tuple(moved(each, move) for each in episode.demonstrations),
        queries=tuple(moved(each, move) for each in episode.queries),
        label_tokens=tuple(move(tokens) for tokens in episode.label_tokens),
    )


def away(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(Elsewhere)


LABELS = {"loss_on": "label", "readout": "labels"}
JOBS: dict[str, Callable[[Any, Episode], Any]] = {
    "zero-shot": lambda model, episode: capture(model, episode.queries),
    "in context": lambda model, episode: capture(model, episode.queries, context=episode.demonstrations),
    "gd": lambda model, episode: gd(model, episode.demonstrations, lr=0.1),
    "lcgd": lambda model, episode: lcgd(model, episode.demonstrations, lr=0.1),
    "gd on labels": lambda model, episode: gd(model, episode.demonstrations, lr=0.1, label_tokens=episode.label_tokens, **LABELS),
    "lcgd on labels": lambda model, episode: lcgd(
        model, episode.demonstrations, lr=0.1, label_tokens=episode.label_tokens, **LABELS
    ),
    "tangent kernel": lambda model, episode: tangent_kernel(model, episode.demonstrations, episode.queries),
    "compare": lambda model, episode: compare(model, episode, controls=("random", "shuffled_labels")),
}
PARTS = ("attn_out", "label_log_probs", "inputs", "key_errors", "to_queries", "frame")


@pytest.fixture(scope="module")
def remapped(bundled) -> Episode:
    return load_task("bundled/remapped").episode(bundled, k=3, n_queries=3, seed=0)


def require_same(found: Any, expected: Any) -> None:
    compared = 0
    for name in PARTS:
        part = getattr(expected, "kept", {}).get(name, None) if hasattr(expected, "kept") else getattr(expected, name, None)
        if part is None:
            continue
        other = found.kept[name] if hasattr(found, "kept") else getattr(found, name)
        compared += 1
        if name == "frame":
            assert other.equals(part)
        else:
            assert type(other) is torch.Tensor
            assert torch.allclose(other.cpu(), part.cpu(), atol=1e-4)
    assert compared


@pytest.mark.parametrize("job", list(JOBS))
def test_prompts_that_lie_elsewhere_are_moved_to_the_model(bundled, remapped, job):
    require_same(JOBS[job](bundled, all_moved(remapped, away)), JOBS[job](bundled, remapped))


@pytest.mark.parametrize("part", ["demonstrations", "queries"])
def test_demonstrations_and_queries_need_not_lie_together(bundled, remapped, part):
    mixed = replace(remapped, **{part: getattr(all_moved(remapped, away), part)})
    require_same(JOBS["in context"](bundled, mixed), JOBS["in context"](bundled, remapped))


def test_what_lies_elsewhere_cannot_be_mixed_unmoved():
    """So that the tests above can fail."""
    here, there = torch.arange(3), away(torch.arange(3))
    for mix in (lambda: torch.cat([here, there]), lambda: here + there, lambda: torch.isin(there, here), lambda: here[there]):
        with pytest.raises(RuntimeError, match="tensors of two devices"):
            mix()
    assert type(there.to("cpu") + here) is torch.Tensor


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("job", list(JOBS))
@pytest.mark.parametrize(("model_on", "prompts_on"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_a_gpu_s_model_takes_prompts_of_the_processor_and_the_other_way_around(remapped, job, model_on, prompts_on):
    model = load_model("bundled", device=model_on)
    found = JOBS[job](model, all_moved(remapped, lambda tensor: tensor.to(prompts_on)))
    expected = JOBS[job](load_model("bundled", device="cpu"), remapped)
    if job == "compare":
        assert len(found.frame) == len(expected.frame)
        assert (found.frame["n"] == expected.frame["n"]).all()
    else:
        require_same(found, expected)
