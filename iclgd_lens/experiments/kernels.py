"""A comparison's kernel views: every view of `iclgd_lens.kernels` on one episode and one model, as rows of the tidy frame."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from iclgd_lens.data.episodes import Episode
from iclgd_lens.data.prompts import Query
from iclgd_lens.experiments.kernel_attention import attention_views
from iclgd_lens.experiments.kernel_descent import STEPS, alignment_rows, epoch_rows, tangent_rows, trajectory_rows
from iclgd_lens.experiments.kernel_regression import Labels, MetricRows, head_rows, hidden_rows, majority_rows
from iclgd_lens.experiments.measure import Row
from iclgd_lens.kernels.labels import one_hot_labels
from iclgd_lens.kernels.tangent import first_label_tokens, tangent_kernel
from iclgd_lens.metrics.agreement import label_distribution
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.models.sites import sites_of
from iclgd_lens.runs.activations import Activations
from iclgd_lens.runs.capture import capture
from iclgd_lens.updates.dual import ParameterUpdate
from iclgd_lens.updates.inject import Parameter

LEAST_QUERIES = 4
"""How many queries are needed to choose a head on one half of them and to score it on the other."""

TICKS = 4
"""How often `kernel_rows` reports progress."""


def require_kernel_views(model: HookedModel, episode: Episode) -> None:
    """Check before anything runs that the kernel views of an episode can be computed.

    Raises:
        ValueError: If there are too few queries or demonstrations, a label is unknown, two label words share their first token, or
            the model's heads cannot be told apart.
    """
    sites_of(model).require_separate_heads()
    first_label_tokens(episode.queries)
    Labels.of(episode)
    if len(episode.queries) < LEAST_QUERIES:
        raise ValueError(
            f"the kernel views need at least {LEAST_QUERIES} queries, to choose a head on half of them; got {len(episode.queries)}"
        )
    if episode.k < 2:
        raise ValueError(f"the kernel views need at least two demonstrations to compare, got {episode.k}")


def kernel_rows(
    model: HookedModel,
    episode: Episode,
    runs: Mapping[str, Activations],
    updates: Mapping[str, ParameterUpdate],
    parameters: Sequence[Parameter],
    in_epochs: Callable[[str, int], ParameterUpdate],
    attempt: Callable[[str, Callable[[], ParameterUpdate]], ParameterUpdate | None],
    tick: Callable[[], None],
) -> Iterator[tuple[str, str, str, list[Row]]]:
    """Compute every kernel view of one episode.

    Queries stream eight at a time; of a batch are held, per layer, the query's length times `3 d_model + heads` numbers, and of all
    queries one number per metric, layer, head and demonstration. Of the demonstrations are held `layer × token × (d_model + label ×
    2 kv_heads × d_head)` numbers for the tangent kernel, and the kernels themselves, `layer × (query + demonstration) ×
    demonstration × label²`.

    Rows about the tangent kernel are about a layer-causal step on labels' first tokens among the label words, at the update's rate
    and parts of it, whatever loss and readout the update had.

    Args:
        model: The model.
        episode: The demonstrations and queries.
        runs: The queries under `"zsl"`, `"icl"` and every update, by method, with `attn_out`, `label_log_probs` and `lens_logits`.
        updates: The updates, by method.
        parameters: The parameters that they train.
        in_epochs: Makes a method's update in so many epochs.
        attempt: Makes a further update of a method; None where it diverges.
        tick: Called `TICKS` times.

    Yields:
        Rows with the part of a comparison that they belong to, `"frame"` or `"heads"`, and the method and control that they are
        about.
    """
    labels = Labels.of(episode)
    attention = attention_views(model, episode, updates, runs)
    for (method, control), rows in attention.rows.items():
        yield from _grouped((method, control, row) for row in rows)
    tick()

    targets = {method: label_distribution(run) for method, run in runs.items() if method != "zsl"}
    targets["gold"] = one_hot_labels(labels.queries, labels.count).to(targets["icl"])
    # A demonstration without its label is a prompt whose last token predicts it.
    prompts = [Query(each.tokens[: -each.n_label_tokens], episode.label_tokens, each.label) for each in episode.demonstrations]
    points = capture(model, prompts, keep=["residual"])
    zero_shot = capture(model, episode.queries, keep=["residual"]).residual
    for name, weights in (("attention", attention.demonstration_attention), ("label_attention", attention.label_attention)):
        yield from _grouped(head_rows(weights, labels, targets, name, episode.seed))
    yield from _grouped(majority_rows(targets))
    yield from _grouped(hidden_rows(zero_shot, points.residual, labels, targets))
    tick()

    kernel = tangent_kernel(model, episode.demonstrations, episode.queries, parameters=parameters)
    if "lcgd" in updates:
        yield from _grouped(tangent_rows(model, episode, kernel, updates["lcgd"].settings, partial(attempt, "lcgd")))
    yield from _grouped(alignment_rows(kernel, attention.demonstration_attention, labels, episode.seed))
    tick()

    lens_logits = runs["icl"].lens_logits
    yield from _grouped(trajectory_rows(kernel, zero_shot, points.residual, lens_logits, labels))
    for method in updates:
        if (update := attempt(method, partial(in_epochs, method, STEPS))) is not None:
            yield from _grouped(epoch_rows(model, episode, update, lens_logits, runs["zsl"].lens_logits[:, -1]))
    tick()


def _grouped(rows: MetricRows) -> Iterator[tuple[str, str, str, list[Row]]]:
    """Put rows of the same part about the same method and control together, in the order in which these come first."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for method, control, row in rows:
        groups["heads" if "head" in row else "frame", method, control].append(row)
    for (part, method, control), group in groups.items():
        yield part, method, control, group
