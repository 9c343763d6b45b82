"""The training loop, for float networks and through quantizers alike.

Everything random of an epoch (order, crops, flips, dropout) comes from ``config.seed`` and the epoch's number, and the
state is saved after each epoch: a run killed at any moment and started again, on the same machine with as many threads,
ends with bit-identical weights.
"""

import math
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from hq_lib.data import ImageSet, batches
from hq_lib.graph.modes import eval_mode, repeatable
from hq_lib.graph.tracing import channels_last_, device_of, has_views
from hq_lib.training import machine, run_state
from hq_lib.training.config import TrainConfig, lr_factor, set_lr, sgd
from hq_lib.training.evaluation import Batches, cross_entropy, distance, evaluate, given, logits_of
from hq_lib.training.weight_noise import weight_noise

SAY_EVERY_S = 30.0  # seconds between signs of life within an epoch


@dataclass(frozen=True)
class FitResult:
    """What a run did; the network itself is left holding the last epoch's weights."""

    history: list[dict[str, float]]
    """One row an epoch: epoch, train_loss, lr (of the weights, last step), seconds, and with validation images
    val_acc_pct, val_loss."""
    val_acc_pct: float
    """Validation accuracy after the last epoch, percent; NaN without validation images."""
    seconds: float
    """Training time over all epochs, resumed ones included."""
    config: TrainConfig
    """What was run: as asked for, with the precision and compilation that "auto" came to."""


def fit(
    net: nn.Module,
    train: ImageSet | Batches,
    val: ImageSet | Batches | None,
    config: TrainConfig,
    run_dir: Path | None = None,
    *,
    teacher: nn.Module | None = None,
    before_epoch: Callable[[nn.Module, int], None] | None = None,
    say: Callable[[str], None] | None = print,
) -> FitResult:
    """Trains ``net`` in place with SGD; returns the history.

    Args:
        net:          logits from (B, C, H, W) normalised images; stays on its device.
        train:        training images, or batches of normalised ones (B, C, H, W) with their labels (B,): anything with
                      a length that is walked anew in each epoch, as a ``DataLoader``; ``config.batch_size``, ``pad``
                      and ``flip`` are for images only.
        val:          validation images or batches, evaluated after each epoch; None where all images are trained on.
        config:       see ``TrainConfig``.
        run_dir:      folder to save to and resume from; None keeps nothing.
        teacher:      float network whose logits the student is pulled to, with ``config.distill`` above 0; it runs in
                      eval mode (its own is restored), in the run's precision and compiled where the student is.
        before_epoch: called as (net, epoch from 0) before each epoch, the net in train mode already; a module that it
                      puts in eval mode stays there for the epoch.
        say:          where progress goes: a line an epoch, and one every 30 s within long ones; None is silent.

    Several processes, with a batch shared among them, train as one: see ``training.machine``.

    Raises:
        FloatingPointError: the loss stopped being finite; names the epoch and the learning rate.
        ValueError: ``run_dir`` holds a run of another configuration, a damaged state, or one that
            another process is writing; batches without a length, or that processes cannot share evenly;
            a teacher without ``config.distill``, or the other way round.
    """
    noisy = weight_noise(net, config.weight_noise, drive_bits=config.drive_bits, converter_bits=config.converter_bits)
    if machine.rank():  # the first process alone writes and speaks
        run_dir = say = None
    taught = nullcontext() if teacher is None else eval_mode(teacher)
    with run_state.owned(run_dir), noisy, taught, repeatable():
        return _Run(net, train, val, config, run_dir, teacher, before_epoch, say or (lambda _: None)).go()


def _on(images: ImageSet | Batches, device: torch.device) -> ImageSet | Batches:
    """Images in memory once and for all on the device that trains (a quarter of what they take as float32)."""
    if not isinstance(images, ImageSet) or device.type == "cpu" or not isinstance(images.images, Tensor):
        return images
    return replace(images, images=images.images.to(device), labels=images.labels.to(device))


