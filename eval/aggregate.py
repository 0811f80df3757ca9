"""
One table of several evaluations: scores with their spread over trainings, decoding seeds and problems.

    python eval/aggregate.py outputs/a/seed_*/results/*.json --compare outputs/b/seed_*/results/*.json

The first files are those of a recipe, those behind --compare of another one. Each is an output file of
eval/evaluate_math.py. Files of the same adapters with other decoding seeds are put together.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eval.report import STEP, interval_text, markdown, percent
from eval.run_files import replace_file
from eval.scores import spread
from opsd.run.record import find_record
from opsd.run.report import METRICS

BASE = "base"
HELD_OUT_METRIC = "eval_accuracy"  # of metrics.jsonl
FREE = {"seed", "base_model", "adapters", "versions"}  # settings that may differ, or that are compared otherwise
CHOICES = {"last": "last", "held_out": "best on held-out", "best": "best on the test set (optimistic)"}

Scores = dict[int, float]  # problem -> share of right samples; NaN: ungraded


@dataclass
class Training:
    """What the files hold of one training (or of the base model, which has step 0 alone)."""

    name: str
    seed: int | None = None  # of the training; `None`: not recorded
    adapters: dict[float, str] = field(default_factory=dict)  # step -> hash of its files; infinity: the final one
    scores: dict[tuple[float, str], dict[int, Scores]] = field(default_factory=dict)  # (step, data set) -> by seed
    held_out: dict[float, float] = field(default_factory=dict)  # step -> score that was logged in training

    def mean(self, step: float, dataset: str) -> Scores:
        """Mean over the decoding seeds."""
        by_seed = list(self.scores[step, dataset].values())
        return {problem: statistics.fmean(scores[problem] for scores in by_seed) for problem in by_seed[0]}

    def steps(self, dataset: str) -> list[float]:
        return sorted(step for step, name in self.scores if name == dataset)


def read_files(files: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """Read output files of the evaluator. Raises `ValueError` for others, and for those of a run that goes on."""
    reports = {}
    for file in files:
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
            report["settings"]["adapters"], report["results"]
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: not an output file of eval/evaluate_math.py ({error!r})") from error
        if not report["complete"]:
            raise ValueError(f"{file}: its evaluation is not complete; start the same command again, then this one")
        reports[file] = report
    return reports


def check_comparable(reports: Mapping[Path, Mapping[str, Any]]) -> list[str]:
    """
    Compare the settings of all files with those of the first one.

    Returns:
        Notes on what differs without being refused: the versions of packages that sample.

    Raises:
        ValueError: with each setting that differs, and in which file.
    """
    (first_file, first), *others = reports.items()
    refused, notes = [], []
    for file, report in others:
        ours, theirs = first["settings"], report["settings"]
        pairs = {name: (ours.get(name), theirs.get(name)) for name in (ours.keys() | theirs.keys()) - FREE}
        for name, (before, now) in sorted(pairs.items()):
            if isinstance(before, dict) and isinstance(now, dict):
                refused += [f"{file}: {name} {key}" for key in before if key in now and now[key] != before[key]]
            elif before != now:
                refused.append(f"{file}: {name}: {before} -> {now}")
        for package, version in ours["versions"].items():
            if (other := theirs["versions"].get(package)) != version:
                text = f"{file}: {package} {version} -> {other}"
                (refused if package == "math-verify" else notes).append(text)
        sizes = {result["dataset"]: (result["val_n"], result["num_problems"]) for result in first["results"]}
        for result in report["results"]:
            size = result["val_n"], result["num_problems"]
            if sizes.setdefault(result["dataset"], size) != size:
                text = f"{result['dataset']}: samples and problems {sizes[result['dataset']]} -> {size}"
                refused.append(f"{file}: {text}")
    if refused:
        raise ValueError(
            f"the files differ from {first_file} in what scores depend on:\n  " + "\n  ".join(dict.fromkeys(refused))
            + "\nleave the others out, or evaluate them with the same settings"
        )  # fmt: skip
    return list(dict.fromkeys(notes))


def find_run(model: str, file: Path) -> Path | None:
    """Return the folder of the run that an adapter is of, as it was named or as the parent of the results' folder."""
    folder = Path(model)
    run = folder.parent if STEP.fullmatch(folder.name) else folder
    return next((path for path in (run, file.absolute().parent.parent) if (path / METRICS).is_file()), None)


