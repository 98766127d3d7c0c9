"""What was measured of a model's Fisher, as plain values: the part of a diagnosis that tables and pictures read."""

from dataclasses import dataclass

from .spectrum import IntervalEstimate, Spectrum
from .verdict import Verdict


@dataclass(frozen=True)
class Findings:
    """What ``diagnose`` measured.

    Attributes:
        num_timesteps: uniform t is drawn from 0 .. num_timesteps - 1.
        num_samples: samples at every timestep.
        num_parameters: parameters of the diagnosis.
        at: timestep -> Spectrum.
        uniform: the Spectrum with t uniform.
        layers: name of the module that owns the parameters -> timestep or "uniform" -> Spectrum.
        snr: timestep -> signal-to-noise ratio, or empty.
        cosines: between the mean gradients of the timesteps in the order of ``at``, and t uniform last; nan where a
            mean is lost in noise.
        bands: share of the trace with t uniform in the span of the top directions of all the timesteps, held out; its
            interval takes the directions as given.
        verdict: the answer; ``verdict.sentences`` says it in three sentences.
    """

    num_timesteps: int
    num_samples: int
    num_parameters: int
    at: dict[int, Spectrum]
    uniform: Spectrum
    layers: dict[str, dict[str, Spectrum]]
    snr: dict[int, float]
    cosines: list[list[float]]
    bands: IntervalEstimate | None
    verdict: Verdict
