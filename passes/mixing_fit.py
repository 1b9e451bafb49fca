"""Fits what mixing gives to what the attention gave: least squares on calibration batches, site after site.

As in merging, the mix is taken of the student's hidden states and fitted to the teacher's output, and the student goes
on with the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from codegen.ops.fourier_mixing.reference import fourier_mixing
from codegen.spec import FourierMixing
from passes.activations import Activations
from passes.dataflow import Array, Value
from passes.paired_runs import PairedRuns
from passes.protocols import Trial
from passes.site import AttentionSite
from passes.sublayer import Sublayer, sublayer
from passes.targets.fourier import Fourier
from passes.targets.replacement import Replacement
from passes.weights.diagonal import DiagonalFit, DiagonalSums
from passes.weights.projection import site_weights


def fit_mixing(
    pair: PairedRuns, site: AttentionSite, target: Fourier, shared: dict[tuple[Value, Value], DiagonalFit]
) -> Replacement:
    """Fit one site and let the students go on from there; `shared` holds fits of sites that use the same weights.

    Raises NoSublayer where the site is no map of hidden states, KeyError if its values cannot be followed.
    """
    evidence = pair.matches.evidence[site.name]
    around = sublayer(pair.flow, site, evidence)
    spec = FourierMixing(around.hidden, hartley=target.hartley)
    key = (site.k.projection.weight, site.v.projection.weight)
    unit = pair.sharing(site)
    if len(unit) > 1 and key not in shared:
        shared[key] = _pooled(pair, unit, spec)
    reference = [_output(run, around) for run in pair.teachers]
    looked = pair.see(site, site_weights(pair.flow, site), pair.students)
    mixes = [fourier_mixing(spec, _hidden(look)) for look in looked]
    fit = shared[key] if len(unit) > 1 else _summed(DiagonalSums(), around, looked, mixes, reference).solve()
    for run, mix, before in zip(pair.students, mixes, reference, strict=True):
        run.put(around.output, around.laid_out(mix * fit.gain + fit.bias, before))
    return target.fitted(pair.flow, site, evidence, fit)


def _pooled(pair: PairedRuns, unit: Sequence[AttentionSite], spec: FourierMixing) -> DiagonalFit:
    """Sites that share weights get one fit, by the teacher's hidden states at all of them."""
    runs = pair.probe.trials()
    total = DiagonalSums()
    for site in sorted(unit, key=lambda s: s.anchor):
        around = sublayer(pair.flow, site, pair.matches.evidence[site.name])
        looked = pair.see(site, site_weights(pair.flow, site), runs)
        mixes = [fourier_mixing(spec, _hidden(look)) for look in looked]
        _summed(total, around, looked, mixes, [_output(run, around) for run in runs])
    return total.solve()


def _summed(
    sums: DiagonalSums,
    around: Sublayer,
    looked: Sequence[Activations],
    mixes: Sequence[Array],
    reference: Sequence[Array],
) -> DiagonalSums:
    """`sums`, with all tokens added that are no padding."""
    for look, mix, output in zip(looked, mixes, reference, strict=True):
        batch, tokens, _ = mix.shape
        order = (batch, tokens) if around.batch_first else (tokens, batch)
        sums.add(mix[look.asking], around.by_token(output, order)[look.asking])
    return sums


def _hidden(look: Activations) -> Array:
    """[B, S, E]: what the projections read, without the constant feature."""
    return np.asarray(look.inputs[0][..., :-1])


def _output(run: Trial, around: Sublayer) -> Array:
    return run.advance(around.output, {around.output})[around.output]