def read_held_out(run: Path) -> dict[float, float]:
    """Step -> accuracy on the held-out set, as a run logged it."""
    lines = (run / METRICS).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    return {row["step"]: row[HELD_OUT_METRIC] for row in rows if row.get(HELD_OUT_METRIC) is not None}


def shares(result: Mapping[str, Any]) -> Scores:
    return {
        problem["problem_id"]: math.nan if None in problem["correct"] else statistics.fmean(problem["correct"])
        for problem in result["problems"]
    }


def collect(reports: Mapping[Path, Mapping[str, Any]]) -> tuple[Training, list[Training]]:
    """
    Sort the results of a recipe's files by training; returns the base model and the trainings.

    Raises:
        ValueError: if samples come twice, or one folder stands for two adapters.
    """
    base, trainings = Training(BASE), dict[str, Training]()
    for file, report in reports.items():
        settings = report["settings"]
        for result in report["results"]:
            model, step, training = result["model"], 0.0, base
            if model != BASE:
                named = STEP.fullmatch(Path(model).name)
                run, step = (Path(model).parent, float(named[1])) if named else (Path(model), math.inf)
                training = trainings.setdefault(str(run), Training(str(run)))
                own = settings["adapters"][model]
                if training.adapters.setdefault(step, own) != own:
                    raise ValueError(f"{file}: {model} is another adapter in another file; give its run another name")
                if (found := find_run(model, file)) is not None:
                    training.seed = ((find_record(found) or {}).get("training") or {}).get("seed")
                    training.held_out = read_held_out(found)
            by_seed = training.scores.setdefault((step, result["dataset"]), {})
            if settings["seed"] in by_seed and not (model == BASE and by_seed[settings["seed"]] == shares(result)):
                raise ValueError(
                    f"{file}: {model} on {result['dataset']} with --seed {settings['seed']} is in another file, too; "
                    "leave one of them out"
                )
            by_seed[settings["seed"]] = shares(result)
    return base, list(trainings.values())


def choose_step(training: Training, dataset: str, choice: str, held_out: str | None) -> float | None:
    """Choose the checkpoint of a training that counts, see `CHOICES`; of equal ones the first. `None`: unknown."""
    steps = training.steps(dataset)
    if not steps or choice == "last":
        return steps[-1] if steps else None

    def average(step: float, name: str) -> float:
        return statistics.fmean(value for value in training.mean(step, name).values() if not math.isnan(value))

    if choice == "best":
        return max(steps, key=lambda step: average(step, dataset))
    if held_out is not None:
        known = [step for step in steps if (step, held_out) in training.scores]
        return max(known, key=lambda step: average(step, held_out)) if known else None
    known = [step for step in steps if step in training.held_out]
    return max(known, key=training.held_out.__getitem__) if known else None


def table_rows(
    name: str, trainings: Sequence[Training], bases: Mapping[str, Scores], held_out: str | None
) -> tuple[list[dict[str, Any]], dict[tuple[str, str], list[Scores]]]:
    """
    Scores of a recipe on each data set, for each way to choose a checkpoint, and their differences from the base.

    Returns:
        The rows, and the scores of each training behind them by data set and choice.
    """
    rows, behind = [], {}
    for dataset in dict.fromkeys(dataset for training in trainings for _, dataset in training.scores):
        if dataset == held_out:
            continue
        for choice in CHOICES:
            steps = {training.name: choose_step(training, dataset, choice, held_out) for training in trainings}
            if None in steps.values():  # one without would make the mean another one
                continue
            chosen = [(training, step) for training in trainings if (step := steps[training.name]) is not None]
            scores = [training.mean(step, dataset) for training, step in chosen]
            behind[dataset, choice] = scores
            own = {"dataset": dataset, "model": name, "choice": choice, "trainings": len(scores)}
            own["steps"] = [None if math.isinf(step) else int(step) for _, step in chosen]
            own |= {"decoding_seeds": sorted({seed for t, step in chosen for seed in t.scores[step, dataset]})}
            own["deviation_of_decoding"] = decoding_deviation([t.scores[step, dataset] for t, step in chosen])
            rows.append(own | measure(scores))
            if dataset in bases:
                rows.append(own | {"minus": BASE} | measure(scores, [bases[dataset]]))
    return rows, behind


