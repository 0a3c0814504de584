"""One forward pass of one MoE layer: what it remembers for its replay, what it measures, what it puts off.

A :class:`LayerPass` goes down through everything that a layer calls, dispatchers and compressors of other packages
included:

    p.decided[key]                        what this layer decided; under activation recomputation, the first time
    p.replay                              whether this is the second time
    p.add(lsh_rows=512)                   add to the sums that gauges are made of (gauges.py)
    y = p.time("experts_time_ms", f, x)   f(x), and the time it takes, its backward pass included
    began = p.clock(); p.since(began, "wire_time_ms")   the same where there is no backward pass
    p.elapsed(wire_time_ms=began)         the same of several moments
                                          (one micro-batch per log interval is timed and stands for all)
    later = p.defer(f); p.run_deferred()  f() while rows travel; later() is its result
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Span:
    """One measured interval: wall time on a CPU, stream time on a GPU (without waiting for it)."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._began: Any = None
        self._ended: Any = None

    def start(self) -> None:
        self._began = self._now()

    def stop(self) -> None:
        self._ended = self._now()

    def milliseconds(self) -> float:
        """The length. On a GPU its end must have been reached: synchronise first."""
        if self._cuda:
            return self._began.elapsed_time(self._ended)
        return (self._ended - self._began) * 1e3

    @staticmethod
    def between(began: Any, ended: Any) -> Span:
        """Of two events of a GPU's stream."""
        span = Span(torch.device("cuda"))
        span._began, span._ended = began, ended
        return span

    def _now(self) -> Any:
        return _event() if self._cuda else time.perf_counter()


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _no_moment() -> None:
    return None


class _Mark(torch.autograd.Function):
    """The identity; calls back when the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, callback: Callable[[], None]) -> Tensor:
        ctx.callback = callback
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.callback()
        return grads[0], None


def measure(device: torch.device, record: Callable[[Span], None], function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``; ``record`` is called with a finished span for the forward pass, and for the backward pass.

    The backward pass is what lies between the gradient's arrival at the result and at the first argument (of a tuple: at its
    first part). Without a gradient there is none to time.
    """
    span = Span(device)
    span.start()
    first = arguments[0] if arguments else None
    x = first[0] if isinstance(first, tuple) and first else first
    if not (isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()):
        result = function(*arguments)
    else:
        backward = Span(device)

        def leave() -> None:
            backward.stop()
            record(backward)

        result = function(_with_first(first, _Mark.apply(x, leave)), *arguments[1:])
        of_result = result[0] if isinstance(result, tuple) else result
        result = _with_first(result, _Mark.apply(of_result, backward.start))
    span.stop()
    record(span)
    return result


def _with_first(value: Any, first: Tensor) -> Any:
    """``first``; or the tuple ``value`` with it in the first place (a named tuple stays one)."""
    if not isinstance(value, tuple):
        return first
    parts = (first, *value[1:])
    return type(value)._make(parts) if hasattr(value, "_make") else parts


class ReplayMemo(dict[Hashable, Any]):
    """What one forward pass of a layer decided, so that a recomputed forward repeats it instead of deciding again.

    The transformer layer makes one memo per call and passes it down through ``torch.utils.checkpoint``. The first forward
    fills it; when the backward pass runs the same code again, it is full. So nothing is hashed or clustered twice, the
    replay cannot diverge from the original, and counters can tell a replay from a new pass:

        if key not in memo:
            memo[key] = decide()
        decision = memo[key]
    """


class LayerRecord:
    """The sums of one layer since they were last collected. Adding never waits for a GPU.

    Attributes:
        sums: by name; numbers, or 0-dim tensors that stay on their device until they are collected.
        spans: measured on a GPU and not yet read.
        times: milliseconds of the timed micro-batches, by name.
        load_E: fp64, this rank's rows per expert, before compression.
        micro_batches: that passed the layer.
        enabled: False while nothing counts (evaluation, generation).
        timing: whether passes that begin now are timed: a span on a GPU is two events, too many for every micro-batch.
    """

    def __init__(self, num_experts: int, device: torch.device, known: set[str]) -> None:
        """``known``: the sums that some gauge is made of."""
        self.device = device
        self.enabled = self.timing = True
        self.sums: dict[str, float | Tensor] = {}
        self.times: dict[str, float] = {}
        self.spans: list[tuple[str, Span]] = []
        self.load_E = torch.zeros(num_experts, dtype=torch.float64, device=device)
        self.micro_batches = 0
        self._known = known

    def add(self, **values: float | Tensor) -> None:
        """Add numbers or detached 0-dim tensors to sums. Raises ValueError if no gauge is made of one of them."""
        if not self.enabled:
            return
        for name, value in values.items():
            self._check(name)
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def add_time(self, name: str, milliseconds: float) -> None:
        """Add to the time ``name`` of the timed micro-batches; raises as :meth:`add`."""
        if self.enabled:
            self._check(name)
            self.times[name] = self.times.get(name, 0.0) + milliseconds

    def _check(self, name: str) -> None:
        if name not in self._known:
            known = ", ".join(sorted(self._known))
            raise ValueError(f"no gauge is made of {name!r}; declare one: gauges are made of {known}")


