"""Reconstruction: learn how to round the weights of one block (or layer) at a time, from a few unlabelled images.

    min over V, s   mean |f_q(x~; V, s) - f(x)|^p  +  lambda sum(1 - |2 h(V) - 1|^beta)

f the float unit on the float net's activations, f_q the quantized one behind the quantized prefix. AdaRound
(arXiv:2004.10568) does this by layer, BRECQ (arXiv:2102.05426) by block, QDrop (Wei et al. 2022, arXiv:2203.05740,
eq. 6) by block with the activations' quantization dropped at random, ``x~ = where(U < p, x_q, x_fp)``. See ``config``
for the three settings.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from hq_lib.graph import act_quantizers, blocks, set_quantization, weight_layers
from hq_lib.graph.state import refuse_float
from hq_lib.graph.tracing import device_of, eval_mode
from hq_lib.ptq.config import ReconstructionConfig
from hq_lib.ptq.progress import ReconstructionError, RunFolder, UnitReport, fingerprint
from hq_lib.ptq.units import Fisher, Pair, UnitCache, chunks, cut, drawn_labels, install, through, units
from hq_lib.quantizers import AdaRound, LSQPlusAct

_LANES = 4  # 16-bit numbers in one int64 draw
_CHECK_EVERY = 100


def keep_mask(like: Tensor, keep_probability: float, generator: torch.Generator) -> Tensor:
    """Return bool of ``like``'s shape: True, element by element, with ``keep_probability`` (to 2^-16).

    One 64-bit draw serves four elements.
    """
    n = like.numel()
    draws = torch.empty(-(-n // _LANES), dtype=torch.int64, device=like.device)
    draws.random_(-(2**63), None, generator=generator)  # type: ignore[call-overload]
    lanes, kept = draws.view(torch.int16)[:n].view(like.shape), round(keep_probability * 2**16)
    return lanes < kept - 2**15 if kept < 2**16 else torch.ones_like(lanes).bool()  # int16 ends below 2^15


def drop(x_hat: Tensor, x: Tensor, keep_probability: float, generator: torch.Generator) -> Tensor:
    """Return ``x_hat`` where a fresh mask keeps it and ``x`` elsewhere; exactly one of them at probabilities 1 and 0.

    Gradient: that of ``x_hat`` where kept, the identity to ``x`` elsewhere (the step gets none from there).
    """
    if keep_probability in (0, 1):
        return x_hat if keep_probability == 1 else x
    kept = keep_mask(x, keep_probability, generator).to(x.dtype)
    return torch.lerp(x, x_hat, kept)  # exact at weights 0 and 1; ``where`` is many times slower on random masks


@contextmanager
def dropping(net: nn.Module, keep_probability: float, generator: torch.Generator) -> Iterator[None]:
    """Inside, each activation quantizer of ``net`` keeps its result element by element with ``keep_probability``."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return drop(output, args[0], keep_probability, generator)

    with ExitStack() as hooks:
        for quantizer in act_quantizers(net).values() if keep_probability < 1 else ():
            hooks.enter_context(quantizer.register_forward_hook(hook))
        yield


def reconstruct(
    qnet: fx.GraphModule,
    images: Tensor,
    passes: ReconstructionConfig | Sequence[ReconstructionConfig],
    *,
    folder: Path | None = None,
    progress: Callable[[UnitReport], None] | None = None,
) -> list[UnitReport]:
    """Learn the rounding (and steps) of ``qnet`` in place, unit after unit; returns one report per unit and pass.

    Afterwards each weight quantizer is a hard ``AdaRound``: ``integer.lower`` takes the network as it is. Eval mode
    throughout; modes, switches and ``requires_grad`` are restored. No labels; global random state untouched.

    Args:
        qnet:     from ``graph.quantize`` with batch norms folded ("fold") or kept, grids fitted (``ptq.fit_weights``,
                  ``ptq.fit_acts``). Tensors that its policy leaves in float stay so.
        images:   (N, C, H, W) float, normalised as in training; kept in memory on ``qnet``'s device.
        passes:   what to do; ``adaround()``, ``brecq()``, ``qdrop()``, or configs of one's own, one after another.
                  0 iterations: rounding to nearest and calibrated steps stay (as ``AdaRound``, ties up).
        folder:   where finished units are written. A second call with the same network, images and passes goes on
                  behind the last finished unit and ends with the same bits; None = nothing is written.
        progress: is shown each report as its unit is finished.

    Raises:
        ReconstructionError: images of a wrong size, number or with NaN; an activation quantizer without a grid; a loss
                             that is not finite (names the unit); a folder of another run.
        QuantizeError:       a weight's grid that cannot be rounded up and down; a block that cannot be cut out; a float
                             network, or one of several inputs or outputs.
    """
    refuse_float(qnet, "ptq.reconstruct")
    several = [passes] if isinstance(passes, ReconstructionConfig) else list(passes)
    device = device_of(qnet)
    reports: list[UnitReport] = []
    for config in several:
        _check(qnet, images, config)
    for i, config in enumerate(several):
        files = None
        if folder is not None:
            files = RunFolder(Path(folder) / f"pass_{i}", fingerprint(qnet, images, asdict(config)))
        with eval_mode(qnet), set_quantization(qnet, weights=True, acts=config.quantize_acts):
            for report in _pass(qnet, images.to(device), config, files):
                reports.append(report)
                if progress is not None:
                    progress(report)
    return reports


