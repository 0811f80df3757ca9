"""Results of several evaluations put together: by hand, against a bootstrap over both levels, and what is refused."""

import copy
import json
import math

import numpy as np
import pytest

from eval.aggregate import aggregate, main
from eval.scores import spread, student_t

SETTINGS = {"base_model": "m", "base_model_version": "v", "temperature": 1.0, "seed": 0, "data_sets": {"b": "h"}}
SETTINGS |= {"prompts": {"b": "p"}, "versions": {"vllm": "1", "math-verify": "1"}, "adapters": {}}


def result(model, rights, dataset="b"):
    problems = [{"problem_id": number, "correct": list(right)} for number, right in enumerate(rights)]
    return {"model": model, "dataset": dataset, "val_n": 2, "num_problems": len(rights), "problems": problems}


@pytest.fixture
def write(tmp_path):
    """A function that writes an output file: model -> verdicts of each problem, or (model, data set) -> verdicts."""

    def write(name, results, **settings):
        results = [
            result(*((model, rights) if isinstance(model, str) else (model[0], rights, model[1])))
            for model, rights in results.items()
        ]
        own = copy.deepcopy(SETTINGS) | settings
        own["adapters"] = {r["model"]: f"hash of {r['model']}" for r in results if r["model"] != "base"}
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"settings": own, "complete": True, "results": results}))
        return file

    return write


def row(rows, choice="last", **wanted):
    (found,) = [r for r in rows if r["choice"] == choice and all(r.get(name) == v for name, v in wanted.items())]
    return found


RIGHT, HALF, WRONG = (True, True), (True, False), (False, False)


def test_spread_by_hand():
    """Rows 1, .5, 0 / .5, .5, .5 on three problems."""
    found = spread([[1.0, 0.5, 0.0], [0.5, 0.5, 0.5], [0.0, 0.5, 0.4]])
    means = [0.5, 0.5, 0.3]
    columns = [0.5, 0.5, 0.3]
    assert found.mean == pytest.approx(1.3 / 3)
    variance = (2 * (0.5 - 1.3 / 3) ** 2 + (0.3 - 1.3 / 3) ** 2) / 2
    assert means == columns  # so that both have the same variance
    assert found.deviation == pytest.approx(math.sqrt(variance))
    assert found.error_of_trainings == found.error_of_problems == pytest.approx(math.sqrt(variance / 3))
    # What neither explains: value - row - column + mean, of nine values with 4 degrees of freedom
    m = 1.3 / 3
    rest = [1 - 1 + m, 0.5 - 1 + m, 0 - 0.8 + m, 0.5 - 1 + m, 0.5 - 1 + m, 0.5 - 0.8 + m]
    rest += [0 - 0.8 + m, 0.5 - 0.8 + m, 0.4 - 0.6 + m]
    shared = sum(value**2 for value in rest) / 4 / 9
    expected = max(2 * variance / 3 - shared, variance / 3)
    assert found.error == pytest.approx(math.sqrt(expected))


def test_spread_of_additive_effects_by_hand():
    found = spread([[0.1 + a + b for b in (0.0, 0.2, 0.4, 0.6)] for a in (0.0, 0.1, 0.2)])
    assert found.mean == pytest.approx(0.5)
    assert found.deviation == pytest.approx(0.1)
    assert found.error_of_trainings == pytest.approx(0.1 / 3**0.5)
    assert found.error_of_problems == pytest.approx(0.2 * (5 / 3) ** 0.5 / 2)  # deviation .2582 over the root of 4
    variance = found.error_of_trainings**2 + found.error_of_problems**2
    assert found.error == pytest.approx(math.sqrt(variance))
    degrees = variance**2 / (found.error_of_trainings**4 / 2 + found.error_of_problems**4 / 3)
    reach = student_t(degrees) * math.sqrt(variance)
    assert found.interval == pytest.approx((0.5 - reach, 0.5 + reach))


def test_student_t_is_that_of_the_tables():
    assert [student_t(n) for n in (1, 2, 4, 30)] == pytest.approx([12.706, 4.303, 2.776, 2.042], rel=1e-3)


def bootstrap_error(values, draws=4000):
    """Standard deviation of the mean when trainings and problems are each drawn with replacement."""
    generator = np.random.default_rng(0)
    rows, columns = values.shape
    means = [
        values[generator.integers(rows, size=rows)][:, generator.integers(columns, size=columns)].mean()
        for _ in range(draws)
    ]
    return np.std(means)


@pytest.mark.parametrize(("of_trainings", "of_problems"), [(0.1, 0.3), (0.02, 0.3), (0.2, 0.05)])
def test_error_agrees_with_a_bootstrap_over_both_levels(of_trainings, of_problems):
    generator = np.random.default_rng(1)
    values = of_trainings * generator.standard_normal((20, 1)) + of_problems * generator.standard_normal((1, 60))
    values = values + 0.01 * generator.standard_normal((20, 60))
    # 4,000 draws leave 1 % of the bootstrap's error open, and it takes 1/T and 1/P off the variances
    assert spread(values).error == pytest.approx(bootstrap_error(values), rel=0.07)


