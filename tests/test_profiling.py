"""Traces of chosen steps: what is in them, and ranges that are refused."""

import gzip
import json

import pytest
from helpers import script_rollouts

from grpo_train import GRPOArguments
from opsd.run.profiling import ProfileCallback, parse_steps
from opsd_train import OPSDArguments


def test_a_trace_has_the_phases_of_the_steps(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=4, callbacks=[ProfileCallback("2-3", tmp_path)])
    script_rollouts(trainer)
    trainer.train()
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "steps_2-3.json.gz"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    for phase in ("rollout", "teacher", "student", "preparation"):
        assert names.count(f"opsd/{phase}") == 2, phase
    assert any(event["name"] == "aten::mm" for event in events)


@pytest.mark.parametrize(("text", "steps"), [("3", (3, 3)), ("3-4", (3, 4)), ("12-12", (12, 12))])
def test_ranges(text, steps):
    assert parse_steps(text) == steps


@pytest.mark.parametrize("arguments", [OPSDArguments, GRPOArguments])
@pytest.mark.parametrize("text", ["0", "0-2", "4-3", "3-", "-3", "1-2-3", "a-b", "", "3:4"])
def test_ranges_that_are_refused(arguments, text):
    with pytest.raises(ValueError, match=f"--profile_steps {text}: must be a step or a range of steps"):
        arguments(profile_steps=text)


@pytest.mark.parametrize("steps", ["2-3", "3"])
def test_steps_that_the_run_does_not_have_are_refused(make_trainer, tmp_path, steps):
    trainer = make_trainer(max_steps=2, callbacks=[ProfileCallback(steps, tmp_path)])
    with pytest.raises(ValueError, match="--profile_steps .*-3: the run does the steps 1 to 2; name some of them"):
        trainer.train()