def _check(qnet: fx.GraphModule, images: Tensor, config: ReconstructionConfig) -> None:
    if torch.is_inference_mode_enabled() or images.is_inference():
        raise ReconstructionError("in torch.inference_mode nothing can be learned: call reconstruct outside it, with "
                                  "images made outside it (images.clone() there)")  # fmt: skip
    image = next(node for node in qnet.graph.nodes if node.op == "placeholder")
    shape = tuple(image.meta["shape"][1:])
    if tuple(images.shape[1:]) != shape or not images.is_floating_point():
        raise ReconstructionError(
            f"images are {tuple(images.shape)} {images.dtype}; the network takes float (N, *{shape})"
        )
    wanted = len(images) if config.n_images is None else config.n_images
    if len(images) != wanted:
        raise ReconstructionError(f"{len(images)} images given, {wanted} asked for: set n_images to what there is")
    if config.iterations and len(images) < config.batch_size:
        raise ReconstructionError(f"{len(images)} images do not fill a batch of {config.batch_size}: lower batch_size")
    if bad := int((~torch.isfinite(images)).flatten(1).any(1).sum()):
        raise ReconstructionError(f"{bad} of {len(images)} images hold NaN or Inf: look at their normalisation")
    for name, quantizer in act_quantizers(qnet).items():
        if config.quantize_acts and not quantizer.initialised:
            raise ReconstructionError(f"activation quantizer {name!r} has no grid yet: call ptq.fit_acts first")


def _pass(
    qnet: fx.GraphModule, images: Tensor, config: ReconstructionConfig, files: RunFolder | None
) -> Iterator[UnitReport]:
    found = [(block, units(qnet, block, unit=config.unit)) for block in blocks(qnet)]
    n_units = sum(len(inside) for _, inside in found)
    pair: Pair = (images, images)
    position = 0
    weighing: list[Fisher | None] = [None] * len(found)
    if config.loss != "mse":
        graphs, alike = [cut(qnet, block) for block, _ in found], config.loss == "fisher_per_image"
        labels = drawn_labels(graphs, images, seed=config.seed)
        weighing = [Fisher(graphs[i + 1 :], labels, per_image=alike) for i in range(len(graphs))]
    for i, (block, inside) in enumerate(found):
        for region, lead in inside:
            body = cut(qnet, region)
            for name in weight_layers(body) if config.learn_rounding else ():
                install(body, name)
            report = files.load(position, body) if files is not None else None
            if report is None:
                inputs = through(cut(qnet, lead), pair, images) if lead else pair
                cache = UnitCache(inputs, body, images, fisher=weighing[i])
                report = _one(region.name, cache, config, position, n_units)
                if files is not None:
                    files.save(report, body)
            yield report
            position += 1
        if i + 1 < len(found):
            pair = through(cut(qnet, block), pair, images)


def _one(name: str, cache: UnitCache, config: ReconstructionConfig, position: int, n_units: int) -> UnitReport:
    start = time.perf_counter()
    before = after = unit_loss(cache, config.loss_power)
    rounders, undecided = rounders_of(cache.body) if config.learn_rounding else [], 0
    if config.iterations:
        generator = torch.Generator(cache.images.device).manual_seed(config.seed * 10_007 + position)
        undecided = train_unit(cache, rounders, config, generator, name)
        after = unit_loss(cache, config.loss_power)
    n_weights = sum(q.v.numel() for q in rounders)
    percent = 100 * undecided / n_weights if n_weights else 0.0
    seconds = time.perf_counter() - start
    return UnitReport(name, position, n_units, before, after, percent, n_weights, seconds)


