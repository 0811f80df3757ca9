"""The alarm: each rule on sequences of logs, what it must not take for a sign, resume, and the end of a run."""

import json
import random
from types import SimpleNamespace

import pytest
from helpers import Recorder, script_rollouts, work_out

from data_collator import SOLUTION, TEACHER_PROMPT
from opsd.alarm import BLOCK_ROLLOUTS, BLOCK_STEPS, Alarm, CollapseAlarm, LeakDetector, teacher_phrases
from opsd_trainer import OPSDConfig

HEALTHY = {
    "loss": 0.1,
    "completions/mean_length": 100.0,
    "completions/clipped_ratio": 0.1,
    "completions/leaked_ratio": 0.0,
    "entropy": 0.3,
    "entropy/teacher": 0.2,
    "rewards/accuracy/mean": 0.5,
}
BATCH = 32


def run_logs(values_of_step, num_steps=30, logging_steps=1):
    """Logs of a run with 32 rollouts a step; `values_of_step(step)` replaces values of a healthy one."""
    logs, tokens = [], 0.0
    for last in range(logging_steps, num_steps + 1, logging_steps):
        steps = [HEALTHY | values_of_step(step) for step in range(last - logging_steps + 1, last + 1)]
        mean = {name: sum(values[name] for values in steps) / logging_steps for name in HEALTHY}
        tokens += BATCH * sum(values["completions/mean_length"] for values in steps)
        logs.append(mean | {"num_generated_tokens": tokens, "step": last})
    return logs


def signs(logs, group_size=1):
    alarm = Alarm(group_size)
    return [sign for entry in logs for sign in alarm.read(entry)]


def change(metric, value, since=11):
    return lambda step: {metric: value} if step >= since else {}


@pytest.mark.parametrize("logging_steps", [1, 5, 10])
@pytest.mark.parametrize(
    ("metric", "value", "finding"),
    [
        ("completions/clipped_ratio", 0.4, "more rollouts reach --max_completion_length: 10 % at the start, 40 % now"),
        ("completions/mean_length", 49.0, "the rollouts' mean length is 49 tokens, 100 at the start"),
        ("completions/mean_length", 201.0, "the rollouts' mean length is 201 tokens, 100 at the start"),
        ("entropy", 0.039, "the student's entropy falls: 0.3 nats per token at the start, 0.039 now"),
        ("entropy", 0.91, "the student's entropy explodes: 0.3 nats per token at the start, 0.91 now"),
        ("rewards/accuracy/mean", 0.25, "fewer rollouts are right: 50 % at the start, 25 % now"),
        ("completions/leaked_ratio", 0.08, "rollouts with words of the teacher's prompt: 0 % at the start, 8 % now"),
    ],
)
def test_each_rule_fires_once_in_the_second_block(metric, value, finding, logging_steps):
    (sign,) = signs(run_logs(change(metric, value), 60, logging_steps))
    block = max(BLOCK_STEPS, logging_steps)
    assert (sign.since, sign.step, sign.finding) == (11, 10 + 2 * block, finding)
    assert str(sign).startswith(f"sign of a collapse since step 11: {finding}. What to try: ") and sign.advice


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("completions/clipped_ratio", 0.29),
        ("completions/clipped_ratio", 0.0),
        ("completions/mean_length", 51.0),
        ("completions/mean_length", 199.0),
        ("entropy", 0.045),  # of the teacher's 0.2 at the start, not of the student's 0.3
        ("entropy", 0.89),
        ("rewards/accuracy/mean", 0.41),
        ("rewards/accuracy/mean", 1.0),
        ("completions/leaked_ratio", 0.04),
    ],
)
def test_no_rule_fires_below_its_threshold(metric, value):
    assert signs(run_logs(change(metric, value), 60)) == []


def test_entropy_that_starts_near_zero_does_not_explode():
    assert signs(run_logs(lambda step: {"entropy": 0.01 if step <= 10 else 0.1})) == []


