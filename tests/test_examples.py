"""The examples run as they are, on the tiny model."""

import json
import math

from safetensors.torch import load_file

from examples.train import main


def test_train(tiny_model_dir, tmp_path):
    main(str(tiny_model_dir), str(tmp_path))
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert any(weight.any() for name, weight in adapter.items() if "lora_B" in name)  # zero before the first step
    log = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 10 and all(0 < loss < math.log(2) for loss in losses)  # a mean of Jensen-Shannon divergences