def rounders_of(body: nn.Module) -> list[AdaRound]:
    """Return the ``AdaRound`` quantizers at work in ``body``, in execution order."""
    found = [layer.weight_quantizer for layer in weight_layers(body).values()]
    return [quantizer for quantizer in found if isinstance(quantizer, AdaRound)]


def distance(y: Tensor, target: Tensor, power: float, weight: Tensor | None = None) -> Tensor:
    """Return sum over channels (axis 1) of weight |y - target|^power, averaged over images and positions: ()."""
    d = y - target
    error = d.square() if power == 2 else d.abs().pow(power)
    return (error if weight is None else weight * error).sum(1).mean()


@torch.no_grad()
def unit_loss(cache: UnitCache, power: float) -> float:
    """Return ``distance`` of the quantized unit behind the quantized prefix, nothing dropped, over all images."""
    total = 0.0
    for index in chunks(cache.images):
        x_q, _, target = cache.batch(index)
        total += float(distance(cache.body(x_q), target, power, cache.importance(index))) * len(index)
    return total / len(cache.images)


def batch_indices(n: int, config: ReconstructionConfig, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield ``config.iterations`` batches of positions below ``n``, (batch_size,) int64, without end conditions."""
    device, size = generator.device, config.batch_size
    waiting: list[Tensor] = []
    for _ in range(config.iterations):
        if config.batch_sampling == "with_replacement":
            yield torch.randint(n, (size,), generator=generator, device=device)
            continue
        if not waiting:
            waiting = [*torch.randperm(n, generator=generator, device=device)[: n - n % size].split(size)]
        yield waiting.pop()


def train_unit(
    cache: UnitCache, rounders: list[AdaRound], config: ReconstructionConfig, generator: torch.Generator, name: str
) -> int:
    """Train one unit in place and make its rounding hard; return how many roundings were undecided just before.

    Args:
        cache:     its inputs and target; ``rounders``: its ``rounders_of``; ``name``: for error messages.
        generator: of batches and dropping.
    """
    acts = act_quantizers(cache.body).values() if config.learn_steps else ()
    steps = [p for q in acts for name, p in q.named_parameters() if p.requires_grad and name != "beta"]
    learned = {"logits": ([q.v for q in rounders], config.rounding_lr), "steps": (steps, config.step_lr)}
    groups = [{"name": key, "params": params, "lr": lr} for key, (params, lr) in learned.items() if params]
    if not groups:
        return 0
    optimizer = torch.optim.Adam(groups, fused=True)
    with (
        torch.enable_grad(),
        _learning(cache.body, rounders, [p for group in groups for p in group["params"]]),
        dropping(cache.body, config.keep_probability, generator),
    ):
        for i, index in enumerate(batch_indices(len(cache.images), config, generator)):
            for group in optimizer.param_groups:
                if group["name"] == "steps":
                    group["lr"] = config.step_lr * 0.5 * (1 + math.cos(math.pi * i / config.iterations))
            x_q, x_fp, target = cache.batch(index)
            x = drop(x_q, x_fp, config.keep_probability, generator)
            loss = distance(cache.body(x), target, config.loss_power, cache.importance(index))
            if (beta := config.beta(i)) is not None and config.rounding_weight:
                pull = sum((q.regulariser(beta) for q in rounders), loss.new_zeros(()))
                loss = loss + config.rounding_weight * pull
            if not loss.requires_grad:  # all that could learn is float or dropped
                break
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if (i % _CHECK_EVERY == 0 or i + 1 == config.iterations) and not math.isfinite(float(loss.detach())):
                raise ReconstructionError(f"unit {name!r}: the loss is {float(loss)} at iteration {i}; lower "
                                          "rounding_lr or step_lr")  # fmt: skip
        return sum(q.undecided() for q in rounders)


@contextmanager
def _learning(body: nn.Module, rounders: list[AdaRound], learned: list[nn.Parameter]) -> Iterator[None]:
    """Let only ``learned`` get gradients inside, with soft rounding; afterwards all is as it was, without gradients.

    The zero points of lsq_plus stay, whatever its step becomes, as QDrop's and BRECQ's code does.
    """
    before = [(p, p.requires_grad) for p in body.parameters()]
    offset = [q for q in act_quantizers(body).values() if isinstance(q, LSQPlusAct)]
    try:
        body.requires_grad_(False)
        for p in learned:
            p.requires_grad_(True)
        for q in rounders:
            q.soft = True
        for q in offset:
            q.hold_zero_point(True)
        yield
    finally:
        for q in offset:
            q.hold_zero_point(False)
        for q in rounders:
            q.soft = False
        for p, wanted in before:
            p.requires_grad_(wanted)
            p.grad = None
