"""LoRA adapters: one check of their files against the base model, and forms of them that vLLM serves."""

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.trainer_utils import TrainOutput

if TYPE_CHECKING:
    from transformers import Trainer as Base  # what the mixin is put in front of
else:
    Base = object

logger = logging.getLogger(__name__)

# Settings that vLLM applies, that the names of the tensors tell, or that only training reads. Any other one, where it
# is not PEFT's default, changes the model in a way that vLLM does not know.
SERVED = {
    *("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "fan_in_fan_out", "eva_config", "megatron_core", "runtime_config"),
}
PATTERNS = {"rank_pattern", "alpha_pattern"}  # can be folded into plain factors
MERGEABLE = PATTERNS | {
    *("use_dora", "modules_to_save", "bias", "trainable_token_indices", "init_lora_weights", "target_parameters"),
}
PLAIN_INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "eva")  # others change the base, such as PiSSA
REPEATABLE_INITIALIZATIONS = ("pissa", "olora", "mica")  # of these, those that the base alone decides
FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
# How far a merged model may be from the adapter, in nats a token. Rounding leaves 1e-6 to 1e-5 in float32. In 16 bits
# it leaves about as much as vLLM's own arithmetic.
MERGE_LIMITS = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.05}


WHOLE_MODEL = {"checkpoint_dir": "base_model", "adapter_name_or_path": "model_name_or_path"}  # flags of adapter, model


def check_model_folder(path: str, flag: str, adapter_flag: str | None) -> None:
    """Raise `ValueError`, naming `flag`, for a folder without a whole model; `adapter_flag` is for adapters."""
    folder = Path(path).expanduser()
    if not folder.is_dir() or (folder / "config.json").is_file():
        return
    if (folder / CONFIG_NAME).is_file():
        base = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if adapter_flag is None:
            raise ValueError(
                f"--{flag} {path}: holds a LoRA adapter, not a model; merge it into its base model, {base}, as its "
                "README.md says, and give that"
            )
        raise ValueError(
            f"--{flag} {path}: holds a LoRA adapter, not a model; give its base model, {base}, as --{flag}, and this "
            f"folder as --{adapter_flag}"
        )
    raise ValueError(f"--{flag} {path}: holds no model, config.json is missing")


class AdapterTraining(Base):
    """
    Mixin for a transformers `Trainer`, in front of it among the bases, that leaves out what LoRA costs for nothing.

    - PEFT casts the input of each LoRA layer to float32, and autocast casts it back to 16 bits. Values and gradients
      are the same without it. Where there is no autocast, as under DeepSpeed, the cast stays.
    - DDP looks for weights without gradient after each forward pass. Here all weights of an adapter get one.
      `--ddp_find_unused_parameters true` brings the search back.
    """

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        if isinstance(self.model, PeftModel) and self.args.ddp_find_unused_parameters is None:
            self.args.ddp_find_unused_parameters = False
        return super()._build_accelerator_args(**kwargs)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        with disable_input_dtype_casting(self.model, active=self.accelerator.native_amp):
            return super().train(*args, **kwargs)


def unserved_settings(config: PeftConfig) -> list[str]:
    """Return the settings of an adapter that vLLM would leave out."""
    if not isinstance(config, LoraConfig):
        return ["peft_type"]
    default = LoraConfig()
    names = [f.name for f in fields(config) if f.name not in SERVED]
    changed = [n for n in names if (getattr(config, n) or None) != (getattr(default, n) or None)]
    return [n for n in changed if n != "init_lora_weights" or config.init_lora_weights not in PLAIN_INITIALIZATIONS]


def check_vllm_lora_support(config: PeftConfig) -> None:
    """Raise `ValueError`, naming the flag, for an adapter that vLLM cannot serve as it is trained."""
    for name in unserved_settings(config):
        flag = "lora_modules_to_save" if name == "modules_to_save" else name
        way_out = "leave it out"
        if name in ("target_parameters", *PATTERNS):  # PEFT adds them for the experts that all-linear reaches
            way_out = "leave it out; of a mixture of experts name the attention's --lora_target_modules"
        raise ValueError(
            f"--{flag} {getattr(config, name)}: vLLM does not serve such an adapter natively; {way_out}, or sample "
            "without --use_vllm"
        )


def make_skeleton(base_model: str, **options: Any) -> PreTrainedModel:
    """Build a model without its weights, of the class that it is trained as. `options` are those of `AutoConfig`."""
    config = AutoConfig.from_pretrained(base_model, **options)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config) if kind is None else kind(config)