def decoding_deviation(by_seed: Sequence[Mapping[int, Scores]]) -> float | None:
    """Standard deviation of a mean over decoding seeds of the same model; `None` where no model has two of them."""
    means = [
        [statistics.fmean(value for value in scores.values() if not math.isnan(value)) for scores in seeds.values()]
        for seeds in by_seed
        if len(seeds) > 1
    ]
    return math.sqrt(statistics.fmean(map(statistics.variance, means))) if means else None


def measure(scores: Sequence[Scores], minus: Sequence[Scores] | None = None) -> dict[str, Any]:
    """
    Return `spread` of scores over the problems that are graded in all of them, with their number.

    Raises:
        ValueError: if they are not of the same problems.
    """
    every = [*scores, *(minus or [])]
    if any(other.keys() != every[0].keys() for other in every):
        raise ValueError("the results are not of the same problems; evaluate with the same --num_samples")
    problems = [problem for problem in every[0] if not any(math.isnan(other[problem]) for other in every)]
    if not problems:
        raise ValueError("no problem is graded in all results; choose another --grader, or leave the data set out")
    values, other = ([[row[p] for p in problems] for row in part] for part in (scores, minus or []))
    return {"problems": len(problems)} | asdict(spread(values, other or None))


def aggregate(
    files: Sequence[Path], compared: Sequence[Path] = (), held_out: str | None = None
) -> tuple[dict[str, Any], str]:
    """
    Put the results of evaluations together.

    Args:
        files: of a recipe.
        compared: of another one, if there is one.
        held_out: data set in the files by which a checkpoint is chosen; `None`: by what the runs logged of theirs.

    Returns:
        `rows` (one for each data set, recipe, choice of checkpoint, and difference), `variation` and `notes` as
        sentences; and the same as Markdown. Shares in [0, 1].

    Raises:
        ValueError: for files that do not belong together, saying why.
    """
    recipes = [read_files(files), read_files(compared)]
    if twice := recipes[0].keys() & recipes[1].keys():
        raise ValueError(f"--compare {min(twice)}: is among the first files, too")
    everything = recipes[0] | recipes[1]
    notes = [f"other versions: {text}" for text in check_comparable(everything)]
    datasets = {result["dataset"] for report in everything.values() for result in report["results"]}
    if held_out is not None and held_out not in datasets:
        raise ValueError(f"--held_out {held_out}: not among the data sets of the files, {', '.join(sorted(datasets))}")
    versions = {report["settings"]["base_model_version"] for report in everything.values()}
    if len(versions) > 1:
        raise ValueError(
            "the files have different base models, by the hashes of their weights; scores of whole models are "
            "compared by eval/evaluate_math.py's own files"
        )
    base, _ = collect(everything)
    bases = {dataset: base.mean(step, dataset) for step, dataset in base.scores if dataset != held_out}
    rows = [
        {"dataset": dataset, "model": BASE, "choice": "last", "trainings": 0, "steps": []}
        | {"decoding_seeds": sorted(by_seed), "deviation_of_decoding": decoding_deviation([by_seed])}
        | measure([bases[dataset]])
        for (_, dataset), by_seed in base.scores.items()
        if dataset != held_out
    ]
    variation, behind = [], []
    for reports in filter(None, recipes):
        _, trainings = collect(reports)
        if not trainings:
            raise ValueError(f"{next(iter(reports))}: no adapter was evaluated in these files, only the base model")
        name = recipe_name(trainings)
        variation.append(describe_variation(name, trainings))
        own, scores = table_rows(name, trainings, bases, held_out)
        rows += own
        behind.append((name, scores))
        if not any(row["choice"] == "held_out" for row in own):
            notes.append(f"{name}: no score on a held-out set ({HELD_OUT_METRIC} in {METRICS}, or --held_out)")
    if len(behind) == 2:
        (name, first), (other, second) = behind
        for dataset, choice in first.keys() & second.keys():
            difference = measure(first[dataset, choice], second[dataset, choice])
            rows.append({"dataset": dataset, "model": name, "choice": choice, "minus": other} | difference)
    val_n = next(iter(everything.values()))["results"][0]["val_n"]
    return {"rows": rows, "variation": variation, "notes": notes}, make_tables(rows, [*variation, *notes], val_n)


def recipe_name(trainings: Sequence[Training]) -> str:
    """The folder that the runs have in common; for a single one its own."""
    runs = [Path(training.name) for training in trainings]
    if len(runs) == 1:
        return str(runs[0])
    parents = [run.parent for run in runs]
    return str(parents[0]) if len(set(parents)) == 1 else " + ".join(map(str, runs))


