"""CRD: contrastive representation distillation, with a memory of every training image.

Paper: Tian, Krishnan and Isola, Contrastive Representation Distillation, ICLR 2020.
"""

import math
from collections.abc import Mapping
from types import MethodType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import HfkdError
from .base import DistillationLoss, Outputs
from .checks import count, not_negative, positive
from .standardize import at_least_float32

EPS = 1e-7  # beside the probability that noise gave a row


def crd_loss(
    student: Tensor,
    teacher: Tensor,
    student_memory: Tensor,
    teacher_memory: Tensor,
    contrast_rows: Tensor,
    log_normalizers: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """How well each network's embedding finds the positive among rows of the other network's memory.

    With h = exp(<row, embedding> / temperature) / Z and c = K / N, the loss of one network is

        -(sum of log(h / (h + c + eps)) over the positives + sum of log(c / (h + c + eps)) over the negatives) / B

    and the two networks' losses are added. The memories get no gradient and may change before the backward pass. It
    cannot be differentiated twice.

    Args:
        student: (B, D), each of length 1.
        teacher: (B, D), likewise; gradients reach both.
        student_memory: (N, D), earlier student embeddings.
        teacher_memory: (N, D).
        contrast_rows: (B, 1 + K) int64, rows of the memories: for each sample the positive, then the negatives.
        log_normalizers: (2,), log Z of the student and of the teacher. Where NaN, this batch sets Z: to N times the
            mean of exp(<row, embedding> / temperature), averaged over the processes, as a constant.
        temperature: above 0.

    Returns:
        0-d, float32 or float64, and the log_normalizers (2,) that were used.

    Raises:
        ValueError: the shapes do not fit one another.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    _check_shapes(student, teacher, student_memory, teacher_memory, contrast_rows)
    with torch.no_grad():
        student_logits = contrast_logits(student, teacher_memory, contrast_rows, temperature)
        teacher_logits = contrast_logits(teacher, student_memory, contrast_rows, temperature)
        of_batch = _log_normalizers(student_logits, teacher_logits, len(student_memory))
        # Decided on the device: to ask whether they are set would make every step wait for it.
        log_normalizers = torch.where(log_normalizers.isnan(), of_batch, log_normalizers)
    arguments = contrast_rows, temperature
    student_loss = _Contrast.apply(student, student_logits, teacher_memory, log_normalizers[0], *arguments)
    teacher_loss = _Contrast.apply(teacher, teacher_logits, student_memory, log_normalizers[1], *arguments)
    return student_loss + teacher_loss, log_normalizers


def contrast_logits(embeddings: Tensor, memory: Tensor, contrast_rows: Tensor, temperature: float) -> Tensor:
    """<memory, embedding> / temperature for the contrast rows, (B, 1 + K)."""
    # One product with the whole memory, of which the scores are picked. To pick the rows, as the release does, copies
    # (1 + K) D numbers a sample, 537 MB for a batch of 64 with 16384 negatives: with CIFAR's 50,000 images this
    # takes fifteen times as long on a CPU core and twelve times the memory, though the product computes three times
    # what is picked.
    return (embeddings @ memory.T).gather(1, contrast_rows).div_(temperature)


def _log_normalizers(student_logits: Tensor, teacher_logits: Tensor, rows: int) -> Tensor:
    """log Z of the student and of the teacher, (2,), as this step's batches in all processes set it."""
    sums = torch.stack([student_logits.logsumexp((0, 1)), teacher_logits.logsumexp((0, 1))])
    everyone = all_processes(sums[None])
    return everyone.logsumexp(0) - math.log(len(everyone)) + math.log(rows / student_logits.numel())


def _check_shapes(student: Tensor, teacher: Tensor, *others: Tensor) -> None:
    student_memory, teacher_memory, contrast_rows = others
    if not (
        student.ndim == contrast_rows.ndim == 2
        and student.shape == teacher.shape
        and student_memory.shape == teacher_memory.shape == (len(student_memory), student.shape[1])
        and len(contrast_rows) == len(student)
        and contrast_rows.shape[1] >= 2
    ):
        given = ", ".join(str(tuple(tensor.shape)) for tensor in (student, teacher, *others))
        raise HfkdError(
            f"embeddings (B, D) twice, memories (N, D) twice and contrast rows (B, 1 + K) expected, got {given}"
        )


class _Contrast(torch.autograd.Function):
    """One network's loss, from logits already computed.

    The gradient is formed in the forward pass: by the backward pass the memory has changed, and to keep the scores
    (B, N) until then would be most of the method's memory.
    """

    @staticmethod
    def forward(ctx, embeddings, logits, memory, log_normalizer, contrast_rows, temperature):
        batch_size, columns = logits.shape
        noise = (columns - 1) / len(memory)
        # h / (h + noise + eps) is the sigmoid of these: no exponential overflows, whatever the temperature.
        logits = logits - (log_normalizer + math.log(noise + EPS))
        # -log_sigmoid(-x) for the negatives and, which is that less x, -log_sigmoid(x) for the positives. The last
        # term is what eps does where it stands in the denominator alone.
        value = -F.logsigmoid(-logits).sum() - logits[:, 0].sum() + batch_size * (columns - 1) * math.log1p(EPS / noise)
        gradient = logits.sigmoid_()
        gradient[:, 0] -= 1
        gradient /= batch_size * temperature
        scores = gradient.new_zeros(batch_size, len(memory)).scatter_add_(1, contrast_rows, gradient)
        ctx.save_for_backward(scores @ memory)
        return value / batch_size

    @staticmethod
    @once_differentiable
    def backward(ctx, outer):
        (gradient,) = ctx.saved_tensors
        return outer * gradient, None, None, None, None, None


def all_processes(tensor: Tensor) -> Tensor:
    """The tensors (B, ...) of all processes one after the other, (processes * B, ...); B must be the same in all."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    gathered = tensor.new_empty(dist.get_world_size() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered


def memory_mib(rows: int, dimension: int) -> float:
    """What the two memories take, in float32: MiB."""
    return 2 * rows * dimension * torch.float32.itemsize / 2**20


class CRDLoss(DistillationLoss):
    """`crd_loss` as a method of a recipe; learnt linear layers bring both embeddings to one width.

    Each network has a memory of one row for every training image, which follows the image's embedding: two times
    images x dimension floats on the device of every process and in every checkpoint. The rows are sorted by class, so
    that negatives are drawn as numbers outside a block. They are drawn uniformly and independently from the images of
    other classes, so the same image may come twice; the release draws without replacement, which has the same
    expectation. Classes are those of the data set, whatever was done to the batch's labels.

    Each step compares a batch with the whole memories, which takes batch x images floats a few times: 13 MB for 64 of
    CIFAR-100, 1.3 GB for 256 of ImageNet.

    In several processes all hold the same memories: they start from the same ones, and every forward moves the rows of
    the images of all. The normalizers, too, are those of the first batch of all. So the loss is that of one process
    with all their images in its batch, but for the negatives, which each process draws for its own images, and from the
    same numbers as the others, since Trainer seeds all alike. Batches must have one size in all, which Trainer sees to.
    Where gradients are accumulated, the memories move with every batch, before the step.

    Args:
        negatives: K, a sample.
        temperature: above 0.
        momentum: of the memories: the share that a row keeps when its image is seen; 0 or above and below 1.
        dimension: D, of the embeddings that are compared.
        relaxed_positives: the positive is any image of the class, drawn each time; false: the image itself.
        weight: see `DistillationLoss`.

    Raises:
        ValueError: one of them out of range.
    """

    citation = """
        @inproceedings{tian2020contrastive,
            title = {Contrastive Representation Distillation},
            author = {Tian, Yonglong and Krishnan, Dilip and Isola, Phillip},
            booktitle = {International Conference on Learning Representations (ICLR)},
            year = {2020},
        }
    """

    reads_logits = False
    takes_mixed_labels = False
    student_layers = ["embedding"]
    teacher_layers = ["embedding"]
    needs_index = True
    replicated_buffers = ("student_memory", "teacher_memory", "log_normalizers", "places")

    def __init__(
        self,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        dimension: int = 128,
        relaxed_positives: bool = False,
        weight: float = 0.8,
    ):
        super().__init__(weight)
        self.negatives = count("negatives", negatives)
        self.temperature = positive("temperature", temperature)
        self.momentum = not_negative("momentum", momentum)
        if self.momentum >= 1:
            raise HfkdError(f"momentum is {momentum!r}: give a number below 1, or the memories never change")
        self.dimension = count("dimension", dimension)
        self.relaxed_positives = relaxed_positives
        self.register_buffer("places", None)
        # Compiled, the backward pass would read the memories as they are after the step. Not a decorator of `forward`,
        # because torch.compiler.disable imports the compiler, which takes longer than importing torch.
        self.forward = MethodType(torch.compiler.disable(type(self).forward), self)

    def setup_rows(self, labels: Tensor) -> None:
        """Makes the memories, of the rows that are trained on.

        Raises:
            ValueError: fewer than two classes.
        """
        order = labels.argsort(stable=True)
        order = order[labels[order] >= 0]
        classes, sizes = labels[order].unique_consecutive(return_counts=True)
        if len(classes) < 2:
            raise HfkdError(
                f"negatives are images of other classes, and the training set has {len(classes)} class: give images of "
                "two classes or more"
            )
        starts = sizes.cumsum(0) - sizes
        columns = [torch.arange(len(order)), starts.repeat_interleave(sizes), sizes.repeat_interleave(sizes)]
        # For each row of the data set: its row in the memories, the first one of its class, and the class's size.
        places = torch.full((len(labels), 3), len(order))  # out of range, so an error, where it is not trained on
        places[order] = torch.stack(columns, dim=1)
        self.register_buffer("places", places, persistent=False)
        # Drawn here as on every other process, since DDP leaves these to the loss.
        generator = torch.Generator().manual_seed(0)
        bound = math.sqrt(3 / self.dimension)  # length 1 on average
        for name in ("student_memory", "teacher_memory"):
            memory = torch.empty(len(order), self.dimension).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, memory)
        self.register_buffer("log_normalizers", torch.full((2,), math.nan))
        if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
            mib = memory_mib(len(order), self.dimension)
            print(f"CRD: the memories of {len(order):,} images take {mib:,.1f} MiB.", flush=True)

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        self.embed_student = nn.Linear(student.embedding.shape[1], self.dimension)
        self.embed_teacher = nn.Linear(teacher.embedding.shape[1], self.dimension)

    def draw(self, index: Tensor) -> Tensor:
        """The contrast rows (B, 1 + K) in the memories of the samples at `index` (B,), the positive first."""
        place, start, size = self.places[index].split(1, dim=1)
        if self.relaxed_positives:
            place = start + _random_below(size, 1)
        others = _random_below(len(self.student_memory) - size, self.negatives)
        return torch.cat([place, others + size * (others >= start)], dim=1)

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        if self.places is None or "index" not in batch:
            raise HfkdError(
                "CRD remembers every training image: `setup_rows` must have got the labels, and the batch must hold "
                f"'index', the images' rows in the data set. The batch holds {sorted(batch)}."
            )
        index = batch["index"]
        with self.autocast(index.device):
            embeddings = self.embed_student(student.embedding), self.embed_teacher(teacher.embedding)
        own, other = (F.normalize(at_least_float32(embedding), dim=1) for embedding in embeddings)
        memories = self.student_memory, self.teacher_memory
        loss, normalizers = crd_loss(own, other, *memories, self.draw(index), self.log_normalizers, self.temperature)
        self.log_normalizers.copy_(normalizers)
        self.remember(index, own, other)
        return loss

    @torch.no_grad()
    def remember(self, index: Tensor, student: Tensor, teacher: Tensor) -> None:
        """Moves the rows of the samples at `index` (B,), of all processes, towards their embeddings (B, D).

        Of a sample that comes twice in a step, as some do that fill up a last batch, the last one counts.
        """
        place = all_processes(self.places[index, 0])
        turn = torch.arange(len(place), device=place.device)
        last = turn.new_zeros(len(self.student_memory)).scatter_reduce_(0, place, turn, "amax")[place]
        both = all_processes(torch.cat([student, teacher], dim=1))[last]
        for memory, embedding in zip((self.student_memory, self.teacher_memory), both.chunk(2, dim=1), strict=True):
            moved = self.momentum * memory[place] + (1 - self.momentum) * embedding
            memory.index_copy_(0, place, F.normalize(moved, dim=1))  # a row that comes twice gets one value twice


def _random_below(limits: Tensor, number: int) -> Tensor:
    """Uniform in 0 ... limit - 1: int64 (B, number) for limits (B, 1)."""
    # The remainder favours small numbers by limit / 2^62.
    return torch.randint(2**62, (len(limits), number), device=limits.device).remainder_(limits)