def test_a_sign_has_to_stay():
    """One bad block between good ones is none; after two of them the sign counts from the first."""
    assert signs(run_logs(lambda step: {"entropy": 2.0} if 11 <= step <= 15 else {})) == []
    (sign,) = signs(run_logs(lambda step: {"entropy": 2.0} if 11 <= step <= 15 or step >= 21 else {}, 40))
    assert (sign.since, sign.step) == (21, 30)


def test_shares_are_held_against_their_error():
    """A fall of 17 points is one of 4.4 standard errors in single rollouts, and of 1.5 where 8 belong together."""
    logs = run_logs(change("rewards/accuracy/mean", 0.33), logging_steps=10)
    assert len(signs(logs)) == 1 and signs(logs, group_size=8) == []


def test_accuracy_is_held_against_its_best():
    """It rises, and falls half the way back; what is above the start has still been lost."""

    def accuracy(lowest):
        return lambda step: {"rewards/accuracy/mean": 0.5 if step <= 10 else 0.9 if step <= 30 else lowest}

    (sign,) = signs(run_logs(accuracy(0.7), 60))
    assert (sign.since, sign.step) == (31, 40)
    assert sign.finding == "fewer rollouts are right: 90 % from step 11 on, 70 % now"
    assert signs(run_logs(accuracy(0.8), 60)) == []


def test_small_batches_make_longer_blocks():
    """Blocks of 32 steps with 4 rollouts each."""
    logs = [entry | {"num_generated_tokens": entry["num_generated_tokens"] / 8} for entry in run_logs(
        change("entropy", 2.0, since=33), 128
    )]  # fmt: skip
    (sign,) = signs(logs)
    assert (sign.since, sign.step) == (33, 96) and BLOCK_ROLLOUTS == 128


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_sign(seed):
    """200 steps of 16 rollouts from one distribution: right in half, truncated in half, lengths of a wide spread."""
    generator, logs, tokens = random.Random(seed), [], 0
    for step in range(1, 201):
        lengths = [min(1 + generator.expovariate(1 / 300), 1024) for _ in range(16)]
        tokens += sum(lengths)
        share = {name: sum(generator.random() < p for _ in range(16)) / 16 for name, p in (
            ("completions/clipped_ratio", 0.5), ("rewards/accuracy/mean", 0.5), ("completions/leaked_ratio", 0.02)
        )}  # fmt: skip
        entropy = {name: generator.lognormvariate(-1.5, 0.3) for name in ("entropy", "entropy/teacher")}
        logs.append(share | entropy | {"completions/mean_length": sum(lengths) / 16})
        logs[-1] |= {"num_generated_tokens": tokens, "step": step}
    assert signs(logs) == []


def test_held_out_accuracy_below_its_start():
    def evaluation(step, gain, error, name="eval"):
        return {"step": step, f"{name}_accuracy_gain": gain, f"{name}_accuracy_gain_standard_error": error}

    logs = [{"step": 0, "eval_accuracy": 0.5}, evaluation(10, -0.05, 0.02), evaluation(20, -0.07, 0.02)]
    logs += [evaluation(30, -0.5, 0.02), evaluation(30, 0.2, 0.01, "eval_b"), {"step": 40, "eval_accuracy_gain": -1.0}]
    (sign,) = signs(logs)
    assert (sign.step, sign.finding) == (20, "the held-out accuracy is 7.0 ± 2.0 points below its start")


def make_callback(stops):
    trainer, control = (
        SimpleNamespace(stop_reason=None, args=SimpleNamespace(num_generations=1)),
        SimpleNamespace(should_save=False, should_training_stop=False),
    )
    args = SimpleNamespace(num_generations=1, stop_on_collapse=stops)
    return CollapseAlarm(trainer), trainer, args, control


