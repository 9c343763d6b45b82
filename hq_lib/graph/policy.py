"""``BitPolicy``: the one knob. Which method and how many bits, for every weight and every activation of a network."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from pandas import DataFrame
from torch import fx, nn

from hq_lib.graph.blocks import list_bits
from hq_lib.graph.placement import Site
from hq_lib.graph.spec import (
    FLOAT_BITS,
    HYBRID,
    PolicyError,
    Spec,
    apply_overrides,
    check_width,
    make_quantizer,
    parse_spec,
    statements,
)
from hq_lib.graph.state import report
from hq_lib.results.hints import check, check_known


@dataclass(frozen=True)
class HybridRule:
    """Which method a "hybrid" tensor gets: one below ``boundary`` bits, another from there up (seed 000)."""

    qat: str | tuple[str, str] = "dsq"
    """methods (weight, activation) below ``boundary`` bits, trained through; one name stands for both"""

    ptq: str | tuple[str, str] = "minmax"
    """methods (weight, activation) from ``boundary`` bits up, calibrated after training"""

    boundary: int = 4
    """bits; the first width that is left to post-training quantization"""

    def __post_init__(self) -> None:
        for key in ("qat", "ptq"):
            methods = getattr(self, key)
            object.__setattr__(self, key, (methods, methods) if isinstance(methods, str) else tuple(methods))


@dataclass(frozen=True)
class BitPolicy:
    """Method and bits per tensor, by layer-name pattern.

    A tensor's bits come from the first of these that speaks of it, its method from its default unless an override
    names one: ``overrides`` (a later pattern wins over an earlier) > the role (image, stem output, pool output, first
    or last layer) > ``weight`` / ``act``. Activations bear the name of the layer that makes them (with its batch norm
    and activation function), an addition that of its block: "layer1.0.conv1", "layer1.0.add"; the image is "input".
    Quantized tensors that share a grid (see ``placement``) have the most bits among them, if no override says fewer.
    """

    weight: Any = "minmax:8"
    """default of weights: a Spec, "method:bits", bits, or a mapping with options"""

    act: Any = "minmax:8"
    """default of activations, likewise"""

    first_last_bits: int | None = 8
    """bits of the weights of the first layer and of every layer that feeds an output, and of the inputs of the latter
    (in ``academic`` placement also of the tensor that is pooled into one, QDrop's a[-1]); 32 = float; None = no
    exception; says nothing of weights, or activations, that are float by default"""

    stem_out_bits: int | None = None
    """bits of the first layer's output (CaPTQ and BRECQ's dagger rows: 8; QDrop's own: None = as other activations)"""

    input_bits: int | None = None
    """bits of the image, always by min-max; None = 8 in ``deploy``, 32 (float) in ``academic`` or with float ``act``"""

    pool_bits: int | None = None
    """bits of average-pool outputs; None = by role or as other activations (official QDrop has none there: 32)"""

    overrides: Mapping[str, Any] = field(default_factory=dict)
    """name, pattern with *, or type ("first", "last", "depthwise", "linear") -> ``{"weight": spec, "act": spec}``, or
    one spec for both; partial specs keep the rest"""

    placement: str = "deploy"
    """"deploy": every tensor that feeds an add is quantized; "academic": adds are float, one quantizer after each"""

    bn: str = "keep"
    """"keep" batch norms, or "fold" them beforehand"""

    hybrid_rule: HybridRule | None = None
    """how the method "hybrid" becomes one by its bits; set by ``BitPolicy.hybrid``"""

    def __post_init__(self) -> None:
        check_known(self.placement, ("deploy", "academic"), "policy.placement", error=PolicyError)
        check_known(self.bn, ("keep", "fold"), "policy.bn", error=PolicyError)
        for kind in ("weight", "act"):
            spec = parse_spec(getattr(self, kind), f"policy.{kind}")
            object.__setattr__(self, kind, spec)
            self._settled(spec, kind, f"policy.{kind}")
        for name in ("first_last_bits", "stem_out_bits", "input_bits", "pool_bits"):
            if getattr(self, name) is not None:
                check_width(getattr(self, name), f"policy.{name}")
        overrides: dict[str, dict[str, Any]] = {}
        for pattern, said, _, like in statements(self.overrides):
            overrides.setdefault(pattern, {})[said] = like.to_plain() if isinstance(like, Spec) else like
        object.__setattr__(self, "overrides", overrides)
        if self.input_bits is None:
            quantized = self.placement == "deploy" and not self.act.is_float
            object.__setattr__(self, "input_bits", 8 if quantized else FLOAT_BITS)

    def _settled(self, spec: Spec, kind: str, key: str) -> Spec:
        """Return ``spec`` with the method that the hybrid rule gives it; a refusal of the method names ``key``."""
        rule = self.hybrid_rule
        if spec.method == HYBRID:
            if rule is None:
                raise PolicyError(f"{key}: method 'hybrid' needs a rule; make the policy with BitPolicy.hybrid(...)")
            methods = rule.qat if spec.bits < rule.boundary else rule.ptq
            spec = replace(spec, method=methods[kind == "act"])
        make_quantizer(spec, kind, key)
        return spec

    def resolve(
        self, layers: Mapping[str, Collection[str]], sites: Iterable[Site]
    ) -> tuple[dict[str, Spec], dict[str, str]]:
        """Return the Spec of each tensor, "weight <layer>", then "act <activation>", and the keys of its overrides.

        Args:
            layers: name -> types of each layer, from ``placement.layer_types``.
            sites:  from ``placement.find_sites``. An activation is of its layer's types, but "last" means the input of
                    a last layer.

        Raises:
            PolicyError: names the override that matches nothing, or the tensor whose bits its method cannot do.
        """
        types = {f"weight {name}": set(of) for name, of in layers.items()}
        plain = self.first_last_bits is None or self.weight.is_float
        ends = self.weight if plain else replace(self.weight, bits=self.first_last_bits)
        specs = {tensor: self.weight if {"first", "last"}.isdisjoint(of) else ends for tensor, of in types.items()}
        for site in sites:
            specs[f"act {site.name}"] = self._by_role(site.role)
            types[f"act {site.name}"] = {*layers.get(site.name, ())} - {"last"} | ({"last"} & {site.role[-4:]})
        origins = apply_overrides(self.overrides, specs, types)
        for tensor, spec in specs.items():
            kind, name = tensor.split(" ", 1)
            specs[tensor] = self._settled(spec, kind, f"{origins.get(tensor, f'policy.{kind}')} (tensor {name!r})")
        return specs, origins

    def _by_role(self, role: str) -> Spec:
        if role == "image":
            return Spec("minmax", self.input_bits or FLOAT_BITS)
        last_bits = None if self.act.is_float else self.first_last_bits
        order = {
            "pool_last": (self.pool_bits, last_bits),
            "last": (last_bits,),
            "stem": (self.stem_out_bits,),
            "pool": (self.pool_bits,),
        }
        bits = next((b for b in order.get(role, ()) if b is not None), None)
        return self.act if bits is None else replace(self.act, bits=bits)

    def describe(self) -> str:
        """Return the policy in one line, to be printed under every table made with it."""
        shown = [f"W {self.weight}", f"A {self.act}"]
        shown += [f"first/last {_bits(self.first_last_bits)}", f"stem output {_bits(self.stem_out_bits)}"]
        shown += [f"image {_bits(self.input_bits)}", f"pool {_bits(self.pool_bits)}", self.placement, f"BN {self.bn}"]
        if self.hybrid_rule:
            rule = self.hybrid_rule
            shown.append(f"hybrid {'/'.join(rule.qat)} below {rule.boundary} bits, {'/'.join(rule.ptq)} from there")
        return " · ".join([*shown, f"{len(self.overrides)} overrides"] if self.overrides else shown)

    def report(self, qnet: fx.GraphModule) -> DataFrame:
        """Return one row per weight and activation of ``qnet``; see ``hq_lib.graph.state``."""
        if self != qnet.meta.get("policy"):
            raise PolicyError("report: this network was made by another policy, or by none: qnet.policy.report(qnet)")
        return report(qnet)

    def to_dict(self) -> dict[str, Any]:
        """Return the policy as plain data (what YAML and records hold); ``from_dict`` reads it back."""
        return asdict(self) | {"weight": self.weight.to_plain(), "act": self.act.to_plain()}

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "BitPolicy":
        """Return the policy that ``entries`` describe; an unknown key is an error that offers the nearest known one."""
        check("policy", "key", entries, [f.name for f in fields(cls)], error=PolicyError)
        entries = dict(entries)
        if isinstance(rule := entries.get("hybrid_rule"), Mapping):
            check("policy.hybrid_rule", "key", rule, [f.name for f in fields(HybridRule)], error=PolicyError)
            entries["hybrid_rule"] = HybridRule(**rule)
        return cls(**entries)

    @classmethod
    def hybrid(
        cls,
        w_bits: int,
        a_bits: int,
        *,
        qat: str | tuple[str, str] = "dsq",
        ptq: str | tuple[str, str] = "minmax",
        boundary: int = 4,
        first_last_bits: int | None = None,
        **settings: Any,
    ) -> "BitPolicy":
        """Return the policy that trains tensors below ``boundary`` bits and calibrates the others (seed 000).

        The method follows from the bits of each tensor, so every later change of bits (a role, an override) keeps to
        the rule. The first convolution and the classifier take part, unless ``first_last_bits`` says otherwise.

        Args:
            w_bits, a_bits:  of weights and activations (1..16, 32 = float); ``overrides`` say others by layer.
            qat, ptq:        the two methods; a pair means (weight, activation).
            boundary:        bits from which on the tensor is left to PTQ (its text: 4; its last configuration: 5).
            first_last_bits: see ``BitPolicy``; here None, so that the rule covers these layers too.
            settings:        any other field of ``BitPolicy``.

        Raises:
            PolicyError: bits or methods that do not exist.
        """
        rule = HybridRule(qat, ptq, boundary)
        weight, act = ({"method": HYBRID, "bits": bits} for bits in (w_bits, a_bits))
        return cls(weight, act, first_last_bits=first_last_bits, hybrid_rule=rule, **settings)

    @classmethod
    def from_lists(
        cls,
        net: nn.Module,
        layer_abit: Sequence[int],
        layer_wbit: Sequence[int],
        *,
        weight: Any = "dorefa_hw",
        act: Any = "mpact",
        placement: str = "deploy",
        bn: str = "keep",
    ) -> "BitPolicy":
        """Return seed 001's bit lists as a policy for ``net``.

        Entry i speaks of layer i in the order stem, blocks, header, classifier: ``layer_wbit[i]`` of its weights,
        ``layer_abit[i]`` of its *input* (entry 0: the image). Tensors inside block i, its shortcut's output included,
        use entry i; its output uses the entry of the layer that reads it, so pools use the classifier's. A list with
        the blocks alone (ResNet-20's 9) leaves stem and activations around it in float and the classifier's weights
        at 16, as the seed hard-coded. 32 = float.

        Args:
            net:        the float net: 13 entries for ToyNet, 20 for MobileNetV2, 9 or 11 for ResNet-20.
            layer_abit: bits of each layer's input.
            layer_wbit: bits of each layer's weights.
            weight:     method of all weights, or a mapping of it with its options.
            act:        method of all activations but the image, likewise.
            placement, bn: as in ``BitPolicy``.

        Raises:
            PolicyError: a list's length fits neither the layers nor the blocks of ``net``.
        """
        input_bits, overrides = list_bits(net, layer_abit, layer_wbit, placement=placement)
        given = {"overrides": overrides, "input_bits": input_bits, "placement": placement, "bn": bn}
        weight = parse_spec(weight, "policy.weight", base=Spec(bits=8))
        return cls(weight, parse_spec(act, "policy.act", base=Spec(bits=8)), first_last_bits=None, **given)


def _bits(bits: int | None) -> str:
    return {None: "as the rest", 32: "float"}.get(bits, str(bits))
