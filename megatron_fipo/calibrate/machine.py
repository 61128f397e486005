"""From what was measured to a machine, with the figures of another machine for the rest. Pure arithmetic."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megatron_fipo.calibrate.fitting import (
    SPREAD,
    Point,
    Value,
    fit_decoding,
    fit_link,
    fit_products,
    fit_rate,
    fit_seconds,
)
from megatron_fipo.calibrate.messages import Device, Measured, Message, Observed, Skipped
from megatron_fipo.calibrate.shapes import (
    as_packs,
    cache_token_bytes,
    decode_operations,
    engine_weight_bytes,
    packs,
)
from megatron_fipo.environment import BF16_PEAK_FLOPS
from megatron_fipo.errors import one_line
from megatron_fipo.plan.case import Case
from megatron_fipo.plan.estimate import total
from megatron_fipo.plan.machine import PRECISIONS, Figure, Link, Machine, Products
from megatron_fipo.plan.time.layer import layer_time

DECODING = ("decode_weights", "decode_cache", "decode_step", "decode_sequence")
KNOWN_SHARE = 0.95
"""Of the time of decoded batches, at most, that products and reading of weights stand for."""


@dataclass
class Calibration:
    """A machine, and what of it was not measured."""

    machine: Machine
    reasons: dict[str, str] = field(default_factory=dict)
    """By the names of figures: why they are another machine's."""


@dataclass(frozen=True)
class Found:
    """All messages of the measuring processes."""

    messages: Sequence[Message]
    failures: Mapping[str, str]
    """By the names of figures, for those whose process failed, was not started or did not end in time."""

    @property
    def device(self) -> Device:
        return next(message for message in self.messages if isinstance(message, Device))

    def points(self, figure: str) -> list[Point]:
        """Raises ValueError with the reason if there are none."""
        points = [m.point for m in self.messages if isinstance(m, Measured) and m.figure == figure]
        if not points:
            raise ValueError(self.reason(figure))
        return points

    def reason(self, figure: str) -> str:
        """Why a figure was not measured."""
        skipped = {m.figure: m.reason for m in self.messages if isinstance(m, Skipped)}
        return skipped.get(figure) or self.failures.get(figure) or "it was not measured"


