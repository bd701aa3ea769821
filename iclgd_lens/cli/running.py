"""What commands share that compare episode by episode: running, keeping what is done, and closing the folder of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from iclgd_lens.cli.common import console, progress_bar, say

if TYPE_CHECKING:
    from iclgd_lens.data.episodes import Episode
    from iclgd_lens.data.tasks import Task
    from iclgd_lens.experiments.comparison import Comparison
    from iclgd_lens.models.hooked import HookedModel


def use_threads_for(model: str) -> None:
    """Leave torch a single thread for the bundled model, which is so small that more cost more than they bring."""
    import torch

    if model == "bundled":
        torch.set_num_threads(1)


def compare_episodes(
    model: HookedModel,
    task: Task,
    out: Path,
    *,
    k: int | Literal["fit"],
    queries: int,
    seeds: Sequence[int],
    twins: bool,
    about: str,
    **options: Any,
) -> Comparison:
    """Compare one episode per seed, each beside an untrained twin of its own, and write what is done after every one."""
    from iclgd_lens.experiments.compare import compare, n_runs
    from iclgd_lens.experiments.comparison import Comparison
    from iclgd_lens.experiments.folder import begin_run, write_frames
    from iclgd_lens.models.untrained import untrained_twin

    begin_run(out)
    found: list[Comparison] = []
    with progress_bar() as progress:
        runs = n_runs(("gd", "lcgd"), options["controls"], untrained=twins, kernels=options.get("kernels", False))
        bar = progress.add_task(about, total=len(seeds) * runs)
        for seed in seeds:
            found.append(
                compare(
                    model,
                    task.episode(model, k=k, n_queries=queries, seed=seed),
                    untrained=untrained_twin(model, seed=seed) if twins else None,
                    on_run=lambda: progress.advance(bar),
                    **options,
                )
            )
            whole = Comparison.concatenated(found)
            write_frames(out, whole.frames)
    return whole


def close_run(
    out: Path,
    model: HookedModel,
    name: str,
    run: Mapping[str, Any],
    episode: Episode,
    rates: Mapping[str, float],
    options: Mapping[str, Any],
) -> None:
    """Write the setting, an example of attention, and the report of a run whose frames are in its folder.

    Args:
        out: The folder.
        model: The model.
        name: What it is called.
        run: What was run.
        episode: Whose attention is shown.
        rates: The learning rate of every method, for the example's updates.
        options: How those are made, as in `gd`.
    """
    from iclgd_lens.experiments.folder import EXAMPLE, RunFolder, write_setting
    from iclgd_lens.experiments.methods import METHODS
    from iclgd_lens.updates.gradient import DivergedError
    from iclgd_lens.views.attention import attention_example, queries_within
    from iclgd_lens.views.report import write_report

    write_setting(out, model, name, run)
    with console.status("writing the report"):
        options = {**options, "label_tokens": episode.label_tokens}
        updates = {}
        for method, lr in rates.items():
            try:
                updates[method] = METHODS[method](model, episode.demonstrations, lr=lr, **options)
            except DivergedError as error:
                say(f"The example of attention is without {method.upper()}: {error}")
        try:
            rows = range(queries_within(model, episode, len(updates)))
            attention_example(model, episode, updates, rows).save(out / EXAMPLE)
        except ValueError as error:  # the model's heads cannot be told apart
            say(f"The report has no example of attention: {error}")
        report = write_report(RunFolder.read(out))
    say(f"Report: {report}")
