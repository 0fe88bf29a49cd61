"""Beamformer: eight microphones, listening in four directions at once.

Van Veen and Buckley, "Beamforming: A Versatile Approach to Spatial Filtering" (IEEE ASSP Magazine 1988). Sound from one
direction reaches the microphones one after another. A beamformer delays the signals so that they agree, and sums them.
A pointwise layer is the mix across microphones at one point in time. A delay is a convolution along time for one
microphone (a windowed sinc, for fractions of a sample). The gain of each microphone is one number. A separable 1-D
network then estimates a mask per beam, as in Conv-TasNet (Luo and Mesgarani, TASLP 2019). The model is written with
Conv1d, as in torch. Sound from a beam's direction is off by 1.8e-03 before and after. That is not rounding, but the
accuracy of a windowed sinc of 31 taps for sound below a quarter of the sampling rate.

Rewritten: gains, delays and mix become one convolution of 31 taps from microphones to beams. This is exact, because no
activation follows any of them. BatchNormalizations fold. Each PReLU has one slope, so it becomes a LeakyReLU, which
fuses into the convolution before it. Then the whole region runs as 2-D convolutions of height one, because
onnxruntime's fast blocked layout exists for 2-D only.

Left alone: LeakyReLU and Sigmoid are not linear, and the mask is multiplied by a signal that depends on the same input.
"""

from __future__ import annotations

import numpy as np
import onnx

from models.exporter import Exporter
from models.system import Law, Refusal, System, object_in
from pwopt.invariants import function_of, translation
from pwopt.running.session import Session

MICROPHONES, BEAMS, TAPS, LENGTH, WIDTH, HIDDEN = 8, 4, 31, 1024, 64, 128


def arrivals() -> np.ndarray:
    """The arrival time of a plane wave from each beam's direction at each microphone, in samples: (beams, microphones).

    The array is linear with a spacing of 4 cm and samples at 16 kHz. Sound travels 343 m per second.
    """
    angles = np.deg2rad([-60, -20, 20, 60])
    places = 0.04 * (np.arange(MICROPHONES) - (MICROPHONES - 1) / 2)
    return np.asarray(16_000 / 343 * np.sin(angles)[:, None] * places)


def shifted_sinc(by: np.ndarray) -> np.ndarray:
    """A convolution kernel (…, taps) that delays by a fraction of a sample: a sinc in a Hann window."""
    t = np.arange(TAPS) - TAPS // 2 + np.asarray(by)[..., None]  # ONNX correlates, so a delay looks back
    return np.asarray(np.sinc(t) * np.cos(np.pi * t / (TAPS + 13)) ** 2)


def gains() -> np.ndarray:
    """The gain of each microphone."""
    return np.random.default_rng(20).uniform(0.8, 1.25, MICROPHONES)


def build() -> onnx.ModelProto:
    """The model: microphones (batch, 8, 1024) float32 → beams and enhanced (batch, 4, 1024)."""
    e = Exporter(19)
    x = e.node("Mul", ["microphones", e.constant("gains", (1 / gains())[:, None])], "calibrate")
    delays = shifted_sinc(-arrivals().T.reshape(-1))  # microphone-major, as groups need it
    x = e.conv(
        x, "steer", MICROPHONES, MICROPHONES * BEAMS, TAPS, groups=MICROPHONES, bias=False, rank=1, weight=delays
    )
    mix = np.tile(np.eye(BEAMS) / MICROPHONES, MICROPHONES)
    beams = e.conv(x, "mix", MICROPHONES * BEAMS, BEAMS, bias=False, rank=1, weight=mix, output="beams")
    x = e.norm(e.conv(beams, "mask/in/conv", BEAMS, WIDTH, 15, bias=False, rank=1, gain=2), "mask/in/norm", WIDTH)
    for i in (1, 2):
        y = e.norm(e.conv(x, f"mask/{i}/expand", WIDTH, HIDDEN, bias=False, rank=1), f"mask/{i}/norm1", HIDDEN)
        y = e.node("PRelu", [y, e.constant(f"mask/{i}/prelu1.weight", [[0.25]])], f"mask/{i}/prelu1")
        y = e.conv(y, f"mask/{i}/depthwise", HIDDEN, HIDDEN, 3, groups=HIDDEN, bias=False, rank=1)
        y = e.node(
            "PRelu",
            [e.norm(y, f"mask/{i}/norm2", HIDDEN), e.constant(f"mask/{i}/prelu2.weight", [[0.25]])],
            f"mask/{i}/prelu2",
        )
        x = e.node("Add", [x, e.conv(y, f"mask/{i}/project", HIDDEN, WIDTH, rank=1)], f"mask/{i}")
    mask = e.node("Sigmoid", [e.conv(x, "mask/out", WIDTH, BEAMS, rank=1)], "mask")
    e.node("Mul", [beams, mask], "apply", "enhanced")
    shape: list[int | str] = ["batch", BEAMS, LENGTH]
    return e.model("beamformer", {"microphones": ["batch", MICROPHONES, LENGTH]}, {"beams": shape, "enhanced": shape})


def distortion(session: Session) -> float:
    """The deviation of each beam from a sound from its direction, away from the ends, relative to the sound.

    The sound has no power above a quarter of the sampling rate. Below that, the windowed sinc is accurate.
    """
    rng, t, worst = np.random.default_rng(0), np.arange(LENGTH), 0.0
    tones = rng.uniform(0.02, 0.5, 12) * np.pi, rng.uniform(0, 2 * np.pi, 12)

    def sound(at: np.ndarray) -> np.ndarray:
        return np.asarray(np.cos(tones[0] * at[..., None] + tones[1]).sum(-1))

    for beam, arrival in enumerate(arrivals()):
        heard = gains()[:, None] * sound(t - arrival[:, None])
        found = function_of(session, output="beams")(heard[None].astype(np.float32))[0, beam]
        inside = slice(TAPS, -TAPS)
        off = found[inside] - sound(t)[inside]
        worst = max(worst, float(np.abs(off).max() / np.abs(sound(t)).max()))
    return worst


SYSTEM = System(
    build,
    {"microphones": (1, MICROPHONES, LENGTH)},
    rewrites=("lower-prelu", "fold-affine", "fold-chains", "lower-rank"),
    measured=("lower-rank",),
    properties=(
        Law("sound from a beam's direction passes unchanged", distortion, 2e-3),
        Law(
            "delaying the sound delays the output",
            lambda s: translation(
                function_of(s, output="enhanced"),
                object_in(1, MICROPHONES, LENGTH, size=400, start=200),
                shift=137,
                margin=32,
            ),
            1e-5,
        ),
    ),
    refusals=(Refusal("/mask/Sigmoid", "Sigmoid is not linear"),),
)
