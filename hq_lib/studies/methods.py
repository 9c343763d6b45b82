"""The training or quantization that a ``Configuration`` asks for: its method's recipe with the file's own settings."""

import dataclasses
from dataclasses import fields

from torch import nn

from hq_lib.graph import BitPolicy, PolicyError
from hq_lib.ptq import ReconstructionConfig
from hq_lib.results.hints import check
from hq_lib.studies.configuration import FLOAT, HYBRID, LIST_KEYS, Configuration
from hq_lib.studies.ptq.recipes import RECIPES, Recipe
from hq_lib.training import QatRecipe, TrainConfig, qat_recipe, recipe
from hq_lib.training.recipes import FOLDED, METHODS, Lists, find_lists, list_recipe
from hq_lib.training.recipes import RECIPES as FLOAT_RECIPES


def float_training(run: Configuration) -> tuple[str, TrainConfig, int | None]:
    """(data set, configuration, training images or None for all) of float training."""
    if not run.net and run.model in FLOAT_RECIPES:
        name, config, n = recipe(run.model, run.profile, seed=run.seed)
        name = run.data or name
    elif {"epochs", "lr"} <= set(run.protocol) and run.data:
        name, n = run.data, None
        config = TrainConfig(epochs=1, lr=0.1, seed=run.seed)
    else:
        raise ValueError(f"{run.net or run.model} has no training recipe: give data, protocol.epochs, protocol.lr")
    return name, _with_protocol(run, config), run.n_train or n


def _with_protocol(run: Configuration, config: TrainConfig) -> TrainConfig:
    check("protocol", "key", run.protocol, [f.name for f in fields(TrainConfig)])
    return dataclasses.replace(config, **run.protocol)


def qat(run: Configuration, net: nn.Module) -> QatRecipe:
    """Policy and training of quantization-aware training from ``net``."""
    w_bits, a_bits = run.bits
    if run.method == HYBRID:
        made = qat_recipe("dsq", min(w_bits, 8), min(a_bits, 8), run.profile, seed=run.seed)
        made = dataclasses.replace(made, policy=_hybrid_policy(run))
    elif run.lists:
        made = list_recipe(net, _lists(run), run.method, run.profile, seed=run.seed)
    else:
        who = "hq train, unlike hq quantize," if run.method in RECIPES else "hq train"
        check(who, "method", [run.method], [FLOAT, HYBRID, *METHODS])
        made = qat_recipe(run.method, w_bits, a_bits, run.profile, seed=run.seed)
    policy = _with_policy(run, made.policy)
    config = dataclasses.replace(made.config, lr=made.config.lr * (FOLDED if policy.bn == "fold" else 1))
    return QatRecipe(policy, _with_protocol(run, config), run.n_train or made.n_train)


def _lists(run: Configuration) -> Lists:
    if isinstance(run.lists, str):
        return find_lists(run.model, run.lists)
    layer_abit, layer_wbit = (tuple(run.lists[key]) for key in LIST_KEYS)
    return layer_abit, layer_wbit


def _hybrid_policy(run: Configuration) -> BitPolicy:
    settings = {key: value for key, value in run.hybrid.items() if key != "ranges"}
    given = {"w_bits": run.bits[0], "a_bits": run.bits[1], "ptq": ("minmax", "lsq_plus"), **settings}
    if type(bits := given.get("boundary", 4)) is not int:
        raise PolicyError(f"hybrid: boundary is {bits!r:.80}: a whole number of bits is needed, as 4")
    try:
        return BitPolicy.hybrid(**given)
    except TypeError as error:
        raise PolicyError(f"hybrid: {error}") from error


def ptq(run: Configuration, net: nn.Module) -> tuple[Recipe, BitPolicy]:
    """Method and policy of post-training quantization of ``net``; its settings are ``protocol``."""
    who = "hq quantize, unlike hq train," if run.method in (FLOAT, HYBRID, *METHODS) else "hq quantize"
    check(who, "method", [run.method], RECIPES)
    check("protocol", "key", run.protocol, [f.name for f in fields(ReconstructionConfig)])
    if run.protocol and RECIPES[run.method].passes is None:
        raise ValueError(f"protocol: method {run.method!r} reconstructs nothing; leave protocol out")
    if run.lists:
        policy = BitPolicy.from_lists(net, *_lists(run), weight="minmax", act="lsq_plus", bn="fold")
    else:
        policy = BitPolicy(f"minmax:{run.bits[0]}", f"lsq_plus:{run.bits[1]}", bn="fold")
    return RECIPES[run.method], _with_policy(run, policy)


def _with_policy(run: Configuration, made: BitPolicy) -> BitPolicy:
    """``made`` with the fields of ``policy`` in place of its own; overrides of both, those of ``policy`` first."""
    asked = BitPolicy.from_dict({**made.to_dict(), **run.policy})
    joined = {pattern: {**made.overrides.get(pattern, {}), **said} for pattern, said in asked.overrides.items()}
    rest = {pattern: said for pattern, said in made.overrides.items() if pattern not in joined}
    return dataclasses.replace(asked, overrides={**rest, **joined})
