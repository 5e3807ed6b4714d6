"""CRD: contrastive representation distillation, with a memory of every training image.

Paper: Tian, Krishnan and Isola, Contrastive Representation Distillation, ICLR 2020.
"""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import HfkdError
from .base import DistillationLoss, Outputs
from .checks import count, not_negative, positive
from .standardize import at_least_float32

EPS = 1e-7  # added to a row's probability under the noise distribution


def crd_loss(
    student: Tensor,
    teacher: Tensor,
    student_memory: Tensor,
    teacher_memory: Tensor,
    contrast_rows: Tensor,
    log_normalizers: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Contrast each network's embeddings with rows of the other network's memory.

    With h = exp(row . embedding / temperature) / Z and c = K / N, the loss of one network is

        -(sum of log(h / (h + c + eps)) over the positives + sum of log(c / (h + c + eps)) over the negatives) / B

    and the losses of both networks are added. The memories get no gradient and may change before the backward pass. The
    loss cannot be differentiated twice.

    Args:
        student: (B, D), each row of length 1. Gradients reach it.
        teacher: (B, D), each row of length 1. Gradients reach it.
        student_memory: (N, D), earlier student embeddings.
        teacher_memory: (N, D), earlier teacher embeddings.
        contrast_rows: (B, 1 + K) int64, rows of the memories: for each sample the positive, then the negatives.
        log_normalizers: (2,), log Z of the student and of the teacher. Where NaN, this batch sets Z to N times the mean
            of exp(row . embedding / temperature), averaged over the processes, as a constant.
        temperature: above 0.

    Returns:
        0-d, float32 or float64, and the log_normalizers (2,) that were used.

    Raises:
        HfkdError: the shapes do not fit one another.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    _check_shapes(student, teacher, student_memory, teacher_memory, contrast_rows)
    with torch.no_grad():
        student_logits = contrast_logits(student, teacher_memory, contrast_rows, temperature)
        teacher_logits = contrast_logits(teacher, student_memory, contrast_rows, temperature)
        batch_normalizers = _log_normalizers(student_logits, teacher_logits, len(student_memory))
        # Selected on the device: a Python condition would make every step wait for the device.
        log_normalizers = torch.where(log_normalizers.isnan(), batch_normalizers, log_normalizers)
    arguments = contrast_rows, temperature
    student_loss = _ContrastiveLoss.apply(student, student_logits, teacher_memory, log_normalizers[0], *arguments)
    teacher_loss = _ContrastiveLoss.apply(teacher, teacher_logits, student_memory, log_normalizers[1], *arguments)
    return student_loss + teacher_loss, log_normalizers


def contrast_logits(embeddings: Tensor, memory: Tensor, contrast_rows: Tensor, temperature: float) -> Tensor:
    """Return memory row . embedding / temperature for the contrast rows, (B, 1 + K)."""
    # One product with the whole memory, from which the scores are gathered. The release gathers rows instead, which
    # copies (1 + K) D numbers a sample: 537 MB for a batch of 64 with 16384 negatives. With CIFAR's 50,000 images that
    # takes fifteen times as long on a CPU core and twelve times the memory, although the product computes three times
    # as many scores as are used.
    return (embeddings @ memory.T).gather(1, contrast_rows).div_(temperature)


def _log_normalizers(student_logits: Tensor, teacher_logits: Tensor, rows: int) -> Tensor:
    """Return log Z of the student and of the teacher, (2,), from this step's batches in all processes."""
    sums = torch.stack([student_logits.logsumexp((0, 1)), teacher_logits.logsumexp((0, 1))])
    gathered = all_processes(sums[None])
    return gathered.logsumexp(0) - math.log(len(gathered)) + math.log(rows / student_logits.numel())


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


class _ContrastiveLoss(torch.autograd.Function):
    """Loss of one network, from logits already computed.

    The gradient is computed in the forward pass: the memory changes before the backward pass, and keeping the scores
    (B, N) until then would take most of the method's memory.
    """

    @staticmethod
    def forward(ctx, embeddings, logits, memory, log_normalizer, contrast_rows, temperature):
        batch_size, columns = logits.shape
        noise = (columns - 1) / len(memory)
        # h / (h + noise + eps) is the sigmoid of these, so no exponential overflows at any temperature.
        logits = logits - (log_normalizer + math.log(noise + EPS))
        # -log_sigmoid(-x) for the negatives; -log_sigmoid(x) = -log_sigmoid(-x) - x for the positives. The last term
        # corrects for the negatives' numerator c, which has no eps.
        value = -F.logsigmoid(-logits).sum() - logits[:, 0].sum() + batch_size * (columns - 1) * math.log1p(EPS / noise)
        gradient = logits.sigmoid_()
        gradient[:, 0] -= 1
        gradient /= batch_size * temperature
        scores = gradient.new_zeros(batch_size, len(memory)).scatter_add_(1, contrast_rows, gradient)
        ctx.save_for_backward(scores @ memory)
        return value / batch_size

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (gradient,) = ctx.saved_tensors
        return grad_output * gradient, None, None, None, None, None


def all_processes(tensor: Tensor) -> Tensor:
    """Concatenate the tensors (B, ...) of all processes to (processes * B, ...); B must be the same in all."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    gathered = tensor.new_empty(dist.get_world_size() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered


def memory_mib(rows: int, dimension: int) -> float:
    """Return the size of both memories in float32, in MiB."""
    return 2 * rows * dimension * torch.float32.itemsize / 2**20


class CRDLoss(DistillationLoss):
    """`crd_loss` as a method of a recipe; learnt linear layers bring both embeddings to one width.

    Each network has a memory with one row for every training image. The row follows the image's embedding. Both
    memories together hold 2 x images x dimension floats, on the device of every process and in every checkpoint. The
    rows are sorted by class, so that the images of a class are one block and negatives are drawn as row numbers outside
    it. Negatives are drawn uniformly and independently from the images of other classes, so an image may be drawn
    twice. The release draws without replacement, which has the same expectation. Classes are the classes of the data
    set, also where mixing changed the batch's labels.

    Each step compares a batch with the whole memories, which takes a few times batch x images floats: 13 MB for 64
    images of CIFAR-100, 1.3 GB for 256 images of ImageNet.

    In a run of several processes all hold the same memories: they start from the same values, and every forward moves
    the rows of the images of all processes. The normalizers are also computed from the first batch of all. The loss is
    therefore the loss of one process with all images in its batch, except for the negatives. Each process draws
    negatives for its own images, and from the same random numbers as the others, since Trainer gives all processes the
    same seed. The batch size must be the same in all processes; Trainer takes care of this. If gradients are
    accumulated, the memories move with every batch, before the step.

    Args:
        negatives: K, the number of negatives for each sample.
        temperature: above 0.
        momentum: share that a memory row keeps when its image is seen; 0 or above and below 1.
        dimension: D, width of the embeddings that are compared.
        relaxed_positives: True: the positive is any image of the class, drawn each time. False: it is the image itself.
        weight: see `DistillationLoss`.

    Raises:
        HfkdError: a parameter is out of range.
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
    reads_labels = True  # the classes of the images, when it sets up its memories
    takes_mixed_labels = False
    student_layers = ["embedding"]
    teacher_layers = ["embedding"]
    needs_index = True
    replicated_buffers = ("student_memory", "teacher_memory", "log_normalizers", "places")
    places: Tensor  # None before `setup_rows`
    student_memory: Tensor
    teacher_memory: Tensor
    log_normalizers: Tensor

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
        self.run_eagerly()  # compiled, the backward pass would read the memories as they are after the step

    def setup_rows(self, labels: Tensor) -> None:
        """Create the memories of the rows that are trained on.

        Raises:
            HfkdError: there are fewer than two classes.
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
        # For each row of the data set: its memory row, the first memory row of its class, and the size of the class.
        # A row that is not trained on gets a memory row out of range, so that reading it is an error.
        places = torch.full((len(labels), 3), len(order))
        places[order] = torch.stack(columns, dim=1)
        self.register_buffer("places", places, persistent=False)
        # A fixed seed gives the same memories in every process: DDP does not copy `replicated_buffers`.
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
        """Draw the contrast rows (B, 1 + K) of the samples at `index` (B,), the positive first."""
        place, start, size = self.places[index].split(1, dim=1)
        if self.relaxed_positives:
            place = start + _random_below(size, 1)
        others = _random_below(len(self.student_memory) - size, self.negatives)
        return torch.cat([place, others + size * (others >= start)], dim=1)

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        if self.places is None or "index" not in batch:
            raise HfkdError(
                "CRD keeps a memory of every training image. Call `setup_rows` with the labels first, and put 'index', "
                f"the images' rows in the data set, into the batch. The batch holds {sorted(batch)}."
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
        """Move the rows of the samples at `index` (B,), of all processes, towards their embeddings (B, D).

        A sample may occur twice in a step, where the sampler fills up the last batch. Its last embedding counts.
        """
        place = all_processes(self.places[index, 0])
        # Two writes to one row would come in any order. So every occurrence of a sample gets the embedding of its last
        # one, and all processes write the same values.
        position = torch.arange(len(place), device=place.device)
        last = position.new_zeros(len(self.student_memory)).scatter_reduce_(0, place, position, "amax")[place]
        pairs = all_processes(torch.cat([student, teacher], dim=1))[last]
        for memory, embedding in zip((self.student_memory, self.teacher_memory), pairs.chunk(2, dim=1), strict=True):
            moved = self.momentum * memory[place] + (1 - self.momentum) * embedding
            memory.index_copy_(0, place, F.normalize(moved, dim=1))


def _random_below(limits: Tensor, number: int) -> Tensor:
    """Draw int64 (B, number) uniformly from 0 ... limit - 1, for limits (B, 1)."""
    # The remainder favours small numbers by limit / 2^62, which is negligible.
    return torch.randint(2**62, (len(limits), number), device=limits.device).remainder_(limits)
