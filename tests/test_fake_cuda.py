"""A training step on the device "cuda" without a GPU: no mix of devices or dtypes, no wait for a value."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_cuda_worker import CASES, FAULTS

TESTS = Path(__file__).parent

pytestmark = [
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="PyTorch's CUDA build needs a GPU: -m gpu"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """What went wrong in each case. In a process of its own, whose PyTorch takes the device "cuda" for present."""
    library, torch_folder = tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so", Path(torch.__file__).parent
    command = ["g++", "-std=c++20", "-shared", "-fPIC", TESTS / "fake_cuda.cpp", "-o", library]
    command += [f"-I{torch_folder}/include", f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib"]
    subprocess.run([*command, "-lc10", "-ltorch_cpu"], check=True)
    paths = f"{TESTS.parent}:{TESTS}:{os.environ.get('PYTHONPATH', '')}"
    worker = subprocess.run(
        [sys.executable, "-W", "ignore", TESTS / "fake_cuda_worker.py"],
        env=os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(worker.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_step_on_a_gpu_that_is_not_there(errors, case):
    assert errors[case] is None


@pytest.mark.parametrize(
    ("fault", "message"),
    zip(
        FAULTS,
        ["Expected all tensors to be on the same device", "cast to float32 and back", "DataDependentOutputException"],
        strict=True,
    ),
)
def test_planted_fault_is_found(errors, fault, message):
    assert message in str(errors[fault])
