"""The fields of a diagnosis. ``pictures.py`` reads them here, so that it need not import ``Diagnosis``."""

from dataclasses import dataclass

from .spectrum import IntervalEstimate, Spectrum
from .verdict import Verdict


@dataclass(frozen=True)
class Findings:
    """The fields of :class:`Diagnosis`, which documents them."""

    num_timesteps: int
    num_samples: int  # at each timestep
    num_parameters: int
    at: dict[int, Spectrum]  # by timestep
    uniform: Spectrum
    layers: dict[str, dict[str, Spectrum]]  # by module, then by timestep (as a string) or "uniform"
    snr: dict[int, float]  # by timestep; may be empty
    cosines: list[list[float]]
    bands: IntervalEstimate | None
    verdict: Verdict