def test_error_is_that_of_repeated_experiments():
    """Means of many sets of trainings and problems, drawn anew, vary as the estimate says on average."""
    generator = np.random.default_rng(2)
    means, variances = [], []
    for _ in range(1500):
        rates = 0.5 + 0.1 * generator.uniform(-1, 1, (4, 1)) + 0.3 * generator.uniform(-1, 1, (1, 20))
        values = generator.binomial(4, rates) / 4
        found = spread(values)
        means.append(found.mean)
        variances.append(found.error**2)
    # The variance of 1,500 means is known to 4 % (one standard deviation); the floor adds a little to the estimate
    assert np.mean(variances) == pytest.approx(np.var(means), rel=0.15)


def test_one_training_says_nothing_about_others():
    found = spread([[1.0, 0.5, 0.0]])
    assert found.error_of_problems == pytest.approx(0.5 / 3**0.5)
    assert (found.deviation, found.error_of_trainings, found.error, found.interval) == (None,) * 4


def test_difference_is_paired_by_problem():
    hard_and_easy = [[0.0, 1.0, 0.5], [0.1, 1.0, 0.6]]
    found = spread(hard_and_easy, [[0.0, 0.9, 0.5]])
    assert found.mean == pytest.approx((0.05 + 0.1 + 0.05) / 3)
    assert found.error_of_problems == pytest.approx(np.std([0.05, 0.1, 0.05], ddof=1) / 3**0.5)
    alike = spread(hard_and_easy, hard_and_easy)
    assert alike.mean == alike.error_of_problems == 0
    assert alike.error_of_trainings == pytest.approx(math.sqrt(2) * spread(hard_and_easy).error_of_trainings)


def test_three_trainings_by_hand(write):
    files = [
        write("a", {"base": [WRONG, HALF], "r/seed_0/checkpoint-5": [HALF, RIGHT]}),
        write("b", {"r/seed_1/checkpoint-5": [HALF, HALF]}),
        write("c", {"r/seed_2/checkpoint-5": [RIGHT, RIGHT]}),
    ]
    found, tables = aggregate(files)
    own = row(found["rows"], model="r", dataset="b", minus=None)
    assert (own["trainings"], own["problems"], own["decoding_seeds"]) == (3, 2, [0])
    assert own["mean"] == pytest.approx(0.75)  # of 0.75, 0.5 and 1
    assert own["deviation"] == pytest.approx(0.25)
    assert own["error_of_problems"] == pytest.approx(1 / 12)  # 2/3 and 5/6
    difference = row(found["rows"], model="r", minus="base")
    assert difference["mean"] == pytest.approx(0.5)  # base: 0.25
    assert difference["error_of_problems"] == pytest.approx(1 / 6)  # 2/3 - 0 and 5/6 - 1/2
    assert row(found["rows"], model="base")["mean"] == 0.25
    assert found["variation"] == [
        "r: 3 trainings, whose seeds are not recorded; decoding seed 0; 2 problems of b",
    ]
    assert "| b, r | 75.0 ± " in tables and "best on the test set (optimistic)" in tables


def test_decoding_seeds_of_one_training(write):
    files = [write(f"s{seed}", {"r/checkpoint-5": rights}, seed=seed) for seed, rights in enumerate(
        ([HALF, RIGHT], [HALF, HALF])
    )]  # fmt: skip
    found, _ = aggregate(files)
    own = row(found["rows"], model="r")
    assert own["mean"] == pytest.approx(0.625)
    assert own["deviation_of_decoding"] == pytest.approx(0.25 / 2**0.5)
    assert (own["trainings"], own["decoding_seeds"], own["deviation"], own["error"]) == (1, [0, 1], None, None)
    assert "one training: how far" in found["variation"][0] and "decoding seeds 0, 1" in found["variation"][0]


def test_last_best_on_held_out_and_best_on_the_test_set(write, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run_config.json").write_text(json.dumps({"training": {"seed": 7}}))
    held_out = {5: 0.2, 10: 0.9, 15: 0.3}
    logged = [{"step": step, "eval_accuracy": value} for step, value in held_out.items()] + [{"step": 15, "loss": 1}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in logged))
    scores = {5: [RIGHT, RIGHT], 10: [RIGHT, HALF], 15: [WRONG, HALF]}
    file = write("a", {f"{run}/checkpoint-{step}": rights for step, rights in scores.items()})
    found, tables = aggregate([file])
    steps = {r["choice"]: (r["steps"], r["mean"]) for r in found["rows"]}
    assert steps == {"last": ([15], 0.25), "held_out": ([10], 0.75), "best": ([5], 1.0)}
    assert f"| b, {run} | 25.0 ± 25.0 | 75.0 ± 25.0 | 100.0 ± 0.0 |" in tables
    assert found["notes"] == []

    (run / "metrics.jsonl").write_text("")
    found, _ = aggregate([file])
    assert {r["choice"] for r in found["rows"]} == {"last", "best"}
    assert "no score on a held-out set" in found["notes"][0]


