"""The commands that make the paper's figures: which methods, what they count, and what they mark as not run."""

import json

import pytest
from statistics_files import make_row, write_statistics

from quickstart import figures
from quickstart.figures import FIGURES, MODES, NOT_RUN, figure_table, kinds_folder, write_page


def make_report(seed, **curves):
    """Each method's accuracies at even steps, with 100 tokens between two of them."""
    points = {
        name: [{"step": 20 * i, "avg_at_4": a, "generated_tokens": 100 * i} for i, a in enumerate(accuracies)]
        for name, accuracies in curves.items()
    }
    return {"seed": seed, "curves": points}


def test_tables_by_hand():
    reports = [
        make_report(0, beta_0=[0.5, 0.6, 0.7], beta_0_pointwise_clip=[0.5, 0.4, 0.3]),
        make_report(1, beta_0=[0.5, 0.8, 0.9]),
    ]
    assert figure_table(FIGURES["clip"], reports)[2:] == [
        "| no clip | 0, 1 | 50.0 ± 0.0 | 70.0 ± 10.0 (step 20) | 80.0 ± 10.0 | 200 |",
        "| pointwise clip 0.05 | 0 | 50.0 | 40.0 (step 20) | 30.0 | 200 |",
        f"| scale clip 0.05, of this project | {NOT_RUN} | | | | |",
    ]


def test_page_of_nothing_marks_all_as_not_run(tmp_path):
    text = write_page(tmp_path)
    assert text == (tmp_path / "figures.md").read_text(encoding="utf-8")
    assert text.count(NOT_RUN) == sum(len(figure.methods) for figure in FIGURES.values()) + len(MODES)
    assert text.count("*Published, not measured here:*") == text.count("*Limits:*") == len(FIGURES) + 1
    assert not list(tmp_path.glob("*.png"))


def test_page_has_plots_groups_and_kinds(tmp_path):
    seed = tmp_path / "seed_0"
    (seed / "grpo").mkdir(parents=True)
    (seed / "report.json").write_text(json.dumps(make_report(0, opsd=[0.5, 0.9], grpo=[0.5, 0.6, 0.7])))
    logs = [{"step": step, "frac_reward_zero_std": 0.25 * step} for step in (1, 2)]
    (seed / "grpo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logs))
    assert figures.zero_deviation(tmp_path) == [(1, 0.25), (2, 0.5)]
    write_statistics(
        kinds_folder(seed, False, True), [make_row(1, ["wait", "2", "."], [0.9, 0.1, 0.2], kinds=[1, 2, 0])]
    )
    write_statistics(kinds_folder(seed, True, True), [make_row(1, ["2", "."], [0.5, 0.25], kinds=[2, 0])])
    text = write_page(tmp_path)
    assert "| off | on | 0.900 | 0.100 | 0.200 |" in text and "| on | on | no token | 0.500 | 0.250 |" in text
    assert f"| off | off | {NOT_RUN} |  |  |" in text
    assert {file.name for file in tmp_path.glob("*.png")} == {
        f"figure_{name}.png" for name in ("tokens", "length", "vocabulary", "divergences")
    }


@pytest.mark.parametrize("name", FIGURES)
def test_methods_of_figures_are_trained_with_their_curves(name, monkeypatch, tmp_path):
    """The runs are those of quickstart/run.py, resumed, each with its checkpoints evaluated."""
    calls = []
    monkeypatch.setattr("quickstart.run.run_seed", lambda *args, **kwargs: calls.append((args, kwargs)))
    figures.train_figure(FIGURES[name], tmp_path, seed=3, steps=50, use_vllm=False)
    ((seed, methods, steps, use_vllm, folder, config), keywords) = calls[0]
    assert (seed, steps, use_vllm, folder, config.seed) == (3, 50, False, tmp_path, 3) and keywords["resume"]
    assert list(methods) == list(FIGURES[name].methods) and all(method.has_curve for method in methods.values())
