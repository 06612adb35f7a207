"""Functions of activities in the many ways in which they are called, against autograd: closed rules, so to rounding."""

import pytest

from support.adjoint_cases import Run, apply_all, normal, operands, worst
from support.forms import CLOSED, FORMS, functions_named

NAMED = [(name, f, k) for name, (calls, *_) in FORMS.items() for f in functions_named(name) for k in range(len(calls))]


@pytest.mark.parametrize(("name", "function", "k"), NAMED, ids=lambda v: v if isinstance(v, (str, int)) else "")
def test_form(name, function, k):
    calls, expected, shape, other = FORMS[name]
    x, y = normal(*shape), normal(*other)
    model = Run(lambda x, y: calls[k](function, x, y))
    try:
        model(x, y)
    except TypeError as error:  # torch.Tensor.add takes no `input`, and the like
        pytest.skip(str(error).splitlines()[0])
    # An operator reaches the recording under the name of the method that it stands for.
    found = apply_all(model, x, y, target=None if name.startswith("__") else function)
    assert worst(found) <= CLOSED
    assert operands(found) >= expected
