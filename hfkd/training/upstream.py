"""Names of other libraries that hfkd overrides or reaches into, and the check that they are there.

A renamed method of Trainer would otherwise be overridden in silence: evaluation would leave out images, or a checkpoint
the losses. The check runs when `hfkd.training` is imported. On an upgrade that fails it, read what became of the name,
adapt the code that the comment names, and extend `KNOWN_TO_WORK`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from importlib.metadata import version
from types import CodeType
from typing import Any

from ..errors import HfkdError

KNOWN_TO_WORK = {
    "transformers": "5.20.2 to 5.24.0",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "timm": "1.0.31",
    "torch": "2.14.1 and 2.15.0",
}

# Methods of transformers' Trainer that `trainer.py` overrides, with the parameters that they are called with. One that
# ends in "?" is not in every version that is known to work.
OVERRIDDEN = {
    "__init__": "model args data_collator train_dataset eval_dataset processing_class model_init compute_loss_func "
    "compute_metrics callbacks optimizers optimizer_cls_and_kwargs preprocess_logits_for_metrics",
    "train": "resume_from_checkpoint trial ignore_keys_for_eval",
    "create_accelerator_and_postprocess": "",
    "get_train_dataloader": "",
    "get_eval_dataloader": "eval_dataset",
    "get_test_dataloader": "test_dataset",
    "num_examples": "dataloader",
    "set_initial_training_values": "args dataloader",
    "get_batch_samples": "epoch_iterator num_batches device",
    "compute_loss": "model inputs return_outputs num_items_in_batch",
    "log": "logs start_time",
    "get_decay_parameter_names": "model",
    "get_optimizer_cls_and_kwargs": "args model",
    "create_optimizer": "model",
    "create_scheduler": "num_training_steps optimizer",
    "floating_point_ops": "inputs",
    "evaluate": "eval_dataset ignore_keys metric_key_prefix",
    "evaluation_loop": "dataloader description prediction_loss_only ignore_keys metric_key_prefix",
    "prediction_step": "model inputs prediction_loss_only ignore_keys",
    "save_model": "output_dir _internal_call",
    "create_model_card": "language license tags model_name finetuned_from tasks dataset_tags dataset dataset_args",
    "init_hf_repo": "token private?",
    "push_to_hub": "commit_message blocking token revision private? kwargs",
    # The private ones, at most ten:
    "_hp_search_setup": "trial",
    "_prepare_for_training": "max_steps train_dataloader resume_from_checkpoint",
    "_prepare_input": "data",
    "_get_grad_norm": "model grad_norm",
    "_save_checkpoint": "model trial",
    "_save": "output_dir state_dict",
    "_save_optimizer_and_scheduler": "output_dir",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_determine_best_metric": "metrics trial",
    "_load_best_model": "",
}

# Functions and classes that are called or patched by names that their libraries do not promise to keep.
USED = (
    "transformers.Trainer._validate_args",  # trainer.py
    "transformers.Trainer._get_output_dir",  # trainer.py
    "transformers.Trainer._prepare_inputs",  # trainer.py
    "transformers.Trainer._remove_unused_columns",  # trainer.py
    "transformers.Trainer._inner_training_loop",  # calls everything above in the order that trainer.py relies on
    "transformers.TrainingArguments._VALID_DICT_FIELDS",  # recipe/config.py
    "accelerate.optimizer.is_lomo_available",  # optimization.py patches it
    "accelerate.utils.deepspeed.DeepSpeedOptimizerWrapper",  # zero.py
    "torch._C._current_graph_task_id",  # networks/gradient_checkpointing.py
    "torch._dynamo.config.skip_nnmodule_hook_guards",  # trainer.py patches both
    "torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint",
    "torch.utils._pytree.tree_map_only",  # networks/sharding.py
    "torch.UntypedStorage._new_shared",  # data/transforms.py
    "torch.default_generator",  # data/transforms.py
    "timm.models._features.feature_take_indices",  # models/
    "timm.data.auto_augment.posterize",  # data/transforms.py
    "datasets.packaged_modules.parquet.parquet.Parquet",  # data/shards.py
    "datasets.table.table_cast",  # data/shards.py
)

# Attributes that are read or set from outside, and the class or function whose code must mention them.
ATTRIBUTES = {
    "transformers.Trainer": "_tr_loss _globalstep_last_logged _created_lr_scheduler is_fsdp_enabled model_wrapped "
    "is_deepspeed_enabled callback_handler gather_function model_accepts_loss_kwargs hub_model_id "
    "_signature_columns compute_metrics preprocess_logits_for_metrics",
    "transformers.TrainingArguments": "_n_gpu",
    "transformers.core_model_loading.revert_weight_conversion": "_weight_conversions",
    "accelerate.utils.other.extract_model_from_parallel": "_orig_mod",
    "accelerate.data_loader.DataLoaderAdapter": "base_dataloader",
    "accelerate.hooks.add_hook_to_module": "_hf_hook",
    "accelerate.utils.FullyShardedDataParallelPlugin": "fsdp_version cpu_ram_efficient_loading mixed_precision_policy",
    "accelerate.utils.DeepSpeedPlugin": "zero_stage hf_ds_config deepspeed_config",
    "torch.nn.Module": "_compiled_call_impl",
    "torch.nn.parallel.DistributedDataParallel": "_ddp_params_and_buffers_to_ignore",
    "timm.data.auto_augment.AugmentOp": "aug_fn",
}


class UpgradeError(HfkdError, ImportError):
    """Error for a version of a library that hfkd was not written for."""

    exit_code = 1


def check_upstream() -> None:
    """Check every name of the three tables.

    Raises:
        UpgradeError: for the first one that is missing or has other parameters, naming the library, its version and the
            versions that are known to work.
    """
    for method, expected in OVERRIDDEN.items():
        found = _parameters(_find(f"transformers.Trainer.{method}"))
        if found not in _accepted(expected.split()):
            raise _upgrade_error("transformers", f"Trainer.{method} takes ({', '.join(found)})")
    for name in USED:
        _find(name)
    for name, attributes in ATTRIBUTES.items():
        mentioned = set(_names_in(_find(name)))
        for attribute in attributes.split():
            if attribute not in mentioned:
                raise _upgrade_error(name.partition(".")[0], f"{name} no longer has {attribute}")


def _find(name: str) -> Any:
    """Return the object of a dotted name."""
    library, *rest = name.split(".")
    found = importlib.import_module(library)
    for position, part in enumerate(rest):
        try:
            found = getattr(found, part)
        except AttributeError:
            try:  # a module that its package does not import by itself
                found = importlib.import_module(".".join([library, *rest[: position + 1]]))
            except ImportError:
                raise _upgrade_error(library, f"{name} is missing") from None
    return found


def _parameters(method: Any) -> list[str]:
    return [name for name in inspect.signature(method).parameters if name != "self"]


def _accepted(expected: list[str]) -> list[list[str]]:
    """Return the parameter lists that fit: with and without those that end in "?"."""
    return [[name.rstrip("?") for name in expected], [name for name in expected if not name.endswith("?")]]


def _names_in(found: Any) -> Iterator[str]:
    """Yield the names that a class or function mentions in its code, and a class's own attributes."""
    functions = [found]
    if inspect.isclass(found):
        yield from vars(found)
        yield from getattr(found, "__dataclass_fields__", ())
        functions = [getattr(value, "fget", None) or value for value in vars(found).values()]
    codes = [inspect.unwrap(function).__code__ for function in functions if hasattr(function, "__code__")]
    while codes:
        code = codes.pop()
        yield from code.co_names
        yield from (constant for constant in code.co_consts if isinstance(constant, str))
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _upgrade_error(library: str, problem: str) -> UpgradeError:
    known = f"{library} {KNOWN_TO_WORK[library]}"
    return UpgradeError(
        f"hfkd does not fit {library} {version(library)}: {problem}. Known to work: {known}. Install one of these, "
        "or a newer hfkd."
    )