def test_held_out_data_set_of_the_files(write):
    rights = {5: ([WRONG], [RIGHT]), 10: ([RIGHT], [HALF])}
    every = {}
    for step, (test, held_out) in rights.items():
        every |= {(f"r/checkpoint-{step}", "b"): test, (f"r/checkpoint-{step}", "valid"): held_out}
    file = write("a", every)
    found, _ = aggregate([file], held_out="valid")
    assert {(r["dataset"], r["choice"]): r["steps"] for r in found["rows"]} == {
        ("b", "last"): [10],
        ("b", "held_out"): [5],
        ("b", "best"): [10],
    }
    with pytest.raises(ValueError, match="--held_out other: not among the data sets of the files, b, valid"):
        aggregate([file], held_out="other")


def test_seeds_are_those_of_the_runs(write, tmp_path):
    files = []
    for seed in (3, 4):
        run = tmp_path / f"seed_{seed}"
        run.mkdir()
        (run / "metrics.jsonl").write_text("")
        (run / "run_config.json").write_text(json.dumps({"training": {"seed": seed}}))
        files.append(write(str(seed), {f"{run}/checkpoint-1": [RIGHT]}))
    assert "2 trainings with the seeds 3, 4;" in aggregate(files)[0]["variation"][0]
    (run / "run_config.json").write_text(json.dumps({"training": {"seed": 3}}))
    assert "2 trainings with the same seed, 3;" in aggregate(files)[0]["variation"][0]


def test_two_recipes_are_compared_problem_by_problem(write, tmp_path, capsys):
    first = [write(f"a{n}", {f"a/seed_{n}/checkpoint-1": [RIGHT, HALF]}) for n in (0, 1)]
    second = [write(f"b{n}", {f"b/seed_{n}/checkpoint-1": [HALF, WRONG]}) for n in (0, 1)]
    words = [*first, "--compare", *second, "--output_file", tmp_path / "new" / "table.json"]
    main([str(word) for word in words])
    table = json.loads((tmp_path / "new" / "table.json").read_text())
    difference = row(table["rows"], model="a", minus="b")
    assert (difference["mean"], difference["error"]) == (0.5, 0)
    assert capsys.readouterr().out == (tmp_path / "new" / "table.md").read_text()
    with pytest.raises(ValueError, match="--compare .*a0.json: is among the first files"):
        aggregate(first, first[:1])


def test_ungraded_problems_are_left_out_of_all(write):
    files = [
        write("a", {"r/s0/checkpoint-1": [RIGHT, (True, None)]}),
        write("b", {"r/s1/checkpoint-1": [HALF, RIGHT]}),
    ]
    own = row(aggregate(files)[0]["rows"], model="r")
    assert (own["problems"], own["mean"]) == (1, 0.75)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.5}, "temperature: 1.0 -> 0.5"),
        ({"data_sets": {"b": "other"}}, "data_sets b"),
        ({"prompts": {"b": "other"}}, "prompts b"),
        ({"versions": {"vllm": "1", "math-verify": "2"}}, "math-verify 1 -> 2"),
        ({"base_model_version": "w"}, "base_model_version: v -> w"),
        ({"merge_adapter": True}, "merge_adapter: None -> True"),
    ],
)
def test_other_settings_are_refused_by_name(write, settings, message):
    files = [write("a", {"r/s0": [RIGHT]}), write("b", {"r/s1": [RIGHT]}, **settings)]
    with pytest.raises(ValueError, match=message):
        aggregate(files)


def test_other_files_are_refused(write, tmp_path):
    file = write("a", {"r/s0": [RIGHT]})
    assert "vllm 1 -> 2" in aggregate(
        [file, write("b", {"r/s1": [RIGHT]}, versions={"vllm": "2", "math-verify": "1"})]
    )[0]["notes"][0]  # fmt: skip
    with pytest.raises(ValueError, match=r"samples and problems \(2, 1\) -> \(2, 2\)"):
        aggregate([file, write("c", {"r/s1": [RIGHT, RIGHT]})])
    with pytest.raises(ValueError, match="with --seed 0 is in another file, too"):
        aggregate([file, write("d", {"r/s0": [RIGHT]})])
    other = write("e", {"r/s0": [RIGHT]}, seed=1)
    other.write_text(other.read_text().replace("hash of", "not"))
    with pytest.raises(ValueError, match="r/s0 is another adapter in another file"):
        aggregate([file, other])
    with pytest.raises(ValueError, match="only the base model"):
        aggregate([write("f", {"base": [RIGHT]})])
    file.write_text(file.read_text().replace('"complete": true', '"complete": false'))
    with pytest.raises(ValueError, match=r"a.json: its evaluation is not complete"):
        aggregate([file])
    for text in ("{}", "no"):
        (tmp_path / "g.json").write_text(text)
        with pytest.raises(ValueError, match="g.json: not an output file"):
            aggregate([tmp_path / "g.json"])