def _n_steps(train: ImageSet | Batches, config: TrainConfig) -> int:
    if isinstance(train, ImageSet):
        if len(train) == 0:
            raise ValueError(f"nothing to train on: {train.spec.name} {train.split} is empty")
        return max(len(train) // config.batch_size, 1)
    if not isinstance(train, Sized) or isinstance(train, Iterator) or len(train) == 0:
        raise ValueError("batches to train on are walked once an epoch: pass a DataLoader or a list that is not empty")
    return len(train)


@dataclass
class _Run:
    """The state of one call of ``fit``, whose arguments it has."""

    net: nn.Module
    train: ImageSet | Batches
    val: ImageSet | Batches | None
    config: TrainConfig
    run_dir: Path | None
    teacher: nn.Module | None
    before_epoch: Callable[[nn.Module, int], None] | None
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        if (self.teacher is None) != (self.config.distill == 0):
            raise ValueError(
                f"config.distill={self.config.distill} and teacher={'None' if self.teacher is None else 'given'}: "
                "distillation needs both"
            )
        machine.keep_freed_memory_()
        self.device, self.plain = device_of(self.net), has_views(self.net)
        if not self.plain:
            channels_last_(self.net)
        self.train = _on(self.train, self.device)
        self.val = None if self.val is None else _on(self.val, self.device)
        self.steps = _n_steps(self.train, self.config)
        self.part = slice(None)
        if isinstance(self.train, ImageSet):
            self.part = machine.share(min(len(self.train), self.config.batch_size))
        n_steps, stored = self.config.epochs * self.steps, run_state.settings(self.run_dir)
        settled = machine.settled(self.config, self.net, self._first, n_steps=n_steps, stored=stored, say=self.say)
        self.config = machine.agreed(settled)
        self.optimizer = sgd(self.net, self.config)
        self.forward = self._fast(machine.parallel(self.net))
        self.taught = None if self.teacher is None else self._fast(self.teacher)
        self.history: list[dict[str, float]] = []
        self.lr = 0.0  # of the last step
        self.guessing = math.inf  # the loss of equal probabilities, once logits are seen

    def _fast(self, net: nn.Module) -> Callable[[Tensor], Tensor]:
        return machine.compiled(net) if self.config.compile else net

    def go(self) -> FitResult:
        """All epochs that are still to do."""
        self._resume()
        for epoch in range(len(self.history), self.config.epochs):
            start = time.perf_counter()
            torch.manual_seed(self._epoch_seed(epoch) + 1_000_000_007 * machine.rank())
            self.net.train()
            if self.before_epoch:
                self.before_epoch(self.net, epoch)
            train_loss = self._epoch(epoch)
            self._finish_epoch(epoch, train_loss, start)
        seconds = sum(row["seconds"] for row in self.history)
        return FitResult(self.history, self.history[-1].get("val_acc_pct", math.nan), seconds, self.config)

    def _epoch_seed(self, epoch: int) -> int:
        return (self.config.seed * 1_000_003 + epoch) % 2**63

    def _first(self) -> tuple[Tensor, Tensor]:
        return self._here(*next(iter(self._walk(0))))

    def _here(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A batch on the network's device, in plain order where its views need that."""
        return (x.contiguous() if self.plain else x).to(self.device), y.to(self.device)

    def _epoch(self, epoch: int) -> float:
        """Mean training loss of one pass."""
        total, spoken = torch.zeros((), device=self.device), time.perf_counter()
        for i, (x, y) in enumerate(self._walk(epoch)):
            self.lr = self.config.lr * lr_factor(epoch * self.steps + i, self.steps, self.config)
            set_lr(self.optimizer, self.lr)
            total += self._step(*self._here(x, y))
            if time.perf_counter() - spoken > SAY_EVERY_S:
                spoken = time.perf_counter()
                self.say(f"epoch {epoch + 1}/{self.config.epochs}: batch {i + 1}/{self.steps}")
        mean = machine.synchronised(self.net, total.item() / self.steps)
        if not math.isfinite(mean):
            at = f"epoch {epoch + 1} at learning rate {self.config.lr:.3g}"
            raise FloatingPointError(f"loss is {mean} in {at}: lower config.lr")
        return mean

    def _walk(self, epoch: int) -> Batches:
        if not isinstance(self.train, ImageSet):
            return ((x[machine.share(len(x))], y[machine.share(len(y))]) for x, y in self.train)
        generator = torch.Generator().manual_seed(self._epoch_seed(epoch))
        return batches(
            self.train, self.config.batch_size, generator=generator, pad=self.config.pad, flip=self.config.flip,
            device=self.device, part=self.part,
        )  # fmt: skip

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        with machine.autocast(self.device, self.config.precision):
            loss = self._loss(logits_of(self.forward(x)), y, x)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _loss(self, logits: Tensor, labels: Tensor, x: Tensor) -> Tensor:
        """(1 - share) CE(logits, labels) + share KL(teacher || student)."""
        self.guessing = math.log(logits.shape[1])
        entropy = cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        if self.taught is None:
            return entropy
        share = self.config.distill
        with torch.no_grad():
            taught = given(self.taught, x).float()
        return (1 - share) * entropy + share * distance(logits, taught)

    def _finish_epoch(self, epoch: int, train_loss: float, start: float) -> None:
        row = {"epoch": epoch + 1, "train_loss": train_loss, "lr": self.lr}
        validation = ""
        if self.val is not None:
            score = evaluate(self.net, self.val)
            row |= {"val_acc_pct": score.acc_pct, "val_loss": score.loss}
            validation = f"validation {score.acc_pct:.2f} %, "
        row["seconds"] = time.perf_counter() - start
        self.history.append(row)
        if self.run_dir is not None:
            state = {"history": self.history, "net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}
            run_state.save(self.run_dir, state)
        self.say(f"epoch {epoch + 1}/{self.config.epochs}: loss {train_loss:.4f}, {validation}{row['seconds']:.0f} s")
        if epoch and train_loss > 0.999 * self.guessing:
            self.say(f"this is the loss of guessing ({self.guessing:.3f}): nothing is learned, lower config.lr")

    def _identity(self) -> dict[str, object]:
        """What tells one run from another, of the data as far as it is known."""
        found: dict[str, object] = {**asdict(self.config), "n_val": 0}
        for key, images in (("n_train", self.train), ("n_val", () if self.val is None else self.val)):
            n = len(images) if isinstance(images, Sized) else None
            found[key] = n if isinstance(images, ImageSet | tuple) else "batches" if n is None else f"{n} batches"
        if isinstance(self.train, ImageSet):
            found["data"] = self.train.spec.name
        return {**found, "n_parameters": sum(p.numel() for p in self.net.parameters())}

    def _resume(self) -> None:
        state = machine.agreed(None if self.run_dir is None else run_state.begin(self.run_dir, self._identity()))
        if state is None:
            return
        try:
            self.net.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.history = [dict(row) for row in state["history"]]
        except (ValueError, RuntimeError) as error:
            raise run_state.another(self.run_dir or Path(), error) from error
        except (LookupError, TypeError, AttributeError) as error:
            raise run_state.unusable(self.run_dir or Path(), run_state.STATE, error) from error
        self.say(f"resumed after epoch {len(self.history)} of {self.config.epochs}")
