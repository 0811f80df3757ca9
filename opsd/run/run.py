"""One run of a training program: how it is checked, named, recorded, started and ended."""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from huggingface_hub import is_offline_mode
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import HubStrategy, sort_checkpoints
from transformers.utils import is_flash_attn_2_available
from trl import get_peft_config, get_quantization_config
from trl.import_utils import is_vllm_available

from data_collator import check_chat_template, check_history
from opsd.adapters import Adapter, add_to_skeleton, check_model_folder, check_vllm_lora_support, make_skeleton
from opsd.grading import BUILT_IN, check_answers, describe_verifier
from opsd.run.arguments import OUTPUT_DIR, ModelArguments, RunArguments
from opsd.run.card import render_card
from opsd.run.checkpoints import find_checkpoint
from opsd.run.conversations import Turn, has_system_turn
from opsd.run.hub import cached_commit, check_model
from opsd.run.problem_data import find_local, is_path, load_problems, row_name
from opsd.run.profiling import ProfileCallback
from opsd.run.publish import publish
from opsd.run.record import (
    check_resumed_settings,
    describe_hardware,
    find_finished_step,
    mark_finished,
    read_record,
    write_record,
)
from opsd.run.report import CURVES, METRICS, ReportCallback, describe_learning, evaluation_command, plot_curves
from opsd.run.summary import NUM_SAMPLES, Lines, describe_prompts, describe_run, find_risks, render
from opsd.run.terminal import duration, replace_progress, set_up_terminal
from opsd.thinking import freeze_date
from opsd.vllm_engine import check_lora_dtype

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


