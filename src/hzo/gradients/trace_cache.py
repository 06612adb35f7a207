"""From what a user hands over to a traced chain and a plan that fits it, made once and kept."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from hzo.errors import InputError, PlanError
from hzo.planner import plan as make_plan
from hzo.plans import Plan
from hzo.tracing import Chain, batch_size, call_arguments, check_dense, module_of, signature
from hzo.tracing.recorder import check_tensors, trace

_KEPT = 8  # traces a module: shapes and modes that alternate (train and eval, the last smaller batch) stay
_plans: WeakKeyDictionary[Chain, dict[frozenset[tuple[str, Any]], Plan]] = WeakKeyDictionary()


class _Kept(dict[tuple[Any, ...], Chain]):
    """Traces of a module, kept on the module: a trace refers to its module, so a table elsewhere would never be freed.

    A copied or unpickled module starts without them.
    """

    name = "_hzo_traces"

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


def prepare(
    model: Chain | nn.Module, x: Any, plan: Plan | None, options: Mapping[str, Any], *, anew: bool = False
) -> tuple[Chain, Plan]:
    """The chain traced for inputs like ``x``, and the plan given or made with ``options``.

    ``anew``: what is remembered does not fit; trace all of ``x`` again.

    Raises:
        PlanError: the plan was made for another chain, shape, dtype or mode, or options stand beside it.
    """
    if plan is not None and options:
        raise PlanError(f"got a plan and options for one ({', '.join(options)}); give them to hzo.plan instead")
    if plan is not None and not isinstance(plan, Plan):
        raise PlanError(f"expected a plan made by hzo.plan, got {type(plan).__name__}; options go by their names")
    chain = traced_for(model, x, strict=plan is not None, anew=anew)
    if plan is not None:
        if plan.fingerprint != chain.traced.fingerprint:
            raise PlanError(
                "this plan was made for another chain, input shape, dtype or set of trainable parameters; make one "
                "for this: chain = hzo.trace(model, x); plan = hzo.plan(chain)"
            )
        operations = chain.traced.operations
        for node in plan.nodes:
            if node.probe is not None and any(operations[k].coupled for k in node.operations):
                raise PlanError(
                    "this plan was made in another mode (train or eval) and would perturb samples that now influence "
                    "each other; make one for this: chain = hzo.trace(model, x); plan = hzo.plan(chain)"
                )
        return chain, plan
    return chain, plan_of(chain, options)


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
    kept = _plans.setdefault(chain, {})
    key = frozenset(options.items())
    if key not in kept:
        kept[key] = make_plan(chain, **options)
    return kept[key]


def traced_for(model: Chain | nn.Module, x: Any, *, strict: bool, anew: bool = False) -> Chain:
    """``model`` itself where it is a chain traced for inputs like ``x``, else a trace of it, from memory if there."""
    module = module_of(model)
    if not isinstance(module, nn.Module):
        raise InputError(f"expected an nn.Module or an hzo.Chain, got {type(model).__name__}; wrap it: hzo.Chain([f])")
    check_tensors(module)
    check_dense(x)
    batch_size(*call_arguments(x))
    wanted = signature(module, x)
    if isinstance(model, Chain) and model.graph is not None and not anew:
        if model.graph.signature == wanted:
            return model
        if strict:
            raise PlanError(
                "the chain was traced for another input shape, dtype, device or mode (train, eval, autocast, hooks, "
                "trainable parameters) than it is used with; trace and plan again: chain = hzo.trace(model, x)"
            )
    kept = module.__dict__.setdefault(_Kept.name, _Kept())
    if wanted not in kept or anew:
        while len(kept) >= _KEPT:
            kept.pop(next(iter(kept)))
        kept[wanted] = trace(model, x, samples=batch_size(*call_arguments(x)) if anew else None)
    found: Chain = kept[wanted]
    if isinstance(model, Chain) and model.graph is not None and model.graph.noise is not None:
        return Chain(found.model, replace(found.traced, noise=model.graph.noise))
    return found
