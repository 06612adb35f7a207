"""Every error that hzo raises on purpose: each says what was expected, what came, and what to do next."""


class HzoError(Exception):
    """Base of all errors raised by hzo."""


class TraceError(HzoError, RuntimeError):
    """The model could not be recorded as a chain of operations."""


class TapeError(HzoError, RuntimeError):
    """What a step did could not be recorded, or leads through something that hzo cannot see."""


class PlanError(HzoError, ValueError):
    """A plan cannot be made as asked, or was made for something else than it is used for."""


class InputError(HzoError, ValueError):
    """An argument (input, target, cotangent, option) has the wrong shape, type or value."""


class QueryError(HzoError, RuntimeError):
    """A callable of the user's raised an error, or its process ended, in a query."""


class QueryTimeoutError(HzoError, TimeoutError):
    """A callable of the user's did not return in time."""


class NonFiniteError(HzoError, ArithmeticError):
    """NaN or infinity in an input, an activation, a query or the loss."""


class NondeterministicError(HzoError, RuntimeError):
    """A stage gave two results for one input."""


class CoupledSamplesError(HzoError, RuntimeError):
    """Samples of a batch influence each other where they are perturbed at the same time."""


class StructureError(HzoError, ValueError):
    """A promise about the structure of a Jacobian does not hold."""


class ColoringError(HzoError, ValueError):
    """Two elements of one color share an output, or an output depends on more than its pattern says."""


class StepError(HzoError, ArithmeticError):
    """A finite-difference step vanishes in the dtype of what it perturbs."""


class PrecisionError(HzoError, ArithmeticError):
    """Differences are lost in the rounding of what they are taken of."""


class DerivativeError(HzoError, RuntimeError):
    """A derivative was asked for that a black box does not have, such as a second one."""


class DistributedError(HzoError, RuntimeError):
    """A model is spread over processes in a way that hzo would silently get wrong."""


class HzoWarning(UserWarning):
    """Base of all warnings given by hzo."""


class InaccurateGradientWarning(HzoWarning):
    """A gradient was estimated, and its own error estimate says that it is not to be trusted."""


class FailedSamplesWarning(HzoWarning):
    """Samples of a batch diverged and were left out of a gradient."""