def add_to_skeleton(skeleton: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Put an adapter into a model without weights. Raises `ValueError` for one that does not fit, as PEFT does."""
    config = copy.deepcopy(config)
    if isinstance(config, LoraConfig):
        config.init_lora_weights = True  # others compute with the weights
    return get_peft_model(skeleton, config)


@dataclass(frozen=True)
class Adapter:
    """
    A LoRA adapter in a folder, as `read` checked it.

    Attributes:
        name: the flag and the folder, for messages.
        shapes: of the tensors, by their names in the file.
    """

    name: str
    folder: str
    config: LoraConfig
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def read(cls, folder: str, flag: str) -> "Adapter":
        """
        Read an adapter's configuration and the shapes of its tensors.

        Raises:
            ValueError: if there is no usable LoRA adapter. A model without its adapter would be the base model.
        """
        name, path = f"--{flag} {folder}", Path(folder)
        for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            if not (path / file).is_file():
                inside = sorted(str(found.parent) for found in path.glob(f"*/{CONFIG_NAME}"))
                hint = f"; there are adapters in {', '.join(inside)}" if inside else ""
                if (path / "config.json").is_file():
                    hint = f"; it holds a whole model: give that as --{WHOLE_MODEL[flag]}"
                raise ValueError(f"{name}: no LoRA adapter, {file} is missing{hint}")
        try:
            with safe_open(path / SAFETENSORS_WEIGHTS_NAME, "pt") as tensors:
                shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{name}: {SAFETENSORS_WEIGHTS_NAME} cannot be read: {error}") from error
        if not shapes or any(0 in shape for shape in shapes.values()):  # saved under ZeRO-3 without gathering
            raise ValueError(f"{name}: the adapter is empty; save it again from all processes")
        try:
            settings = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
            config = PeftConfig.from_pretrained(folder)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {CONFIG_NAME} cannot be read: {error}") from error
        if not isinstance(config, LoraConfig):
            raise ValueError(f"{name}: the adapter is of type {config.peft_type}; only LORA is supported")
        known = {setting.name for setting in fields(config)}
        if unknown := [key for key, value in settings.items() if value and key not in known]:
            raise ValueError(
                f"{name}: the installed PEFT would ignore the setting {unknown[0]}; install the version that saved "
                f"the adapter ({config.peft_version or 'a newer one'})"
            )
        return cls(name, folder, config, shapes)

    @property
    def must_be_merged(self) -> bool:
        """
        True if vLLM can serve it only as a part of the base.

        Raises:
            ValueError: for settings that vLLM can serve in no way, naming them.
        """
        unserved = set(unserved_settings(self.config))
        if unserved - MERGEABLE:
            raise ValueError(f"{self.name}: vLLM cannot serve an adapter with {min(unserved - MERGEABLE)}")
        initialization = self.config.init_lora_weights
        if "init_lora_weights" in unserved and initialization not in REPEATABLE_INITIALIZATIONS:
            raise ValueError(
                f"{self.name}: init_lora_weights {initialization} changed the base with random numbers or data, which "
                "the files do not tell; let PEFT save plain LoRA (`path_initial_model_for_weight_conversion`)"
            )
        return not unserved <= PATTERNS

    @property
    def rank(self) -> int:
        """The rank that vLLM needs for it; 0 if it is served merged."""
        return 0 if self.must_be_merged else max(self.config.r, *self.config.rank_pattern.values(), 0)

    @property
    def modules(self) -> set[str]:
        """Last parts of the names of the modules that it is on, such as `q_proj`."""
        keys = (key.removesuffix(suffix) for key in self.shapes for suffix in FACTORS if key.endswith(suffix))
        return {module.rpartition(".")[2] for module in keys}

    def check_base(self, base_model: str, **options: Any) -> None:
        """
        Check that the tensors are finite, and in name and shape those of PEFT for this configuration and base model.

        Args:
            base_model: folder or Hub id.
            options: those of `AutoConfig.from_pretrained`.

        Raises:
            ValueError: naming the first tensors that do not fit. PEFT and vLLM may pass over them.
        """
        for key, tensor in load_file(Path(self.folder, SAFETENSORS_WEIGHTS_NAME)).items():
            if not tensor.isfinite().all():
                raise ValueError(f"{self.name}: not all numbers of {key} are finite; take an earlier checkpoint")
        skeleton = make_skeleton(base_model, **options)
        of_base = {f"base_model.model.{key}": tuple(t.shape) for key, t in skeleton.state_dict().items()}
        try:
            model = add_to_skeleton(skeleton, self.config)
        except ValueError as error:
            raise ValueError(f"{self.name}: does not fit {base_model}: {error}") from error
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        expected = {key: tuple(tensor.shape) for key, tensor in state.items()}
        for key in self.shapes.keys() - expected.keys():
            if key.endswith(".base_layer.weight"):  # embeddings that PEFT saves beside the adapter on them
                expected[key] = of_base.get(key.replace(".base_layer", ""), ())
        wrong = {key for key in self.shapes | expected if self.shapes.get(key) != expected.get(key)}
        if wrong:
            key, none = min(wrong, key=lambda key: (key not in self.shapes, key)), "nothing"
            raise ValueError(
                f"{self.name}: {len(wrong)} tensors do not fit {base_model}, such as {key}: "
                f"{self.shapes.get(key, none)} in the adapter, {expected.get(key, none)} for the model; is it of "
                "another base, or were its tensors renamed?"
            )
        trained_on = self.config.base_model_name_or_path
        if trained_on is not None and Path(trained_on).name != Path(base_model).name:
            logger.warning("%s: was trained on %s, and the base model is %s", self.name, trained_on, base_model)

    def make_plain(self, target: Path) -> str:
        """
        Return a folder with the adapter in a form that vLLM serves: its own, or `target`.

        `target` gets factors with one rank and the scaling 1, in float32: those of lower rank are padded with zeros,
        and B is multiplied by alpha / rank of its module (with rsLoRA: by alpha / sqrt(rank)).

        Raises:
            ValueError: for an adapter that `must_be_merged`.
        """
        if not unserved_settings(self.config):
            return self.folder
        if self.must_be_merged:
            raise ValueError(f"{self.name}: vLLM serves it only merged into the base, in an engine of its own")
        config, tensors = copy.deepcopy(self.config), {}
        for key, tensor in load_file(Path(self.folder, SAFETENSORS_WEIGHTS_NAME)).items():
            suffix = next((suffix for suffix in FACTORS if key.endswith(suffix)), None)
            if suffix is None:  # an embedding of the base
                tensors[key] = tensor
                continue
            module, is_b = key.removeprefix("base_model.model.").removesuffix(suffix), "_B" in suffix
            rank = tensor.shape[is_b]
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
            scaling = alpha / (rank**0.5 if config.use_rslora else rank)
            padding = (0, self.rank - rank) if is_b else (0, 0, 0, self.rank - rank)
            tensors[key] = torch.nn.functional.pad(tensor.float() * (scaling if is_b else 1.0), padding)
        config.r = config.lora_alpha = self.rank
        config.rank_pattern, config.alpha_pattern, config.use_rslora = {}, {}, False
        config.save_pretrained(target)
        save_file(tensors, target / SAFETENSORS_WEIGHTS_NAME)
        return str(target)

    @torch.no_grad()
    def merge(
        self,
        base_model: str,
        target: str,
        prompts: Sequence[Sequence[int]] = (range(8),),
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
    ) -> None:
        """
        Write the base model with the adapter merged into it, and its tokenizer.

        PEFT merges in float32, on the CPU. What is written is read again and compared with the base under the
        adapter, both in float32, by the log-probabilities of the prompts' tokens.

        Args:
            target: folder for the merged model; the base and the adapter stay as they are.
            prompts: token ids, each of two or more.
            dtype: of the weights that are written.
            revision: of a base model on the Hub.

        Raises:
            ValueError: if the mean difference is above `MERGE_LIMITS` of the dtype, or above half of what the adapter
                changes (and 1e-4 nats): as where embeddings are tied, and where 16 bits round a small adapter away.
        """

        def load(path: str, **options: Any) -> PreTrainedModel:
            return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)

        base = load(base_model, revision=revision)
        plain = token_log_probs(base, prompts)
        model = PeftModel.from_pretrained(base, self.folder).eval()
        adapted = token_log_probs(model, prompts)
        model.merge_and_unload().to(dtype).save_pretrained(target)
        AutoTokenizer.from_pretrained(base_model, revision=revision).save_pretrained(target)
        del base, model
        difference = (token_log_probs(load(target), prompts) - adapted).abs().mean().item()
        effect = (plain - adapted).abs().mean().item()
        name = str(dtype).removeprefix("torch.")
        found = f"log-probabilities change by {difference:.2g} nats a token, where the adapter changes {effect:.2g}"
        if not difference <= min(MERGE_LIMITS[name], max(effect / 2, 1e-4)):
            raise ValueError(
                f"{self.name}: cannot be merged into {base_model} in {name}: {found}; evaluate it without "
                "--merge_adapter, if vLLM serves it"
            )
        logger.warning("%s: merged in %s: %s", self.name, name, found)


@torch.no_grad()
def token_log_probs(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return the log-probabilities, float32 in nats, of all prompts' tokens but their first ones, (N,)."""
    parts = []
    for prompt in prompts:
        input_ids = torch.tensor([list(prompt)])
        logits = model(input_ids).logits[0, :-1].float()
        parts.append(logits.log_softmax(-1).gather(1, input_ids[0, 1:, None])[:, 0])
    return torch.cat(parts)