def describe_variation(name: str, trainings: Sequence[Training]) -> str:
    """Say in a sentence which variation the files hold."""
    seeds = [training.seed for training in trainings]
    if len(trainings) == 1:
        of_trainings = "one training: how far another one would be from it is not known"
    elif None in seeds:
        of_trainings = f"{len(trainings)} trainings, whose seeds are not recorded"
    elif len(set(seeds)) == 1:
        of_trainings = f"{len(trainings)} trainings with the same seed, {seeds[0]}"
    else:
        of_trainings = f"{len(trainings)} trainings with the seeds {', '.join(map(str, seeds))}"
    decoding = sorted({seed for training in trainings for by_seed in training.scores.values() for seed in by_seed})
    of_decoding = f"decoding seed{'s' * (len(decoding) > 1)} {', '.join(map(str, decoding))}"
    sizes: dict[str, int] = {}
    for training in trainings:
        for (_, dataset), by_seed in training.scores.items():
            sizes[dataset] = len(next(iter(by_seed.values())))
    problems = ", ".join(f"{size} problems of {dataset}" for dataset, size in sizes.items())
    return f"{name}: {of_trainings}; {of_decoding}; {problems}"


def make_tables(rows: Sequence[Mapping[str, Any]], sentences: Sequence[str], val_n: int) -> str:
    """Markdown, in percent: the three choices beside each other, then each score with its spread, then differences."""
    scores = [row for row in rows if "minus" not in row]
    cells: dict[str, dict[str, str]] = {}
    for row in scores:
        error = row["error"] if row["error"] is not None else row["error_of_problems"]
        text = percent(row["mean"]) + ("" if error is None else f" ± {percent(error)}")
        cells.setdefault(f"{row['dataset']}, {row['model']}", {})[row["choice"]] = text
    summary = [[name, *(own.get(choice, "") for choice in CHOICES)] for name, own in cells.items()]
    title = f"Avg@{val_n} ± standard error, over trainings and problems where there are several trainings\n\n"
    sections = [title + markdown(["data set, model", *CHOICES.values()], summary)]
    header = ["trainings", "mean", "sd of a training", "sd of decoding", "se, problems", "se, both", "95 % interval"]
    lines = []
    for row in scores:
        name = f"{row['dataset']}, {row['model']}" + ("" if row["model"] == BASE else f", {CHOICES[row['choice']]}")
        lines.append([name, str(row["trainings"]), percent(row["mean"]), percent(row["deviation"])])
        lines[-1] += [percent(row["deviation_of_decoding"]), percent(row["error_of_problems"])]
        lines[-1] += [percent(row["error"]), interval_text(row["interval"])]
    sections.append(markdown(["data set, model, checkpoint", *header], lines))
    lines = []
    for row in rows:
        if "minus" in row:
            lines.append([f"{row['dataset']}, {row['model']} - {row['minus']}, {CHOICES[row['choice']]}"])
            lines[-1] += [f"{100 * row['mean']:+.1f}", percent(row["error_of_trainings"])]
            lines[-1] += [percent(row["error_of_problems"]), percent(row["error"]), interval_text(row["interval"])]
    if lines:
        header = ["paired difference", "points", "se, trainings", "se, problems", "se, both", "95 % interval"]
        sections.append(markdown(header, lines))
    sections.append("".join(f"- {sentence}\n" for sentence in sentences))
    return "\n".join(sections)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="+", type=Path, help="output files of eval/evaluate_math.py, of one recipe")
    add("--compare", nargs="+", type=Path, default=[], help="those of another recipe")
    add("--held_out", help="data set of the files that chooses the checkpoint; default: what the runs logged")
    add("--output_file", type=Path, help="JSON; beside it the tables, in .md")
    args = parser.parse_args(arguments)
    try:
        result, tables = aggregate(args.files, args.compare, args.held_out)
    except ValueError as error:
        parser.error(str(error))
    if args.output_file is not None:
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
        header = {"files": [str(file) for file in args.files], "compare": [str(file) for file in args.compare]}
        replace_file(args.output_file, json.dumps(header | result, indent=1).encode())
        replace_file(args.output_file.with_suffix(".md"), tables.encode())
    sys.stdout.write(tables)


if __name__ == "__main__":
    main()
