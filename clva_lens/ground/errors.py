"""Every error that clva_lens raises on purpose: what was found, then what to do about it."""


class ClvaLensError(Exception):
    """Base of all errors raised by clva_lens.

    Example::

        try:
            model = cl.load("toy-lava")
        except cl.ClvaLensError as error:
            print(error)  # what was found, then what to do
    """


class UnknownName(ClvaLensError, KeyError):
    """A name that no registry knows; the message lists the known ones and the nearest."""

    def __str__(self) -> str:
        """Return the message as written (KeyError would quote it)."""
        return str(self.args[0])


class ParameterError(ClvaLensError, ValueError):
    """A parameter outside its range."""


class PromptError(ClvaLensError, ValueError):
    """An image or a question that cannot be made into a prompt."""


class SpanError(ClvaLensError, ValueError):
    """Token spans that do not fit the sequence, or a sequence without image tokens."""


class ModelLoadError(ClvaLensError):
    """A model that cannot be found, read or trusted."""


class ModelCheckError(ClvaLensError):
    """A model whose attention is not where its family says it is."""


class InterventionError(ClvaLensError, RuntimeError):
    """An intervention at the wrong place or time, or on a model that cannot be intercepted."""


class LogitsError(ClvaLensError, ArithmeticError):
    """Logits that are NaN or infinite, from which no answer can be read."""


class BenchmarkError(ClvaLensError, ValueError):
    """Answers and labels that cannot be scored together."""


class FigureError(ClvaLensError, ValueError):
    """Data that a figure cannot draw."""


class RecordError(ClvaLensError):
    """An analysis that cannot be run, or a record that is missing, damaged or in the way."""
