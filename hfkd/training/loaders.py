"""transformers' Trainer for labelled images, with a teacher or without: our data sets, and published optimisation."""

from __future__ import annotations

import copy
import functools
import itertools
import re
from collections.abc import Callable

import accelerate.optimizer
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from ..data import ImageDataset, ImageSource, StreamingImageDataset
from ..data.source import RowCache
from ..data.subsets import image_source
from ..networks.features import InputSpec
from ..networks.loading import known_input_spec
from .callbacks import SetEpoch

# What a model need not list in `no_weight_decay`: the tokens and position embeddings of timm and transformers.
UNDECAYED = re.compile(
    r"(^|\.)(cls_token|dist\w*_token|pos_embed\w*|position_embeddings?|relative_position_bias\w*)($|\.)"
)

# Twice in every update accelerate looks through all of sys.path for an optimizer's package, lomo_optim: more than a
# third of what Trainer adds to a step. Once is enough.
accelerate.optimizer.is_lomo_available = functools.cache(accelerate.optimizer.is_lomo_available)


class ImageTrainer(Trainer):
    """What `DistillationTrainer` needs of data and optimizer.

    Small images live on the device, streams are shared out and resumed, no test image is dropped. Weight decay and
    steps of the learning rate are those of the published protocols; what Trainer measures at a cost and nobody reads is
    left out.
    """

    # ---- Data -------------------------------------------------------------------------------------------------

    def _input_spec(self) -> InputSpec | None:
        """What the images are normalised for: what a data set of ours says, else what the student expects."""
        for source in (image_source(self.train_dataset), image_source(self.eval_dataset)):
            if source is not None:
                return InputSpec(source.image_size, source.mean, source.std)
        return known_input_spec(self.model)

    def _place_data(self, views: int, cache: RowCache | None) -> None:
        """Small images live on the training device and are augmented there; the training set gives so many views, and
        what the cache holds."""
        for dataset in (image_source(self.train_dataset), image_source(self.eval_dataset)):
            if isinstance(dataset, ImageDataset) and self.args.dataloader_num_workers == 0:
                dataset.to(self.args.device)
                self.args.dataloader_pin_memory = False  # the batches are on the device already
        train_images = image_source(self.train_dataset)
        if train_images is not None:
            train_images.views, train_images.cache = views, cache
            self.add_callback(SetEpoch(train_images))

    def _two_images(self, dataset, source: ImageSource | None) -> dict[str, Tensor] | None:
        """A batch of the first and the last image, of a stream the first two; None where there is no one to ask."""
        if isinstance(source, StreamingImageDataset):
            return self._prepare_inputs(source.first_batch(2))
        if dataset is None or isinstance(dataset, dict):
            return None
        if isinstance(dataset, IterableDataset):
            samples = list(itertools.islice(dataset, 2))
        else:
            pair = [0, len(dataset) - 1]
            samples = [dataset[i] for i in pair] if source is None else dataset.__getitems__(pair)
        return self._prepare_inputs(self.data_collator(samples))

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        if isinstance(dataset, StreamingImageDataset):
            return self._stream_loader(dataset, batch_size, is_training)
        drop_last = self.args.dataloader_drop_last
        # Trainer would leave the last images out of an evaluation as well.
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _stream_loader(self, dataset: StreamingImageDataset, batch_size: int, is_training: bool) -> DataLoader:
        """Of this process's share, in finished batches; accelerate would share them out among the processes again."""
        if not is_training:
            # A stream that is trained on, too, keeps its share there.
            dataset = copy.copy(dataset) if dataset is self.train_dataset else dataset
            dataset.shard(self.args.process_index, self.args.world_size, batch_size, drop_last=False)
        workers = self.args.dataloader_num_workers
        return DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            # Those of an evaluation would wait through the training that follows.
            persistent_workers=is_training and workers > 0 and self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )

    def num_examples(self, dataloader: DataLoader) -> int:
        dataset = dataloader.dataset
        return dataset.num_rows if isinstance(dataset, StreamingImageDataset) else super().num_examples(dataloader)

    def _run_epoch(self, **kwargs):
        # What Trainer skips on a resumed epoch need not be decoded first.
        source = image_source(self.train_dataset)
        resumed = kwargs["resume_from_checkpoint"] is not None and kwargs["epoch"] == kwargs["epochs_trained"]
        if isinstance(source, StreamingImageDataset) and resumed and not self.args.ignore_data_skip:
            source.skip_batches(kwargs["steps_trained_in_current_epoch"])
        return super()._run_epoch(**kwargs)

    def _prepare_input(self, data):
        if isinstance(data, Tensor):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def _skipped(self, key: str, dataset) -> dict[str, int]:
        """{key: how many images could not be decoded}, over all processes, or nothing if all could."""
        source = image_source(dataset)
        if source is None:
            return {}
        bad = source.bad_rows.to(self.args.device, torch.int32)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        return {key: int(bad.sum())} if bad.any() else {}

    # ---- Optimisation -----------------------------------------------------------------------------------------

    def set_initial_training_values(self, args, dataloader):
        values = super().set_initial_training_values(args, dataloader)
        self._steps_per_epoch = values[1]
        return values

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All parameters, or the matrices and kernels that the student does not exempt (`no_weight_decay`), without
        tokens and position embeddings."""
        if self.args.decay_all_parameters:
            return [name for name, _ in model.named_parameters()]
        exempt = set()
        for prefix, module in model.named_modules():
            if isinstance(getattr(type(module), "no_weight_decay", None), Callable):
                exempt |= {f"{prefix}.{name}" for name in module.no_weight_decay()}
        return [
            name
            for name, value in model.named_parameters()
            if value.ndim > 1 and name not in exempt and not UNDECAYED.search(name)
        ]

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if optimizer_class is torch.optim.SGD:
            # One kernel over all parameters in place of three for each; torch has none for sharded ones.
            kwargs["fused"] = args.distributed_state.distributed_type != DistributedType.FSDP
        return optimizer_class, kwargs

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.lr_scheduler is None and self.args.lr_milestones:
            steps = [round(epoch * self._steps_per_epoch) for epoch in self.args.lr_milestones]
            self.lr_scheduler = torch.optim.lr_scheduler.MultiStepLR(
                optimizer or self.optimizer, steps, self.args.lr_gamma
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_grad_norm(self, model, grad_norm=None):
        # Trainer measures the norm even where nothing is clipped, which costs a pass over all gradients.
        return None if grad_norm is None else super()._get_grad_norm(model, grad_norm)

    def floating_point_ops(self, inputs) -> int:
        return 0  # Trainer's estimate (6 x parameters x inputs) is wrong for convolutions and costs a module walk