class Run:
    """
    A run, from its flags to its end: `check`, `load_data`, `load_tokenizer`, `model_options`, `train`, in this order.

    Args:
        method: first part of the names of runs.
        args, training_args, model_args: from `parse_arguments`.
    """

    def __init__(self, method: str, args: RunArguments, training_args: TrainingArguments, model_args: ModelArguments):
        self.method, self.args, self.training_args, self.model_args = method, args, training_args, model_args
        self.checkpoint: str | None = None  # to go on from
        self.prompt_date: str | None = None  # in prompts whose template asks for the present date
        self.caps_attention = False  # known from the model's configuration on: see `make_skeleton`
        self.data_hashes: dict[str, str] = {}  # of what a resumed run must find again
        self.datasets: list[Dataset] = []  # that are loaded
        set_up_terminal()

    # Before a model is loaded

    def check(self, num_tokens: int | None) -> None:
        """
        Check the settings that all methods share, and settle the run's name, its folder and where it starts.

        Args:
            num_tokens: of a sequence, for the name.

        Raises:
            FileNotFoundError, ValueError: for what cannot be, naming the flag and the way out.
        """
        self._check_model()
        self._check_trainer_flags()
        self._resolve(num_tokens)
        if (self.args.eval_dataset_name is None) != (self.training_args.eval_strategy == "no"):
            raise ValueError("--eval_dataset_name and --eval_strategy need each other: give both, or none of them")
        for flag in ("dataset_name", "eval_dataset_name"):
            if (name := getattr(self.args, flag)) is not None:
                find_local(name, flag)
        self.checkpoint = find_checkpoint(
            self.training_args.output_dir, self.training_args.resume_from_checkpoint, self.args.overwrite_output_dir
        )

    def _check_model(self) -> None:
        """Raise `ValueError` for models that are not there, and for what vLLM cannot serve."""
        path, use_vllm = self.model_args.model_name_or_path, getattr(self.training_args, "use_vllm", False)
        if path is None:
            raise ValueError("--model_name_or_path is missing: name a model's folder or Hub id")
        teacher = getattr(self.training_args, "teacher_model_name_or_path", None)
        for flag, name, adapter_flag in (
            ("model_name_or_path", path, "adapter_name_or_path"),
            ("teacher_model_name_or_path", teacher, None),
        ):
            if name is None:
                continue
            if is_path(name) and not os.path.isdir(os.path.expanduser(name)):
                raise ValueError(f"--{flag} {name}: no such folder; give a model's folder or Hub id")
            check_model_folder(name, flag, adapter_flag)
        if use_vllm and not is_vllm_available():
            raise ValueError(
                "--use_vllm: there is no vLLM of a version that TRL supports; scripts/setup_env.sh installs one"
            )
        if use_vllm and self.model_args.use_peft:
            check_vllm_lora_support(get_peft_config(self.model_args))
            is_mixed = self.training_args.bf16 or self.training_args.fp16
            if self.training_args.vllm_mode == "colocate" and not is_mixed:
                check_lora_dtype(self.model_args.dtype)
        if use_vllm and (self.model_args.load_in_4bit or self.model_args.load_in_8bit):
            raise ValueError(
                "--use_vllm: vLLM would sample from the base as it is published, not from the quantized one; leave "
                "out --load_in_4bit and --load_in_8bit, or sample without --use_vllm"
            )

    def _check_trainer_flags(self) -> None:
        """Raise `ValueError` for flags that transformers would refuse only after the model is loaded, or ignore."""
        args = self.training_args
        if self.args.dry_run is None and args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, which trains on one: start it with scripts/launch.sh "
                "(accelerate launch), or set CUDA_VISIBLE_DEVICES=0"
            )
        if args.fp16 and self.args.dry_run is None and args.device.type == "cpu":
            raise ValueError("--fp16: there is no float16 training on a CPU; leave it out")
        if args.eval_on_start and self.args.eval_dataset_name is None:
            raise ValueError("--eval_on_start: needs --eval_dataset_name and --eval_strategy")
        if args.push_to_hub and is_offline_mode():
            raise ValueError("--push_to_hub: the Hub is switched off by HF_HUB_OFFLINE; leave one of the two out")
        if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"--hub_strategy {args.hub_strategy.value}: checkpoints are not uploaded, but the model at the end of "
                "the run; leave the flag out"
            )
        try:
            for make_callback in get_reporting_integration_callbacks(args.report_to):
                make_callback()
        except (ValueError, RuntimeError, ImportError) as error:
            raise ValueError(f"--report_to {' '.join(args.report_to)}: {error}") from error

    def _resolve(self, num_tokens: int | None) -> None:
        """Settle name and folder, from --run_config or composed of what tells runs apart."""
        args, training_args = self.args, self.training_args
        batch = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
        name = args.run_config or (
            f"{self.method}_{Path(self.model_args.model_name_or_path).name}_lr{training_args.learning_rate:g}"
            f"_bs{batch * training_args.world_size}_tok{num_tokens}"
        )
        training_args.run_name = training_args.run_name or name
        if args.run_config or os.path.normpath(training_args.output_dir) == OUTPUT_DIR:
            training_args.output_dir = os.path.join(training_args.output_dir, name)
        for variable, value in (("WANDB_PROJECT", args.wandb_project), ("WANDB_ENTITY", args.wandb_entity)):
            if value is not None:
                os.environ[variable] = value

    def settings(self) -> dict[str, Any]:
        """All settings, and the versions of the packages."""
        training_args = self.training_args
        batch = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
        return {
            "script": dataclasses.asdict(self.args),
            "training": training_args.to_dict(),
            "model": dataclasses.asdict(self.model_args),
            "prompt_date": self.prompt_date,
            "data": self.data_hashes | {"sequences_per_step": batch * training_args.world_size},
            "commits": {  # of the Hub, as far as the cache tells; `None` for local files
                "model": cached_commit(self.model_args.model_name_or_path, "model", self.model_args.model_revision),
                "dataset": cached_commit(self.args.dataset_name, "dataset", self.args.dataset_revision),
            },
            "hardware": describe_hardware(),
            "versions": {package: version(package) for package in PACKAGES},
        }

    # What it will do

    def dry_run(
        self,
        columns: tuple[dict[str, str], dict[str, str | None]],
        encode: Callable[[Dataset, PreTrainedTokenizerBase], Dataset],
        prompts: Mapping[str, str],
    ) -> None:
        """
        Check local data, show what the run would do, and write its settings as JSON.

        Args:
            columns: arguments of `load_data`.
            encode: makes what the trainer gets of loaded rows.
            prompts: column of what it makes -> heading.

        Raises:
            FileNotFoundError, ValueError: for data that cannot be used.
        """
        disable_progress_bars()
        num_rows, lines, model = None, [], self.model_args.model_name_or_path
        if find_local(self.args.dataset_name) is not None:
            rows, _ = self.load_data(*columns)
            num_rows = len(rows)
            if os.path.isdir(model):
                first = rows.select(range(min(num_rows, NUM_SAMPLES)))
                tokenizer = self.load_tokenizer()
                lines = describe_prompts(encode(first, tokenizer), prompts, tokenizer, **self._template_settings())
        file = Path(self.args.dry_run_file or Path(self.training_args.output_dir, "dry_run.json"))
        sys.stdout.write(self._summarize(num_rows, [*lines, ("settings", f"all in {file}")]) + "\n")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.settings(), indent=2, default=str) + "\n", encoding="utf-8")

    def introduce(self, trainer: Trainer, prompts: Mapping[str, str]) -> None:
        """Show what the run will do. `prompts`: column of the trainer's data -> heading."""
        if not trainer.is_world_process_zero():
            return
        dataset = trainer.train_dataset
        lines = describe_prompts(dataset, prompts, trainer.processing_class, **self._template_settings())
        logger.info("%s", self._summarize(len(dataset), lines))

    def _template_settings(self) -> dict[str, Any]:
        return {"enable_thinking": getattr(self.args, "thinking", False)}

    def _summarize(self, num_rows: int | None, lines: Lines) -> str:
        """Describe the run, and `lines` after it; warn of its risks."""
        for risk in find_risks(self.training_args):
            logger.warning("%s", risk)
        summary = describe_run(self.args, self.training_args, self.model_args, num_rows, self.checkpoint)
        return render(summary + lines)

    # Data and model

    def load_data(
        self, columns: dict[str, str], optional_columns: dict[str, str | None] | None = None
    ) -> tuple[Dataset, Dataset | None]:
        """
        Load the data to train on and to evaluate on (`None` without): rows of texts.

        Args:
            columns: flag -> column name, as in `{"problem_column": "Question"}`: the rows will have it as `problem`.
                Rows without one of these texts are left out. Answers may also be numbers.
            optional_columns: likewise, of columns that may be empty in a row; `None` for those that nobody asked for.

        Raises:
            FileNotFoundError, ValueError: for data that cannot be used, naming the flag and the way out.
        """
        optional = {flag: column for flag, column in (optional_columns or {}).items() if column is not None}
        args = self.args
        for flag in ("solution_column", "answer_column"):
            column = getattr(args, flag)
            if flag not in {*columns, *optional} and column != getattr(type(args), flag):
                logger.info("--%s %s: not used, since this run reads no such text", flag, column)

        def load(name: str, split: str) -> Dataset:
            # Of local data to evaluate on, configuration and revision are those of the other data set
            is_other = name != args.dataset_name and find_local(name) is not None
            config, revision = (None, None) if is_other else (args.dataset_config, args.dataset_revision)
            return load_problems(name, split, columns, optional, config, revision, args.system_prompt)

        train_dataset, eval_dataset = load(args.dataset_name, args.dataset_split), None
        if args.eval_dataset_name is not None:
            eval_dataset = load(args.eval_dataset_name, args.eval_dataset_split)
        verifier = getattr(self.training_args, "verifier", getattr(args, "verifier", "math"))  # SFT has none
        for dataset in (train_dataset, eval_dataset):
            if dataset is not None and "answer" in dataset.column_names:
                check_answers(verifier, dataset["answer"])
        if verifier not in BUILT_IN:
            self.data_hashes["verifier"] = describe_verifier(verifier)
        needed = {*map(row_name, columns), "history"}
        compared = [name for name in train_dataset.column_names if name in needed]
        self.data_hashes["train_dataset"] = text_hash(train_dataset.select_columns(compared))
        self.datasets = [dataset for dataset in (train_dataset, eval_dataset) if dataset is not None]
        if "history" in train_dataset.column_names and args.system_prompt is None:
            self._adopt_system_prompt(train_dataset["history"][:])
        return train_dataset, eval_dataset

    def _adopt_system_prompt(self, histories: list[list[Turn]]) -> None:
        """Record the system turn that all rows share: the evaluator will ask with it."""
        found = {history[0]["content"] if has_system_turn(history) else None for history in histories}
        self.args.system_prompt = found.pop() if len(found) == 1 else None
        if found:
            logger.warning(
                "the rows have different system turns: the evaluator will ask without one, unless its --system_prompt "
                "says otherwise; --system_prompt of this program puts one into all rows"
            )

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the model's tokenizer; raise `ValueError` if it lacks a chat template or an end-of-sequence token."""
        check_model(self.model_args.model_name_or_path, "model_name_or_path", self.model_args.model_revision)
        tokenizer = AutoTokenizer.from_pretrained(
            self.model_args.model_name_or_path,
            revision=self.model_args.model_revision,
            trust_remote_code=self.training_args.trust_remote_code,
        )
        check_chat_template(tokenizer)
        for dataset in self.datasets:
            check_history(tokenizer, dataset)
        if tokenizer.eos_token is None:
            raise ValueError(
                f"--model_name_or_path {tokenizer.name_or_path}: its tokenizer has no end-of-sequence token, which "
                "ends rollouts and solutions; set `eos_token` in its tokenizer_config.json"
            )
        record = None if self.checkpoint is None else read_record(Path(self.checkpoint).parent)
        self.prompt_date = freeze_date(tokenizer, (record or {}).get("prompt_date"))
        self.data_hashes["chat_template"] = text_hash([tokenizer.chat_template])
        return tokenizer

    def check_resumed_settings(self) -> None:
        """
        Raise `ValueError` if the run is resumed with settings that it must keep; log those that change.

        Leave with status 0 if it has done all its steps.
        """
        if self.checkpoint is None:
            return
        run_dir, training_args = Path(self.checkpoint).parent, self.training_args
        check_resumed_settings(run_dir, self.settings())
        step = find_finished_step(run_dir, training_args.max_steps, training_args.num_train_epochs)
        is_here = run_dir.resolve() == Path(training_args.output_dir).resolve()
        if step is None or not is_here or int(Path(self.checkpoint).name.rpartition("-")[2]) < step:
            return
        if training_args.process_index == 0:
            logger.info(
                "%s is finished, after step %d: there is nothing to do. To train on, raise --max_steps or "
                "--num_train_epochs",
                run_dir,
                step,
            )
        sys.exit(0)

    def make_skeleton(self, adapter: Adapter | None = None) -> PreTrainedModel:
        """
        Build the model that is trained, without weights, and check its adapter on it.

        Args:
            adapter: to start from; `None` for a new one as the flags say, or none.

        Raises:
            ValueError: for an adapter that does not fit the model, and for a module that the model does not have.
        """
        args = self.model_args
        options = {"revision": args.model_revision, "trust_remote_code": self.training_args.trust_remote_code}
        skeleton = make_skeleton(args.model_name_or_path, **options)
        self.caps_attention = getattr(skeleton.config.get_text_config(), "attn_logit_softcapping", None) is not None
        if self.caps_attention and args.attn_implementation == "sdpa":
            raise ValueError(
                "--attn_implementation sdpa: would leave out the cap on the attention's logits that "
                f"{args.model_name_or_path} has; leave the flag out, or say eager"
            )
        if adapter is not None:
            adapter.check_base(args.model_name_or_path, **options)
        if not args.use_peft:
            return skeleton
        names = [name for name, _ in skeleton.named_modules()]
        for flag in ("lora_target_modules", "lora_modules_to_save"):
            given = getattr(args, flag)
            for module in given if isinstance(given, list) else []:
                if not any(f".{name}".endswith(f".{module}") for name in names):
                    matrices = {
                        key.split(".")[-2] for key, weight in skeleton.state_dict().items() if weight.dim() == 2
                    }
                    raise ValueError(
                        f"--{flag} {module}: the model has no such module; it has {', '.join(sorted(matrices))}"
                    )
        try:
            add_to_skeleton(skeleton, adapter.config if adapter is not None else get_peft_config(args))
        except ValueError as error:
            raise ValueError(f"--use_peft, --lora_r {args.lora_r}: {error}") from error
        return skeleton

    def model_options(self) -> dict[str, Any]:
        """`model_init_kwargs` of TRL's trainers: revision, dtype, attention and, where asked for, quantization."""
        args, training_args = self.model_args, self.training_args
        options = {
            "revision": args.model_revision,
            "dtype": args.dtype,
            "attn_implementation": choose_attention(
                args.attn_implementation, args.dtype, training_args, self.caps_attention
            ),
            "trust_remote_code": training_args.trust_remote_code,
            "device_map": None,  # where TRL says "auto", one process would spread the model over all GPUs that it sees
        }
        if (quantization_config := get_quantization_config(args)) is not None:
            options["quantization_config"] = quantization_config
        return options

    # Training

    def train(self, trainer: Trainer, sampler: Any = None) -> None:
        """
        Train from the beginning or from a checkpoint, save the model, and leave the process group.

        On SIGTERM or Ctrl-C there is a checkpoint and no final model, and the process leaves with status 143 or 130.

        Args:
            trainer: with `CompleteCheckpoints` among its bases.
            sampler: a vLLM sampler to close at the end.
        """
        trainer.max_nonfinite_steps = self.args.max_nonfinite_steps
        starts_anew = self.checkpoint is None and self.args.overwrite_output_dir
        output_dir = Path(self.training_args.output_dir)
        settings = self.settings()
        trainer.add_callback(RecordSettingsCallback(output_dir, settings, starts_anew))
        trainer.add_callback(ReportCallback())
        if self.args.profile_steps is not None:
            trainer.add_callback(ProfileCallback(self.args.profile_steps, output_dir))
        replace_progress(trainer)
        trainer.write_card = lambda: self._write_card(trainer, settings)
        if self.checkpoint is not None:
            logger.info("going on from %s", self.checkpoint)
        start = time.monotonic()
        trainer.train(resume_from_checkpoint=self.checkpoint)
        if trainer.stop_signal is None:
            trainer.save_model()  # the adapter, or the whole model without --use_peft; and the tokenizer
            trainer.create_model_card()  # after PEFT, which writes one too
        if trainer.is_world_process_zero():
            plot_curves(trainer.state.log_history, output_dir / CURVES)
            if trainer.stop_signal is None and trainer.stop_reason is None:
                mark_finished(output_dir, trainer.state.global_step)
            self._say_end(trainer, settings, time.monotonic() - start)
            failure = self._publish() if self.training_args.push_to_hub and trainer.stop_signal is None else None
        shutdown(trainer, sampler)
        if trainer.is_world_process_zero() and failure is not None:
            sys.exit(failure)
        if trainer.stop_signal is not None:
            sys.exit(128 + trainer.stop_signal)

    def _publish(self) -> str | None:
        """Upload the run; returns what went wrong, and the way out."""
        args = self.training_args
        run_dir, repo_id = Path(args.output_dir), args.hub_model_id or Path(args.output_dir).absolute().name
        options = {"private": args.hub_private_repo, "token": args.hub_token, "revision": args.hub_revision}
        try:
            logger.info("uploaded to %s", publish(run_dir, repo_id, **options))
        except (OSError, ValueError) as error:
            return (
                f"--push_to_hub: {error}\nThe run is finished, and its model is in {run_dir}. Upload it with: python "
                f"-m opsd.run.publish {run_dir} --hub_model_id {repo_id}"
            )
        return None

    def _write_card(self, trainer: Trainer, settings: dict[str, Any]) -> None:
        state = trainer.state
        card = render_card(self.method, settings, state.log_history, state.global_step, len(trainer.train_dataset))
        Path(self.training_args.output_dir, "README.md").write_text(card, encoding="utf-8")

    def _say_end(self, trainer: Trainer, settings: dict[str, Any], seconds: float) -> None:
        """Say what was learned, where the result is, and the command that evaluates it or goes on."""
        output_dir, step = self.training_args.output_dir, trainer.state.global_step
        lines = [f"step {step}/{trainer.state.max_steps} after {duration(seconds)}"]
        if learned := describe_learning(trainer.state.log_history):
            compared = "first log -> last log" if " -> " in learned[0] else "in its only log"
            lines[0] += f", {compared}:  " + "  ".join(learned)
        if trainer.stop_signal is not None:
            lines.append(
                f"stopped by {trainer.stop_signal.name} before the end; {trainer.last_complete} is complete: go on "
                "with --resume_from_checkpoint true"
            )
        else:
            if trainer.stop_reason is not None:
                lines.append(
                    f"stopped before the end by {trainer.stop_reason}; {trainer.last_complete} is complete: to go on "
                    "all the same, --resume_from_checkpoint true"
                )
            what = "adapter" if self.model_args.use_peft else "model"
            lines.append(f"{what}: {output_dir}  (beside it {METRICS}, {CURVES}, README.md)")
            lines.append(f"evaluate it: {evaluation_command(settings)}")
        for line in lines:
            logger.info("%s", line)


