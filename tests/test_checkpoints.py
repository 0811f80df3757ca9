"""Which folders count as checkpoints to go on from."""

import json
import re

import pytest

from opsd.run.checkpoints import MANIFEST, find_checkpoint, find_fault, find_last_complete, write_manifest

FILES = {
    "adapter_model.safetensors": "weights",
    "optimizer.pt": "moments",
    "global_step3/mp_rank_00_model_states.pt": "of DeepSpeed",
    "rng_state_0.pth": "random",
    "trainer_state.json": "{}",
}


def write_checkpoint(run, step, leave_out=()):
    checkpoint = run / f"checkpoint-{step}"
    for name, content in FILES.items():
        if name not in leave_out:
            (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
            (checkpoint / name).write_text(content)
    write_manifest(checkpoint)
    return checkpoint


def test_manifest_lists_all_files_with_their_sizes(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 3)
    assert json.loads((checkpoint / MANIFEST).read_text()) == {name: len(text) for name, text in FILES.items()}
    assert {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()} == {
        *FILES,
        MANIFEST,
    }
    assert find_fault(checkpoint) is None


@pytest.mark.parametrize(
    ("tear", "fault"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "it has no readable checkpoint_files.json"),
        (
            lambda folder: (folder / MANIFEST).write_text('{"optimizer.pt": 7'),
            "it has no readable checkpoint_files.json",
        ),
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda folder: (folder / "optimizer.pt").write_text("mom"), "optimizer.pt has 3 bytes instead of 7"),
        (
            lambda folder: (folder / "global_step3" / "mp_rank_00_model_states.pt").unlink(),
            "global_step3/mp_rank_00_model_states.pt is missing",
        ),
    ],
    ids=["no manifest", "half a manifest", "no optimizer", "half an optimizer", "no shard"],
)
def test_torn_checkpoint_is_passed_over_and_refused(tmp_path, caplog, tear, fault):
    good, torn = write_checkpoint(tmp_path, 9), write_checkpoint(tmp_path, 10)
    tear(torn)
    assert find_last_complete(tmp_path) == good
    assert caplog.messages == [f"passing over {torn}: {find_fault(torn)}"] and fault in caplog.text
    assert find_checkpoint(str(tmp_path), "true", overwrite=False) == str(good)
    with pytest.raises(ValueError, match=re.escape(f"{torn}: not a complete checkpoint: {fault}")):
        find_checkpoint(str(tmp_path), str(torn), overwrite=False)


@pytest.mark.parametrize("left_out", ["trainer_state.json", "rng_state_0.pth"])
def test_checkpoint_of_the_model_alone_is_none_to_go_on_from(tmp_path, left_out):
    assert "--save_only_model" in find_fault(write_checkpoint(tmp_path, 1, leave_out={left_out}))


def test_find_checkpoint(tmp_path):
    run = str(tmp_path)
    assert find_checkpoint(run, None, overwrite=False) is None
    with pytest.raises(ValueError, match="there is no complete checkpoint in"):
        find_checkpoint(run, "true", overwrite=False)
    with pytest.raises(ValueError, match="nowhere: not a complete checkpoint"):
        find_checkpoint(run, str(tmp_path / "nowhere"), overwrite=False)

    (tmp_path / "checkpoint-best").mkdir()  # somebody's own, not a step
    ninth, tenth = str(write_checkpoint(tmp_path, 9)), str(write_checkpoint(tmp_path, 10))
    with pytest.raises(ValueError, match="holds checkpoint-10: continue with --resume_from_checkpoint true"):
        find_checkpoint(run, "false", overwrite=False)
    assert find_checkpoint(run, None, overwrite=True) is None
    assert find_checkpoint(run, "latest", overwrite=False) == tenth
    assert find_checkpoint(run, ninth, overwrite=False) == ninth