def assemble(case: Case, name: str, devices: int, host_bytes: int, source: str, found: Found) -> Calibration:
    """The machine at hand. `case.machine` is the one that stands in; `source` ends the source of every measured figure."""
    device, base = found.device, case.machine
    on_cpu = device.name == "cpu"
    start = replace(
        base,
        name=name,
        device=device.name,
        devices_per_node=devices,
        device_bytes=max(1, device.memory_bytes // (devices if on_cpu else 1)),
        host_bytes=host_bytes,
    )
    builder = _Builder(case, found, source, Calibration(start))
    builder.products(on_cpu)
    builder.simple()
    if on_cpu:
        builder.between_products()
    builder.decoding()
    return builder.result


class _Builder:
    """Replaces the figures of a machine one after another; those that fail are the base's, with the reason."""

    def __init__(self, case: Case, found: Found, source: str, result: Calibration) -> None:
        self.case = case
        self.base = case.machine
        self.found = found
        self.source = source
        self.result = result

    def products(self, on_cpu: bool) -> None:
        """Every precision that was measured. On a GPU those of the base stand in for the others."""
        measured: dict[str, Products] = {}
        wanted = [self.case.config.model.dtype] if on_cpu else [*PRECISIONS]
        for precision in wanted:
            key = f"products.{precision}"
            try:
                rate, half = fit_products(self.found.points(key))
            except ValueError as error:
                given = self.base.products.get(precision)
                if given is not None:
                    measured[precision] = replace(given, rate=self._borrowed(given.rate, key, str(error)))
                elif precision == self.case.config.model.dtype:
                    self.result.reasons[key] = str(error)
            else:
                measured[precision] = Products(self._figure(rate, "products at the model's shapes"), half)
        fastest = max(
            (point.features[0] / point.median for point in self._all_products()), default=self.base.peak
        )
        peak = BF16_PEAK_FLOPS.get(self.result.machine.device, fastest)
        self._set(products=measured or dict(self.base.products), peak=peak)

    def simple(self) -> None:
        """Figures of one measurement each, and those that a single node cannot measure."""
        rates = {
            "attention_forward": "core attention of packs",
            "attention_backward": "core attention of packs",
            "memory": "a copy",
            "disk": "files written and synced",
            "prefill": "prompts of the rollout engine",
        }
        for name, what in rates.items():
            self._measure(name, fit_rate, what)
        self._measure("layer_host", fit_seconds, "two layers on few tokens")
        self._link("node", "all-reduces on one node")
        self._link("host", "copies between device and host")
        self._link("network", "")
        self._read("reserved_bytes", "a rank's process")
        self._read("fragmentation", "")

    def between_products(self) -> None:
        """On a CPU: the copy rate at which the planner's bytes between the products take as long as in the layer measured.

        Norms and activations are no copies there: they are slower, and small ones stay in the cache.
        """
        try:
            (point,) = self.found.points("layer")
        except ValueError:
            return
        tokens, pairs, layers = point.features
        pack = replace(as_packs([1]), tokens=tokens, rows=tokens, pairs=pairs)
        copy = self.result.machine.memory

        def seconds(rate: float) -> float:
            memory = Figure(rate, rate, rate, copy.source)
            machine = replace(self.result.machine, memory=memory)
            times = layer_time(replace(self.case, machine=machine), pack)
            return total((*times.forward.values(), *times.backward.values())).value

        low, high = (float(bound) / layers for bound in np.quantile(point.seconds, SPREAD))
        rate, slow, fast = (
            inverse(seconds, each, copy.value / 1e3, copy.value * 10)
            for each in (point.median / layers, high, low)
        )
        value = Value(rate, min(slow, rate), max(fast, rate, copy.value))
        self._set(memory=self._figure(value, "operations between the products of a layer"))

    def decoding(self) -> None:
        """The four figures of a decoding step, which only fit together."""
        try:
            values = self._decoding()
        except ValueError as error:
            for name in DECODING:
                self._set(**{name: self._borrowed(getattr(self.base, name), name, str(error))})
            return
        what = f"decoding by rollout.engine={self.case.config.rollout.engine}"
        self._set(**{name: self._figure(value, what) for name, value in values.items()})

    def _decoding(self) -> dict[str, Value]:
        """What the planner counts for products that take longer than reading the weights is subtracted before the fit."""
        narrow = fit_rate(self.found.points("decode_weights")).value
        points = self.found.points("decode")
        reading = engine_weight_bytes(self.case) / narrow
        products = self.result.machine.products.get(self.case.config.model.dtype)
        each = decode_operations(self.case) / products.rate.value if products else 0.0
        rest = []
        for point in points:
            steps, sequences, _ = point.features
            beyond = steps * max(0.0, each * sequences / steps - reading)
            kept = tuple(max(seconds - beyond, (1 - KNOWN_SHARE) * seconds) for seconds in point.seconds)
            rest.append(Point(point.features, kept))
        fitted = fit_decoding(rest, engine_weight_bytes(self.case), cache_token_bytes(self.case), narrow)
        return dict(zip(DECODING, (fitted.weights, fitted.cache, fitted.step, fitted.sequence), strict=True))

    def _link(self, name: str, what: str) -> None:
        base: Link = getattr(self.base, name)
        try:
            rate, latency = fit_link(self.found.points(name))
        except ValueError as error:
            reason = str(error)
            link = Link(self._borrowed(base.rate, name, reason), self._borrowed(base.latency, name, reason))
        else:
            link = Link(self._figure(rate, what), self._figure(latency, what))
        self._set(**{name: link})

    def _measure(self, name: str, fit: Callable[[Sequence[Point]], Value], what: str) -> None:
        try:
            figure = self._figure(fit(self.found.points(name)), what)
        except ValueError as error:
            figure = self._borrowed(getattr(self.base, name), name, one_line(error))
        self._set(**{name: figure})

    def _read(self, name: str, what: str) -> None:
        values = [m.value for m in self.found.messages if isinstance(m, Observed) and m.figure == name]
        if values and values[0] > 0:
            figure = self._figure(Value(values[0], values[0], values[0]), what)
        else:
            figure = self._borrowed(getattr(self.base, name), name, self.found.reason(name))
        self._set(**{name: figure})

    def _all_products(self) -> list[Point]:
        names = {f"products.{precision}" for precision in ("bfloat16", "float32")}
        return [m.point for m in self.found.messages if isinstance(m, Measured) and m.figure in names]

    def _figure(self, value: Value, what: str) -> Figure:
        return Figure(value.value, value.low, value.high, f"{what}, {self.source}")

    def _borrowed(self, figure: Figure, name: str, reason: str) -> Figure:
        self.result.reasons[name] = reason
        source = f"machine {self.base.name} ({figure.source}), not measured here: {reason}"
        return replace(figure, source=source, calibrated=False)

    def _set(self, **figures: Any) -> None:
        self.result.machine = replace(self.result.machine, **figures)


def inverse(function: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where a falling function of a positive number has the value `wanted`, between `low` and `high`; else the nearer end."""
    for _ in range(60):
        middle = (low * high) ** 0.5
        if function(middle) > wanted:
            low = middle
        else:
            high = middle
    return high


def sources(case: Case, device: str, day: str) -> str:
    """The end of every source: where and when."""
    longest = max(sum(pack) for pack in packs(case))
    return f"{device}, packs of {longest:,} tokens, {day}"
