"""From what a user hands over to a traced chain and a plan that fits it, made once and kept."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from hzo.errors import InputError, PlanError
from hzo.planner import plan as make_plan
from hzo.plans import Plan, check_fits
from hzo.tape.surroundings import refuse_transforms
from hzo.tracing import Chain, batch_size, call_arguments, check_dense, kept, module_of, signature
from hzo.tracing.recorder import check_tensors, trace

_plans: WeakKeyDictionary[Chain, dict[frozenset[tuple[str, Any]], Plan]] = WeakKeyDictionary()


def prepare(model: Chain | nn.Module, x: Any, plan: Plan | None, options: Mapping[str, Any]) -> tuple[Chain, Plan]:
    """The chain traced for inputs like ``x``, and the plan given or made with ``options``.

    Raises:
        PlanError: the plan was made for another chain, shape, dtype or mode, or options stand beside it.
    """
    check_plan(plan, options)
    chain = traced_for(model, x, strict=plan is not None)
    return chain, fitting(chain, plan, options)


def check_plan(plan: Plan | None, options: Mapping[str, Any]) -> None:
    """Raise PlanError where options stand beside a plan, or what was given is none."""
    if plan is not None and options:
        raise PlanError(f"got a plan and options for one ({', '.join(options)}); give them to hzo.plan instead")
    if plan is not None and not isinstance(plan, Plan):
        raise PlanError(f"expected a plan made by hzo.plan, got {type(plan).__name__}; options go by their names")


def fitting(chain: Chain, plan: Plan | None, options: Mapping[str, Any]) -> Plan:
    """The plan given, if it fits the chain, or the one made with ``options``.

    Raises:
        PlanError: it was made for another chain, shape, dtype or mode.
    """
    if plan is None:
        return plan_of(chain, options)
    check_fits(plan, chain.traced)
    return plan


def made_with(plan: Plan) -> dict[str, Any]:
    """The options that a plan was made with, but for what was measured.

    Raises:
        PlanError: it was made for a noise or a target, which hold for its own calls alone.
    """
    if plan.expected is not None:
        raise PlanError("PyTorch runs other calls for one sample than this plan was made for; plan that by itself")
    return plan.given


def plan_of(chain: Chain, options: Mapping[str, Any]) -> Plan:
    """The plan of a traced chain with these options of ``hzo.plan``, made once."""
    if not all(isinstance(value, Hashable) for value in options.values()):
        return make_plan(chain, **options)  # which says what is wrong with it
    plans = _plans.setdefault(chain, {})
    key = frozenset(options.items())
    if key not in plans:
        plans[key] = make_plan(chain, **options)
    return plans[key]


def traced_for(model: Chain | nn.Module, x: Any, *, strict: bool) -> Chain:
    """``model`` itself where it is a chain traced for inputs like ``x``, else a trace of it, from memory if there."""
    about = signature_of(model, x)
    found = known_trace(model, x, about, strict=strict) or trace(model, x)
    if isinstance(model, Chain) and model.graph is not None and model.graph.noise is not None and found is not model:
        return Chain(found.model, replace(found.traced, noise=model.graph.noise))
    return found


def signature_of(model: Chain | nn.Module, x: Any) -> tuple[Any, ...]:
    """What a trace of a model depends on, of a model and inputs that can be traced."""
    refuse_transforms()
    module = module_of(model)
    if not isinstance(module, nn.Module):
        raise InputError(f"expected an nn.Module or an hzo.Chain, got {type(model).__name__}; wrap it: hzo.Chain([f])")
    check_tensors(module)
    check_dense(x)
    batch_size(*call_arguments(x))
    return signature(module, x)


def known_trace(model: Chain | nn.Module, x: Any, about: tuple[Any, ...], *, strict: bool) -> Chain | None:
    """``model`` itself where it is a chain traced for inputs like ``x``, else a trace from memory, without its noise.

    Raises:
        PlanError: ``strict``, and the chain was traced for others.
    """
    batch = batch_size(*call_arguments(x))
    if isinstance(model, Chain) and model.graph is not None:
        if model.graph.signature == about and (model.graph.batch > 1 or batch == 1):
            return model
        if strict:
            raise PlanError(
                "the chain was traced for another input shape, dtype, device or mode (train, eval, autocast, hooks, "
                "trainable parameters) than it is used with; trace and plan again: chain = hzo.trace(model, x)"
            )
    return kept(module_of(model), about, batch)