class Deferred(Generic[T]):
    """A computation that runs while rows travel, or at the latest when its result is wanted."""

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute: Callable[[], T] | None = compute
        self._result: list[T] = []

    def __call__(self) -> T:
        if self._compute is not None:
            self._result.append(self._compute())
            self._compute = None
        return self._result[0]


class Noise:
    """Random numbers of stochastic rounding: one stream per rank, layer and iteration, so that a resumed run repeats it."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator: torch.Generator | None = None

    def generator(self, device: torch.device) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator(device).manual_seed(self._seed)
        return self._generator


_BEGAN = "a pass began"


class LayerPass:
    """See the module's docstring.

    Attributes:
        decided: the memo: what this layer's forward pass decided, for its replay.
        replay: whether the layer runs again, for its backward pass. What happens twice is counted twice (bytes, times);
            what was decided once (rows, losses) is for its callers to add once.
        noise: for stochastic rounding of gradients.
        device: where the layer's tokens are.
        clock: returns a moment, for :meth:`since`; None where this pass is not timed.
        agreed: returns the plan of what a compressor sends (transport.py), which has its counts on the host: waits for their
            arrival. None where they do not follow from the counts of its rows (``Compressor.sent_rows``).
    """

    def __init__(self, record: LayerRecord, memo: ReplayMemo | None = None, noise: Noise | None = None) -> None:
        self.decided = ReplayMemo() if memo is None else memo
        self.replay = _BEGAN in self.decided
        self.agreed: Callable[[], Any] | None = None
        # A replay is timed if its pass was.
        self._timed: bool = self.decided.setdefault(_BEGAN, record.enabled and record.timing)
        self.noise = noise or Noise(0)
        self.add, self.device = record.add, record.device
        self._record = record
        self.clock: Callable[[], Any] = _event if record.device.type == "cuda" else time.perf_counter
        if not self._timed:
            self.clock = _no_moment
        self._deferred: list[Deferred[Any]] = []

    def time(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)``, its milliseconds added to the sum ``name``; see :func:`measure`."""
        record = self._record
        if not self._timed:
            return function(*arguments)

        def book(span: Span) -> None:
            if not record.enabled:
                return
            if record.device.type == "cuda":
                record.spans.append((name, span))  # read when collected, so that nothing waits for the GPU
            else:
                record.add_time(name, span.milliseconds())

        return measure(record.device, book, function, *arguments)

    def since(self, began: Any, name: str, **values: float | Tensor) -> None:
        """Add the milliseconds since a moment of the clock to the sum ``name``, and further values to theirs."""
        self.elapsed(**{name: began})
        self._record.add(**values)

    def elapsed(self, **moments: Any) -> None:
        """Add the milliseconds since each of these moments of the clock to the sum of its name."""
        record = self._record
        if not record.enabled or not self._timed:
            return
        if record.device.type == "cuda":
            now = _event()
            record.spans += [(name, Span.between(began, now)) for name, began in moments.items()]
            return
        seconds = time.perf_counter()
        for name, began in moments.items():
            record.add_time(name, (seconds - began) * 1e3)

    def add_load(self, counts_E: Tensor, **values: float | Tensor) -> None:
        """Add one micro-batch's rows per expert (this rank's rows, before compression), and to sums as :meth:`add` does."""
        if self._record.enabled:
            self._record.load_E += counts_E
            self._record.add(**values)

    def silent(self) -> LayerPass:
        """A pass of its own that measures nothing."""
        record = LayerRecord(self._record.load_E.shape[0], self._record.device, set())
        record.enabled = False
        return LayerPass(record)

    def defer(self, compute: Callable[[], T]) -> Deferred[T]:
        """Have ``compute`` run between the start and the arrival of the next rows that travel."""
        deferred = Deferred(compute)
        self._deferred.append(deferred)
        return deferred

    def run_deferred(self) -> None:
        """Run what was put off; a row path calls this while its rows travel."""
        while self._deferred:
            self._deferred.pop(0)()