@pytest.mark.parametrize("stops", [False, True])
def test_warning_and_stop_of_a_resumed_run(caplog, stops):
    """Resumed between the two blocks, it fires as the whole run does; resumed after the sign it is silent."""
    logs = run_logs(change("entropy", 2.0))
    for resumed_at, warns in ((0, True), (15, True), (22, False)):
        callback, trainer, args, control = make_callback(stops)
        state = SimpleNamespace(log_history=logs[:resumed_at])
        caplog.clear()
        callback.on_train_begin(args, state, control)
        for end in range(resumed_at + 1, len(logs) + 1):
            state.log_history, state.global_step = logs[:end], end
            callback.on_log(args, state, control)
        expected = "step 20: sign of a collapse since step 11: the student's entropy explodes"
        assert [message.startswith(expected) for message in caplog.messages] == [True] * warns
        assert control.should_save == control.should_training_stop == (warns and stops)
        assert (trainer.stop_reason is not None) == (warns and stops)


def test_signs_follow_from_metrics_jsonl(tmp_path):
    """As the file of a run has them: null for what JSON has not, and the summary at the end."""
    logs = [entry | {"grad_norm": None} for entry in run_logs(change("entropy", 2.0))]
    logs += [{"step": 30, "train_loss": 0.1, "train_runtime": 3.0}]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in logs))
    assert signs([json.loads(line) for line in file.read_text().splitlines()]) == signs(logs) != []


# Words of the teacher's prompt


def settings_with(**settings):
    return OPSDConfig(use_cpu=True, bf16=False, **settings)


def test_phrases_are_the_teachers_alone():
    rows = [{"problem": "Try to solve this.", "solution": "We come to Solve  this problem."}]
    found = {" ".join(phrase) for phrase in teacher_phrases(settings_with(), rows)}
    assert {"the reference solution", "here is a", "reference solution begins", "paraphrase the reference"} <= found
    assert "step by step" not in found  # the student's
    assert "try to solve" not in found and "solve this problem" not in found  # the data's
    assert "solve this problem" in {" ".join(phrase) for phrase in teacher_phrases(settings_with(), [])}
    assert not any("{" in word for phrase in found for word in phrase)
    assert teacher_phrases(settings_with(teacher_context="none"), []) == set()
    own = settings_with(teacher_prompt="{problem} {solution}", teacher_system_prompt="You know it all")
    assert teacher_phrases(own, [{"history": [{"role": "user", "content": "you know it"}]}]) == {("know", "it", "all")}


def test_completions_with_words_of_the_teacher(make_trainer):
    trainer = make_trainer()
    encode = trainer.processing_class.encode
    texts = ["As the Reference\nsolution says: 5", "The solution is 5", SOLUTION.format(solution="5"), ""]
    assert trainer.find_leaks([encode(text) for text in texts]) == [True, False, True, False]
    nothing = LeakDetector(settings_with(teacher_prompt="{problem} {solution}"), trainer.processing_class, [])
    assert nothing([encode(TEACHER_PROMPT)]) == []


def test_run_stops_at_the_first_sign(make_trainer, tmp_path):
    """From step 3 on all is wrong and speaks of the reference: 32 rollouts a step, the third block ends at step 15."""
    trainer = make_trainer(
        per_device_train_batch_size=32,
        max_completion_length=60,
        max_steps=40,
        verify_rollouts=True,
        stop_on_collapse=True,
        save_strategy="steps",
        save_steps=100,
        callbacks=[recorder := Recorder()],
    )

    def write(problem, occurrence):
        if trainer.state.global_step < 5:
            return work_out(problem)
        return "The reference solution is " + work_out(problem, is_right=False)

    script_rollouts(trainer, write)
    trainer.train()
    assert trainer.state.global_step == 15 and (tmp_path / "run" / "checkpoint-15").is_dir()
    assert recorder.values("completions/leaked_ratio") == [0.0] * 5 + [1.0] * 10
    assert trainer.stop_reason.startswith("--stop_on_collapse at step 15: ")
    assert "fewer rollouts are right: 100 % at the start, 0 % now; rollouts with words of" in trainer.stop_reason
