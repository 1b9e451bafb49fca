"""Fits what mixing gives to what the attention gave: least squares on calibration batches, site after site.

As in merging, the mix is taken of the student's hidden states and fitted to the teacher's output, and the student goes
on with the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from passes.activations import Activations
from passes.dataflow import Array, Value
from passes.paired_runs import PairedRuns
from passes.protocols import Trial
from passes.site import AttentionSite
from passes.sublayer import Sublayer, sublayer
from passes.targets.catalogue import Mixer
from passes.targets.mixing import Fit, Fitting
from passes.targets.replacement import Replacement
from passes.weights.projection import site_weights


def fit_mixing(
    pair: PairedRuns, site: AttentionSite, target: Mixer, shared: dict[tuple[Value, Value], Fit]
) -> Replacement:
    """Fit one site and let the students go on from there; `shared` holds fits of sites that use the same weights.

    Raises NoSublayer where the site is no map of hidden states that the target can stand for, KeyError if its values
    cannot be followed.
    """
    evidence = pair.matches.evidence[site.name]
    around = sublayer(pair.flow, site, evidence)
    fitting = target.fitting(pair.flow, site, evidence, around)
    key = (site.k.projection.weight, site.v.projection.weight)
    unit = pair.sharing(site)
    if len(unit) > 1 and key not in shared:
        shared[key] = _pooled(pair, unit, target.fitting(pair.flow, site, evidence, around))
    look = pair.look(site, site_weights(pair.flow, site))
    prepared = [fitting.prepare(_hidden(seen), seen.asking) for seen in look.seen]
    if len(unit) > 1:
        fit = shared[key]
    else:
        _add(fitting, around, pair.fit(look.seen), pair.fit(prepared), pair.fit(look.reference))
        fit = fitting.solve()
    for run, given, before in zip(pair.students, prepared, look.reference, strict=True):
        run.put(around.output, around.laid_out(fit.output(given), before))
    return target.fitted(pair.flow, site, evidence, fit)


def _pooled(pair: PairedRuns, unit: Sequence[AttentionSite], fitting: Fitting) -> Fit:
    """Sites that share weights get one fit, by the teacher's hidden states at all of them."""
    runs = pair.probe.trials()
    for site in sorted(unit, key=lambda s: s.anchor):
        around = sublayer(pair.flow, site, pair.matches.evidence[site.name])
        looked = pair.see(site, site_weights(pair.flow, site), runs)
        prepared = [fitting.prepare(_hidden(look), look.asking) for look in looked]
        reference = [_output(run, around) for run in runs]
        _add(fitting, around, pair.fit(looked), pair.fit(prepared), pair.fit(reference))
    return fitting.solve()


def _add(
    fitting: Fitting,
    around: Sublayer,
    looked: Sequence[Activations],
    prepared: Sequence[Array],
    reference: Sequence[Array],
) -> None:
    for look, given, output in zip(looked, prepared, reference, strict=True):
        batch, tokens = look.asking.shape
        order = (batch, tokens) if around.batch_first else (tokens, batch)
        fitting.add(given, around.by_token(output, order), look.asking)


def _hidden(look: Activations) -> Array:
    """[B, S, E]: what the projections read, without the constant feature."""
    return np.asarray(look.inputs[0][..., :-1])


def _output(run: Trial, around: Sublayer) -> Array:
    return run.advance(around.output, {around.output})[around.output]
