"""The kernel views of a comparison: what they print equals what the views give by hand, and every one has its control."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from iclgd_lens import (
    ATTENTION,
    Activations,
    Comparison,
    Query,
    accuracy,
    agreement,
    align_trajectories,
    by_demonstration,
    capture,
    centred_alignment,
    choose_head,
    compare,
    decompose,
    gd,
    hidden_kernel,
    icl_attention,
    implied_attention,
    label_agreement,
    label_regression,
    label_step,
    lcgd,
    linearity,
    load_task,
    own_layer_change,
    summarise,
    tangent_kernel,
    without_ends,
)
from iclgd_lens.data.episodes import Episode
from iclgd_lens.data.prompts import Demonstration
from iclgd_lens.experiments.compare import n_runs
from iclgd_lens.experiments.kernel_attention import _implied, attention_views
from iclgd_lens.experiments.kernel_descent import STEPS
from iclgd_lens.experiments.kernel_regression import SHUFFLES, Labels
from iclgd_lens.metrics.agreement import label_distribution
from iclgd_lens.models.hooked import HookedTransformer
from tests.models_zoo import make_demonstrations, make_model, make_queries

LR = 0.1


@pytest.fixture(scope="module")
def runs(bundled, twin, episode) -> Comparison:
    return compare(bundled, episode, lr=LR, untrained=twin, controls=(), kernels=True)


@pytest.fixture(scope="module")
def frame(runs) -> pd.DataFrame:
    return runs.frame


def value(frame: pd.DataFrame, metric: str, method: str, layer: int | None, model: str = "trained", control: str = "none") -> float:
    keys = ["metric", "method", "model", "control"]
    rows = frame.set_index(keys).sort_index().loc[[(metric, method, model, control)]]
    rows = rows[rows["layer"].isna() if layer is None else rows["layer"] == layer]
    assert len(rows) == 1, (metric, method, layer, len(rows))
    return float(rows["value"].iloc[0])


def test_smoothing_and_implied_attention_are_the_means_of_their_functions(bundled, episode, frame):
    zsl = capture(bundled, episode.queries, keep=["attn_out", "head_out", *ATTENTION])
    keep = ["head_out", "demonstration_out", "demonstration_attention", "context_scores"]
    icl = capture(bundled, episode.queries, context=episode.demonstrations, keep=keep)
    parts = decompose(icl, zsl)
    attribution = lcgd(bundled, episode.demonstrations, lr=LR).attribution(zsl)
    weights = implied_attention(attribution, episode.demonstrations)
    by_token = agreement(icl_attention(icl, episode.demonstrations), weights)
    whole = [by_demonstration(x, episode.demonstrations) for x in (icl_attention(icl, episode.demonstrations), weights)]
    for layer in range(bundled.cfg.n_layers):
        expected = {
            ("demonstration_mass", "icl"): parts.mass[:, layer],
            ("smoothing_share", "icl"): parts.smoothing.share[:, layer],
            ("drift_cosine", "icl"): parts.drift.cosine[:, layer],
            ("contribution_token_kendall", "lcgd"): by_token.kendall[:, layer],
            ("contribution_token_top_k_recall", "lcgd"): by_token.top_k_recall[:, layer],
            ("contribution_demonstration_spearman", "lcgd"): agreement(*whole).spearman[:, layer],
        }
        for (metric, method), values in expected.items():
            assert value(frame, metric, method, layer) == pytest.approx(float(values.double().mean()), abs=2e-5), metric


def test_heads_are_viewed_one_by_one(bundled, twin, episode, runs):
    keep = ["head_out", "demonstration_out", "demonstration_attention", "label_attention", "context_scores", "label_log_probs"]
    labels = Labels.of(episode)
    for name, model in (("trained", bundled), ("untrained", twin)):
        zsl = capture(model, episode.queries, keep=["head_out", *ATTENTION])
        icl = capture(model, episode.queries, context=episode.demonstrations, keep=keep)
        parts = decompose(icl, zsl)

        def agreed(kernel: torch.Tensor, run: Activations = icl) -> torch.Tensor:
            estimates = label_regression(kernel.permute(1, 2, 0, 3), labels.demonstrations, labels.count)
            return label_agreement(estimates, label_distribution(run)).permute(2, 0, 1)

        expected = {
            ("demonstration_mass", "icl"): parts.mass,
            ("smoothing_share", "icl"): parts.head_smoothing.share,
            ("attention_agreement", "icl"): agreed(icl.demonstration_attention),
            ("label_attention_agreement", "icl"): agreed(icl.label_attention),
        }
        for method, make in (("gd", gd), ("lcgd", lcgd)):
            weights = implied_attention(make(model, episode.demonstrations, lr=LR).attribution(zsl), episode.demonstrations)
            inner = [without_ends(x, episode.demonstrations) for x in (icl_attention(icl, episode.demonstrations), weights)]
            expected["contribution_inner_kendall", method] = agreement(*inner).kendall
        heads = runs.heads[runs.heads["model"] == name]
        assert set(zip(heads["metric"], heads["method"], strict=True)) == {
            *expected,
            *((metric, method) for metric in ("sim_am", "sim_am_delta") for method in ("gd", "lcgd")),
        }
        rows = heads.set_index(["metric", "method", "layer", "head"]).sort_index()
        assert rows.index.is_unique
        assert set(heads["control"]) == {"none"}
        for (metric, method), values in expected.items():
            got = rows.loc[(metric, method), "value"].to_numpy().reshape(values.shape[1:])
            np.testing.assert_allclose(got, values.double().mean(dim=0).numpy(), atol=5e-5, err_msg=metric)


def test_label_regression_by_heads_is_scored_on_the_half_that_did_not_choose(bundled, episode, frame):
    icl = capture(bundled, episode.queries, context=episode.demonstrations, keep=["demonstration_attention", "label_log_probs"])
    labels = torch.tensor([demonstration.label for demonstration in episode.demonstrations])
    estimates = label_regression(icl.demonstration_attention.permute(1, 2, 0, 3), labels, len(episode.label_words))
    chosen = choose_head(estimates, label_distribution(icl), seed=episode.seed)
    assert value(frame, "attention_head_agreement", "icl", None) == pytest.approx(chosen.agreement)
    assert value(frame, "attention_head_correlation", "icl", None) == pytest.approx(chosen.correlation, abs=1e-5)
    rows = frame[(frame["metric"] == "attention_head_agreement") & (frame["control"] == "none")]
    assert set(rows["n"]) == {len(episode.queries) - len(episode.queries) // 2}
    assert set(rows["method"]) == {"icl", "gd", "lcgd", "gold"}
    layer = choose_head(estimates[2:3], label_distribution(icl), seed=episode.seed)
    assert value(frame, "attention_layer_agreement", "icl", 2) == pytest.approx(layer.agreement)


def test_the_commonest_label_scores_what_predictions_give_it(bundled, episode, frame):
    icl = capture(bundled, episode.queries, context=episode.demonstrations, keep=["label_log_probs"])
    counts = icl.predictions.bincount()
    assert value(frame, "majority_agreement", "icl", None) == pytest.approx(int(counts.max()) / len(episode.queries))


def test_tangent_errors_are_those_of_a_step_on_the_labels_and_shrink_with_the_rate(bundled, episode, frame):
    kernel = tangent_kernel(bundled, episode.demonstrations, episode.queries)
    for name, schedule in (("tangent", "batch"), ("tangent_online", "online")):
        step = label_step(bundled, episode.demonstrations, episode.queries, lr=LR / 100, schedule=schedule)
        found = linearity(kernel.prediction(LR / 100), own_layer_change(bundled, step, episode.queries))
        for layer in range(bundled.cfg.n_layers):
            error = value(frame, f"{name}_log10_error_hundredth", "lcgd", layer)
            assert 10**error == pytest.approx(float(found.error[layer]), rel=2e-2)
            assert error < value(frame, f"{name}_log10_error_tenth", "lcgd", layer)
    zsl = capture(bundled, episode.queries, keep=["lens_logits"]).lens_logits
    step = label_step(bundled, episode.demonstrations, episode.queries, lr=LR / 100, schedule="batch")
    after = capture(bundled, episode.queries, update=step, keep=["lens_logits"]).lens_logits
    found = linearity(kernel.prediction(LR / 100), (after - zsl).transpose(0, 1))
    for layer in range(bundled.cfg.n_layers):
        error = value(frame, "tangent_all_layers_log10_error_hundredth", "lcgd", layer)
        assert 10**error == pytest.approx(float(found.error[layer]), rel=2e-2)
        assert value(frame, "tangent_cosine_hundredth", "lcgd", layer) > 0.98
        assert value(frame, "tangent_cosine_hundredth", "lcgd", layer, control="random") < 0.95


def test_streamed_views_are_in_the_order_of_the_queries():
    # Ten queries of many lengths: two batches, which are not in the queries' order.
    model, demonstrations, lr = make_model(), tuple(make_demonstrations(4)), 0.05
    queries = tuple(make_queries((5, 2, 7, 5, 1, 6, 3, 2, 4, 1)))
    episode = Episode("zoo", 0, demonstrations, queries, ("a", "b", "c"), queries[0].label_tokens)
    update = lcgd(model, demonstrations, lr=lr)
    icl = capture(model, queries, context=demonstrations, keep=["demonstration_attention", "label_attention", "context_scores"])
    zsl = capture(model, queries, keep=["attn_out", *ATTENTION])
    ft = capture(model, queries, update=update, keep=["attn_out"])
    found = attention_views(model, episode, {"lcgd": update}, {"zsl": zsl, "lcgd": ft})
    for name in ("demonstration_attention", "label_attention"):
        torch.testing.assert_close(getattr(found, name), icl.kept[name], rtol=1e-4, atol=1e-5)
    rows = {(row["metric"], row["layer"]): row["value"] for row in found.rows["lcgd", "none"]}
    attribution = update.attribution(zsl)
    coefficients = implied_attention(attribution, demonstrations, "coefficient")
    expected = {
        "first_order_cosine": torch.cosine_similarity(attribution.change, ft.attn_out - zsl.attn_out, dim=-1),
        "keys_share": attribution.through_keys.sum(dim=(-2, -1)) / attribution.change.norm(dim=-1),
        "coefficient_token_spearman": agreement(icl_attention(icl, demonstrations), coefficients).spearman,
    }
    for metric, values in expected.items():
        for layer in range(model.cfg.n_layers):
            assert rows[metric, layer] == pytest.approx(float(values[:, layer].double().mean()), abs=1e-4), metric


def test_a_random_head_is_the_mean_over_heads(bundled, episode, frame):
    icl = capture(bundled, episode.queries, context=episode.demonstrations, keep=["demonstration_attention", "label_log_probs"])
    labels = Labels.of(episode)
    estimates = label_regression(icl.demonstration_attention.permute(1, 2, 0, 3), labels.demonstrations, labels.count)
    agreed = label_agreement(estimates, label_distribution(icl)).double()
    assert value(frame, "attention_head_agreement", "icl", None, control="random") == pytest.approx(float(agreed.mean()))
    assert value(frame, "attention_layer_agreement", "icl", 1, control="random") == pytest.approx(float(agreed[1].mean()))


def test_alignment_is_that_of_the_kernels_and_of_shuffled_ones_next_to_nothing(bundled, episode, frame):
    kernel = tangent_kernel(bundled, episode.demonstrations, episode.queries)
    icl = capture(bundled, episode.queries, context=episode.demonstrations, keep=["demonstration_attention"])
    attention = icl.demonstration_attention.mean(dim=2).transpose(0, 1)
    found = centred_alignment(kernel.per_label, attention)
    metrics = [name for name in frame["metric"].unique() if name.startswith("cka_")]
    for layer in range(bundled.cfg.n_layers):
        assert value(frame, "cka_tangent_attention", "icl", layer) == pytest.approx(float(found[layer]), abs=1e-4)
        assert value(frame, "cka_tangent_label", "icl", layer) > 0.9
        assert all(abs(value(frame, name, "icl", layer, control="random")) < 0.5 for name in metrics)


def test_trajectories_are_those_of_the_last_layers_kernels_and_of_epochs(bundled, episode, frame):
    kernel = tangent_kernel(bundled, episode.demonstrations, episode.queries)
    icl = capture(bundled, episode.queries, context=episode.demonstrations, keep=["lens_logits"])
    layers = icl.lens_logits.softmax(dim=-1).transpose(0, 1)
    k, n_labels = len(episode.demonstrations), len(episode.label_words)
    theta = kernel.between[-1].transpose(1, 2).reshape(k * n_labels, -1)
    # By hand, in the space of all (demonstration, label) pairs.
    at_points, at_queries = kernel.demonstration_logits[-1].flatten(), kernel.query_logits[-1]
    to_queries = kernel.to_queries[-1].transpose(1, 2).reshape(len(episode.queries), n_labels, -1)
    iterates, lr = [at_queries], 2 / float(torch.linalg.eigvalsh(theta.double())[-1])
    for _ in range(STEPS):
        residuals = (at_points.view(k, n_labels).softmax(dim=-1) - kernel.targets).flatten()
        at_points = at_points - lr * theta @ residuals
        iterates.append(iterates[-1] - lr * to_queries @ residuals)
    found = align_trajectories(layers, torch.stack(iterates).softmax(dim=-1))
    assert value(frame, "trajectory_tangent_score", "icl", None) == pytest.approx(found.score, abs=1e-4)
    for layer, matched in enumerate(found.match.tolist()):
        gold = torch.stack([iterates[matched][q].softmax(dim=-1)[query.label] for q, query in enumerate(episode.queries)])
        assert value(frame, "trajectory_tangent_gold_probability", "icl", layer) == pytest.approx(float(gold.mean()), abs=1e-4)

    epochs = [
        capture(bundled, episode.queries, update=gd(bundled, episode.demonstrations, lr=LR, epochs=n)) for n in range(1, STEPS + 1)
    ]
    zero_shot = capture(bundled, episode.queries)
    iterates = [run.lens_logits[:, -1].softmax(dim=-1) for run in (zero_shot, *epochs)]
    found = align_trajectories(layers, torch.stack(iterates))
    assert value(frame, "trajectory_epochs_score", "gd", None) == pytest.approx(found.score, abs=1e-4)
    assert value(frame, "trajectory_epochs_match", "gd", 2) == int(found.match[2])


def test_every_view_has_a_control_or_a_twin_beside_it(frame):
    trained, untrained = (frame[frame["model"] == model] for model in ("trained", "untrained"))
    assert set(trained["metric"]) == set(untrained["metric"])
    controls = trained.groupby("metric")["control"].agg(set)
    for metric, found in controls.items():
        if "kendall" in metric or "recall" in metric or metric.startswith("cka_"):
            assert "random" in found, metric
        if metric.startswith("hidden_") or metric in ("attention_head_agreement", "trajectory_hidden_score"):
            assert "shuffled_labels" in found, metric
        if metric.startswith("trajectory_") and "epochs" not in metric:
            assert found == {"none", "shuffled_labels"}, metric


def test_random_controls_read_nothing(frame):
    rows = frame[(frame["control"] == "random") & frame["metric"].str.endswith(("_kendall", "_spearman"))]
    assert len(rows) > 50
    assert rows["value"].abs().mean() < 0.05


def test_random_weights_by_demonstration_still_favour_long_demonstrations():
    lengths = [2, 3, 5, 9, 14, 20]
    demonstrations = [Demonstration(torch.zeros(1 + n, dtype=torch.long), n_label_tokens=1, label=0) for n in lengths]
    generator = torch.Generator().manual_seed(0)
    icl, implied = (torch.rand(2, 3, 4, sum(lengths), generator=generator) for _ in range(2))
    found = {(level, control): each for level, control, each in _implied(icl, implied, demonstrations, seed=0)}
    assert found["demonstration", "random"].kendall.mean() > 0.7
    assert found["token", "random"].kendall.abs().mean() < 0.2


def test_weights_of_other_demonstrations_still_favour_the_places_that_are_favoured_in_all():
    demonstrations = [Demonstration(torch.zeros(7, dtype=torch.long), n_label_tokens=1, label=0)] * 8
    generator = torch.Generator().manual_seed(0)
    icl, implied = (torch.arange(6.0).repeat(8) + 0.1 * torch.rand(2, 3, 4, 48, generator=generator) for _ in range(2))
    found = {(level, control): each for level, control, each in _implied(icl, implied, demonstrations, seed=0)}
    for level in ("token", "inner"):
        assert found[level, "none"].kendall.mean() > 0.8
        assert found[level, "other_demonstrations"].kendall.mean() > 0.8
        assert abs(found[level, "random"].kendall.mean()) < 0.1
    assert found["demonstration", "other_demonstrations"].kendall.abs().mean() < 0.4


def test_shuffled_labels_are_averaged_over_shuffles(bundled, episode, frame):
    labels = Labels.of(episode)
    assert len(labels.shuffled) == SHUFFLES
    assert all(torch.equal(dealt.sort().values, labels.demonstrations.sort().values) for dealt in labels.shuffled)
    assert len({tuple(dealt.tolist()) for dealt in labels.shuffled}) > 1
    icl = capture(bundled, episode.queries, context=episode.demonstrations, keep=["demonstration_attention", "label_log_probs"])
    kernel = icl.demonstration_attention.permute(1, 2, 0, 3)
    estimates = [label_regression(kernel, dealt, labels.count) for dealt in labels.shuffled]
    chosen = [choose_head(each, label_distribution(icl), seed=episode.seed).agreement for each in estimates]
    mean = sum(chosen) / len(chosen)
    assert value(frame, "attention_head_agreement", "icl", None, control="shuffled_labels") == pytest.approx(mean, abs=1e-6)
    zsl = capture(bundled, episode.queries, keep=["residual"]).residual.transpose(0, 1)
    prompts = [Query(each.tokens[:-1], episode.label_tokens) for each in episode.demonstrations]
    points = capture(bundled, prompts, keep=["residual"]).residual.transpose(0, 1)
    estimates = [label_regression(hidden_kernel(zsl, points, "rbf"), dealt, labels.count) for dealt in labels.shuffled]
    agreed = torch.stack([label_agreement(each, label_distribution(icl)) for each in estimates]).mean(dim=(0, 2))
    for layer, expected in enumerate(agreed.tolist()):
        found = value(frame, "hidden_rbf_agreement", "icl", layer, control="shuffled_labels")
        assert found == pytest.approx(expected, abs=1e-6)


def test_labels_that_are_all_alike_have_no_shuffle(episode):
    alike = replace(episode, demonstrations=[replace(each, label=0) for each in episode.demonstrations])
    assert set(Labels.of(alike).controls) == {"none"}


def test_rows_are_told_apart_by_their_columns(frame):
    assert not frame.duplicated(["model", "method", "control", "subset", "layer", "metric"]).any()
    assert len(summarise(frame, by=["model", "method", "control", "metric", "layer"]))


def test_without_kernels_no_row_is_added_and_with_them_none_is_changed(bundled, episode, frame):
    alone = compare(bundled, episode, lr=LR, controls=())
    plain = alone.frame
    assert set(alone.heads["metric"]) == {"sim_am", "sim_am_delta"}
    keys = ["method", "control", "subset", "layer", "metric"]
    joined = plain.merge(frame[frame["model"] == "trained"], on=keys, suffixes=("", " with"))
    assert len(joined) == len(plain) < len(frame) / 2
    torch.testing.assert_close(torch.tensor(joined["value"]), torch.tensor(joined["value with"]), equal_nan=True)
    assert not any("kendall" in metric for metric in plain["metric"].unique())


def test_progress_is_reported_as_often_as_announced(bundled, episode):
    ticks = []
    compare(bundled, replace(episode, queries=episode.queries[:4]), lr=LR, kernels=True, on_run=lambda: ticks.append(1))
    assert len(ticks) == n_runs(("gd", "lcgd"), kernels=True)


def test_updates_that_diverge_are_recorded_and_the_rest_is_viewed(bundled, episode):
    small = replace(episode, queries=episode.queries[:4])
    found = compare(bundled, small, lr={"gd": LR, "lcgd": 1e30}, kernels=True, if_diverged="record")
    assert set(found.problems["method"]) == {"lcgd"}
    assert "contribution_token_kendall" in set(found.frame[found.frame["method"] == "gd"]["metric"])
    assert not found.frame["metric"].str.startswith("tangent_error").any()
    assert found.frame["metric"].str.startswith("cka_").any()


def test_the_model_is_left_as_it_was(bundled, episode):
    before = [parameter.clone() for parameter in bundled.parameters()]
    compare(bundled, replace(episode, queries=episode.queries[:4]), lr=LR, kernels=True)
    assert all(torch.equal(a, b) for a, b in zip(before, bundled.parameters(), strict=True))
    assert not any(hook.fwd_hooks or hook.bwd_hooks for hook in bundled.hook_dict.values())
    assert all(parameter.grad is None for parameter in bundled.parameters())


@pytest.mark.parametrize("shape", ["rotary_rms_grouped_gated", "norms_before_and_after", "local", "attention_sinks"])
def test_other_architectures_are_viewed_too(shape):
    model, demonstrations = make_model(shape), tuple(make_demonstrations(4))
    queries = tuple(make_queries((4, 2, 6, 3, 5)))
    words = ("a", "b", "c")
    episode = Episode("zoo", 0, demonstrations, queries, words, queries[0].label_tokens)
    frame = compare(model, episode, lr=0.05, kernels=True, controls=()).frame
    mass = frame[frame["metric"] == "demonstration_mass"]["value"]
    assert len(mass) == model.cfg.n_layers
    assert mass.between(0, 1).all()
    shares = frame[frame["metric"].isin(["smoothing_share", "drift_share"])].groupby("layer")["value"].sum()
    assert shares.to_numpy() == pytest.approx(1, abs=1e-4)


def _altered(episode: Episode, case: str) -> Episode:
    queries, demonstrations = episode.queries, episode.demonstrations
    if case == "too few queries":
        return replace(episode, queries=queries[:3])
    if case == "one demonstration":
        return replace(episode, demonstrations=demonstrations[:1])
    if case == "unlabelled query":
        return replace(episode, queries=(*queries[:4], replace(queries[4], label=None)))
    shared = tuple(torch.cat([queries[0].label_tokens[0], tail]) for tail in queries[0].label_tokens)
    return replace(episode, queries=tuple(Query(query.tokens, shared, query.label) for query in queries))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("too few queries", "at least 4 queries"),
        ("one demonstration", "at least two demonstrations"),
        ("unlabelled query", "query 4 has no label index"),
        ("shared first token", "share their first token"),
    ],
)
def test_what_cannot_be_viewed_is_refused_before_anything_runs(bundled: HookedTransformer, episode, case, message):
    ticks = []
    with pytest.raises(ValueError, match=message):
        compare(bundled, _altered(episode, case), lr=LR, kernels=True, on_run=lambda: ticks.append(1))
    assert not ticks


def test_heads_that_cannot_be_told_apart_are_refused_by_name():
    queries = tuple(make_queries())
    episode = Episode("zoo", 0, tuple(make_demonstrations(3)), queries, ("a", "b", "c"), queries[0].label_tokens)
    with pytest.raises(ValueError, match="Olmo2ForCausalLM normalises the keys of all heads together"):
        compare(make_model("post_norm"), episode, lr=0.01, kernels=True)


def test_natural_labels_are_predicted_in_context_so_that_there_is_something_to_reconstruct(bundled):
    episode = load_task("bundled/natural").episode(bundled, k=4, n_queries=8, seed=1)
    assert float(accuracy(capture(bundled, episode.queries, context=episode.demonstrations))) == 1.0
    frame = compare(bundled, episode, methods=("gd",), lr=LR, kernels=True).frame
    assert not math.isnan(value(frame, "attention_head_agreement", "icl", None))
    assert not any(metric.startswith("tangent_") for metric in frame["metric"])


@pytest.mark.parametrize("case", ["twice the same", "silent last layer", "silent first layer", "only b_K"])
def test_degenerate_input_leaves_gaps_and_all_else_as_it_is(bundled, episode, case):
    few = replace(episode, demonstrations=episode.demonstrations[:3], queries=episode.queries[:4])
    layer = {"silent last layer": bundled.cfg.n_layers - 1, "silent first layer": 0}.get(case)
    hooks = [] if layer is None else [(f"blocks.{layer}.hook_attn_out", lambda out, hook: torch.zeros_like(out))]
    if case == "twice the same":
        few = replace(few, demonstrations=[few.demonstrations[0]] * 2)
    parameters = {"parameters": ["b_K"]} if case == "only b_K" else {}
    with bundled.hooks(hooks):
        frame = compare(bundled, few, lr=LR, kernels=True, controls=(), **parameters).frame
    assert value(frame, "demonstration_mass", "icl", 1) > 0
    gaps = set(frame[frame["value"].isna() & (frame["control"] == "none")]["metric"])
    assert gaps if case != "only b_K" else "trajectory_tangent_score" not in set(frame["metric"])
    assert (frame[frame["value"].isna()]["n"] == 0).all()
