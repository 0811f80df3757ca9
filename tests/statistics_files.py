"""Token statistics as a run saves them: written from given numbers, or from a model's scores of given completions."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data_collator import SelfDistillationDataCollator, start_rollouts
from opsd.losses import generalized_jsd

NUM_TOP = 5


def make_row(step, tokens, divergence, problem="1+1", **columns):
    """A completion's row, with plain values for all that is not given."""
    size = len(tokens)
    top = [[token, "b", "c", "d", "e"] for token in tokens]
    logs = [[-0.1, -3.0, -4.0, -5.0, -6.0]] * size

    def flat(lists):
        return [entry for row in lists for entry in row]

    row = {
        "step": step, "index": 0, "row": 0, "problem": problem, "reference": "two", "answer": "2",
        "student_prompt": f"Student: {problem}", "teacher_prompt": f"Teacher: {problem}, two",
        "completion": "".join(tokens), "truncated": False, "correct": True,
        "token_ids": [sum(map(ord, token)) for token in tokens], "tokens": list(tokens), "kinds": [0] * size,
        "epistemic": [False] * size, "divergence": list(divergence), "weight": [1.0] * size,
        "student_logprob": [-0.1] * size, "teacher_logprob": [-1.0] * size, "student_entropy": [0.2] * size,
        "teacher_entropy": [0.3] * size, "clipped": [0.0] * size, "wrong_way": [False] * size,
        "student_top_ids": [0] * (size * NUM_TOP), "teacher_top_ids": [0] * (size * NUM_TOP),
        "student_top_tokens": flat(top), "teacher_top_tokens": flat(row[::-1] for row in top),
        "student_top_logprobs": flat(logs), "teacher_top_logprobs": flat(logs), "top_overlap": [1.0] * size,
    }  # fmt: skip
    assert columns.keys() <= row.keys()
    return row | columns


def write_statistics(folder: Path, rows) -> None:
    """Write a file for each step of the rows."""
    (folder / "token_statistics").mkdir(parents=True, exist_ok=True)
    for step in {row["step"] for row in rows}:
        table = pa.Table.from_pylist([row for row in rows if row["step"] == step])
        pq.write_table(table, folder / "token_statistics" / f"step_{step:06d}.parquet", compression="zstd")


@torch.no_grad()
def score(model, teacher, tokenizer, examples, completions, step=1, beta=0.5):
    """Rows of completions, lists of ids, for examples of the data: what both roles say of each token."""
    collator = SelfDistillationDataCollator(tokenizer, student_thinking=False, teacher_thinking=False)
    rollouts = start_rollouts([dict(example) | collator.encode(example) for example in examples])
    rows = []
    for index, (example, rollout, ids) in enumerate(zip(examples, rollouts, completions, strict=True)):
        prompts = (rollout.prompt_ids, rollout.teacher_prompt_ids)
        student, other = (
            network(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            for network, prompt in zip((model, teacher), prompts, strict=True)
        )  # (C, V) each
        columns = {"divergence": generalized_jsd(student[None], other[None], beta=beta)[0].tolist()}
        for role, logs in (("student", student), ("teacher", other)):
            top = logs.topk(NUM_TOP)
            columns[f"{role}_logprob"] = logs[torch.arange(len(ids)), ids].tolist()
            columns[f"{role}_entropy"] = (-(logs.exp() * logs).sum(-1)).tolist()
            columns[f"{role}_top_ids"] = top.indices.flatten().tolist()
            columns[f"{role}_top_tokens"] = [tokenizer.decode([i]) for i in columns[f"{role}_top_ids"]]
            columns[f"{role}_top_logprobs"] = top.values.flatten().tolist()
        text = tokenizer.decode(ids)
        columns |= {"index": index, "reference": example["solution"], "answer": example["answer"], "token_ids": ids}
        columns |= {"correct": f"\\boxed{{{example['answer']}}}" in text}
        columns |= {f"{r}_prompt": tokenizer.decode(p) for r, p in zip(("student", "teacher"), prompts, strict=True)}
        tokens = [tokenizer.decode([i]) for i in ids]
        rows.append(make_row(step, tokens, columns.pop("divergence"), example["problem"], **columns))
    return rows