def text_hash(rows: Iterable[Any]) -> str:
    """SHA-256 of rows of texts, in their order, in hexadecimal."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def choose_attention(
    requested: str | None, dtype: str | None, training_args: TrainingArguments, caps_attention: bool = False
) -> str:
    """
    Choose FlashAttention 2 where it can run, else PyTorch's attention, and log it; another one only on request.

    PyTorch's has no cap on the attention's logits: a model with one (`caps_attention`, Gemma 2) gets the eager one.
    """
    if requested not in (None, "flash_attention_2"):
        return requested
    half_precision = training_args.bf16 or training_args.fp16 or dtype in ("bfloat16", "float16")
    if is_flash_attn_2_available() and half_precision and not training_args.use_cpu:
        return "flash_attention_2"
    fallback = "eager" if caps_attention else "sdpa"
    logger.info("attention: %s; flash_attention_2 needs flash-attn, a GPU and half precision", fallback)
    return fallback


class RecordSettingsCallback(TrainerCallback):
    """When training begins, and so after all checks: delete old files, record the settings in run_config.json."""

    def __init__(self, output_dir: Path, settings: dict[str, Any], starts_anew: bool):
        self.output_dir, self.settings, self.starts_anew = output_dir, settings, starts_anew

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        state.compute_steps(args, state.max_steps)  # transformers keeps those of the checkpoint for log and saves
        if not state.is_world_process_zero:
            return
        if self.starts_anew:
            folders = [*sort_checkpoints(self.output_dir), self.output_dir / "nonfinite"]
            for old in filter(os.path.exists, folders):
                shutil.rmtree(old)
                logger.info("--overwrite_output_dir: deleted %s", old)
        write_record(self.output_dir, self.settings, self.starts_anew, state.global_step)


def shutdown(trainer: Trainer, sampler: Any = None) -> None:
    """Leave the process group once all processes are done; close the engine first, which shares the group."""
    trainer.accelerator.wait_for_everyone()
    if sampler is not None:
        sampler.close()
    trainer.accelerator.end_training()
